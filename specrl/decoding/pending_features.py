"""What the draft has read of each request, and the features that wait for it (docs/decisions/0002-plan-zero.md)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Ints
from specrl.decoding.batch import Batch
from specrl.decoding.propose import MOST_NODES
from specrl.models.draft import ServingDraft

_WAITING_BYTES = 64 << 20  # memory for features that wait for the draft, unless that holds fewer than two rounds'


class Waiting:
    """The draft's cache, and a buffer of features that it has yet to read.

    Args:
        draft: who reads.
        batch: whose requests; its `read` is kept here.
        max_context: tokens a request may reach.
        capacity, fused: of the cache.
        phantoms: rows of the buffer that no live request reaches, for rounds in fixed shapes.
    """

    def __init__(
        self,
        draft: ServingDraft,
        batch: Batch,
        *,
        max_context: int,
        capacity: int,
        fused: bool | None = None,
        phantoms: int = 0,
    ) -> None:
        self.draft, self._batch = draft, batch
        self.cache = draft.new_cache(batch.most, capacity, fused)
        width = 3 * draft.config.target_hidden_size
        affordable = _WAITING_BYTES // (batch.most * width * draft.dtype.itemsize)
        self._room = max(2 * MOST_NODES, min(max_context, affordable))
        self.buffer = torch.zeros(  # [most, room + phantoms, 3H]
            batch.most, self._room + phantoms, width, dtype=draft.dtype, device=draft.device
        )
        self._arange = torch.arange(max(capacity + MOST_NODES, batch.most), device=draft.device)

    def resize(self) -> None:
        """Follow the batch, which was resized."""
        size = self._batch.size
        self._pending = self.buffer[:size]
        self._rows = (torch.arange(size, device=self.draft.device) * self._pending.shape[1])[:, None]

    def read_prompt(self, row: int, tokens: Tensor, features: Tensor) -> None:
        """Begin a row with a prompt's `tokens [1, T]` and `features [1, T, 3H]`; those of its last token wait."""
        self.buffer[row, 0] = features[0, -1]
        count = tokens.shape[1] - 1
        if count:
            slots = torch.arange(count, device=self.draft.device)[None]
            hidden = self.draft.fuse(features[:, :-1])
            self.draft.decode(tokens[:, 1:], hidden, self.cache, slots, length=count, first=row)

    def catch_up(self, leave: int = 0) -> Tensor:
        """Let the draft read all waiting features but the last `leave`; its state after the last: [B, H]."""
        batch = self._batch
        waiting = batch.waiting() - leave  # [B], at least 1 unless some are left
        width = int(waiting.max())
        last_slot = self.cache.capacity - 1  # where what a shorter request has not got is put; never seen
        slots = (batch.at(batch.read)[:, None] + self._arange[:width]).clamp_(max=last_slot)
        tokens = batch.shared.to(self.draft.device).gather(1, slots + 1)
        hidden = self.draft.decode(
            tokens,
            self.draft.fuse(self._pending[:, :width]),
            self.cache,
            slots,
            length=min(int(batch.read.max()) + width, last_slot + 1),
        )
        batch.read += waiting
        last = batch.at(np.maximum(waiting - 1, 0))
        return hidden[self._arange[: len(last)], last]

    def keep(self, features: Tensor, path: Tensor | None) -> None:
        """Let verified tokens' features [B, n, 3H] wait, in the order of a tree's accepted rows `path [B, s + 1]`."""
        waiting = self.make_room(features.shape[1])
        if path is not None:
            index = path.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
            features = features.gather(1, index)
        rows = self._rows + self._batch.at(waiting)[:, None] + self._arange[: features.shape[1]]
        self._pending.view(-1, features.shape[-1]).index_put_((rows,), features)

    def make_room(self, count: int) -> Ints:
        """Let the draft read early where the buffer has no room for `count` more; how many wait now: [B]."""
        waiting = self._batch.waiting()
        if int(waiting.max()) + count > self._room:
            self._catch_up_early(waiting)
            waiting = self._batch.waiting()
        return waiting

    def _catch_up_early(self, waiting: Ints) -> None:
        """Read all but each request's last waiting features, and move those to the front."""
        rows = (self._rows[:, 0] + self._batch.at(waiting - 1)).unsqueeze(1)
        last = self._pending.view(-1, self._pending.shape[-1])[rows]  # [B, 1, 3H]
        if int(waiting.max()) > 1:
            self.catch_up(leave=1)
        self._pending[:, :1] = last
