"""The hidden states that the draft has not read yet, and its progress (docs/decisions/0002-plan-zero.md)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Ints
from specrl.decoding.batch import Batch
from specrl.decoding.propose import MAX_DRAFT_TOKENS
from specrl.models.attention import KVCache, TokenSlots
from specrl.models.draft import ServingDraft

BUFFER_BYTES = 64 << 20  # memory of the buffer, unless that is too little for two rounds


class PendingFeatures:
    """The draft's cache, and a buffer of hidden states of the target (EAGLE's features) that the draft will read.

    Between rounds a request has L known tokens, and the draft has read D of them (`read`): the draft's cache holds
    slots 0 .. D-1, and the buffer holds the hidden states of slots D .. L-2, at least one. So a round of plan 0 only
    stores its hidden states, and the next speculative round lets the draft catch up.

    Args:
        max_context: tokens that a request may reach.
        padding: rows of the buffer that no live request reaches, for rounds in fixed shapes.
    """

    read: Ints  # [B] int64, slots that the draft has read, D

    def __init__(self, draft: ServingDraft, cache: KVCache, batch: Batch, *, max_context: int, padding: int) -> None:
        self.draft, self.cache, self._batch = draft, cache, batch
        rows, width = batch.max_batch_size, 3 * draft.config.target_hidden_size
        affordable = BUFFER_BYTES // (rows * width * draft.dtype.itemsize)
        self.room = max(2 * MAX_DRAFT_TOKENS, min(max_context, affordable))
        shape = (rows, self.room + padding, width)  # [max_batch_size, room + padding, 3H]
        self.buffer = torch.zeros(shape, dtype=draft.dtype, device=draft.device)
        self._all_read = np.zeros(rows, dtype=np.int64)
        self._arange = torch.arange(max(cache.capacity + MAX_DRAFT_TOKENS, rows), device=draft.device)

    def resize(self) -> None:
        """Follow a resize of the batch."""
        size = self._batch.size
        self.read, self._live = self._all_read[:size], self.buffer[:size]
        self._first = (torch.arange(size, device=self.draft.device) * self._live.shape[1])[:, None]  # row in the buffer

    def counts(self) -> Ints:
        """Count the hidden states of each request that the draft has not read: [B] int64, at least 1."""
        return self._batch.length - 1 - self.read

    def read_prompt(self, row: int, tokens: Tensor, hidden_states: Tensor) -> None:
        """Let the draft read a prompt, `tokens [1, T]` and `hidden_states [1, T, 3H]`; the last state stays pending."""
        self.buffer[row, 0] = hidden_states[0, -1]
        count = self._all_read[row] = tokens.shape[1] - 1
        if count:
            hidden, where = self.draft.fuse(hidden_states[:, :-1]), TokenSlots(self._arange[None, :count], count)
            self.draft.decode(tokens[:, 1:], hidden, self.cache, where._replace(first_row=row))

    def catch_up(self, leave: int = 0) -> Tensor:
        """Let the draft read all but the last `leave` hidden states; returns its state after them [B, H]."""
        batch = self._batch
        counts = self.counts() - leave
        width = int(counts.max())
        last_slot = self.cache.capacity - 1  # never visible; shorter requests write there beyond their end
        slots = (batch.on_device(self.read)[:, None] + self._arange[:width]).clamp_(max=last_slot)
        tokens = batch.shared_tokens.to(self.draft.device).gather(1, slots + 1)
        where = TokenSlots(slots, min(int(self.read.max()) + width, last_slot + 1))
        hidden = self.draft.decode(tokens, self.draft.fuse(self._live[:, :width]), self.cache, where)
        self.read += counts
        last = batch.on_device(np.maximum(counts - 1, 0))
        return hidden[self._arange[: len(last)], last]

    def append(self, hidden_states: Tensor, path: Tensor | None = None) -> None:
        """Store the hidden states [B, n, 3H] of verified tokens, before they are committed.

        Args:
            hidden_states: of all verified tokens; those that are not committed are overwritten by the next round.
            path: [B, s + 1] int64, the accepted rows of a tree, in order; None: a chain's.
        """
        counts = self.make_room(hidden_states.shape[1])
        if path is not None:
            hidden_states = along_path(hidden_states, path)
        rows = self._first + self._batch.on_device(counts)[:, None] + self._arange[: hidden_states.shape[1]]
        self._live.view(-1, hidden_states.shape[-1]).index_put_((rows,), hidden_states)

    def make_room(self, count: int) -> Ints:
        """Let the draft read early if the buffer has no room for `count` more; returns `counts()`."""
        counts = self.counts()
        if int(counts.max()) + count <= self.room:
            return counts
        rows = (self._first[:, 0] + self._batch.on_device(counts - 1)).unsqueeze(1)
        last = self._live.view(-1, self._live.shape[-1])[rows]  # [B, 1, 3H]
        if int(counts.max()) > 1:
            self.catch_up(leave=1)
        self._live[:, :1] = last
        return self.counts()


def along_path(hidden_states: Tensor, path: Tensor) -> Tensor:
    """Return the rows `path [B, s + 1]` of `hidden_states [B, n, 3H]`; row 0 where the path has ended."""
    return hidden_states.gather(1, path.clamp(min=0)[..., None].expand(-1, -1, hidden_states.shape[-1]))
