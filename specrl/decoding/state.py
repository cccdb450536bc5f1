"""The data that the parts of a session share: settings, models, caches and requests, and the traces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.decoding.batch import Batch, Committed, LiveRequest
from specrl.decoding.pending_features import PendingFeatures
from specrl.decoding.propose import MAX_DRAFT_TOKENS, Proposal, tree_mask
from specrl.decoding.verify import Verified
from specrl.models.attention import TokenSlots
from specrl.models.draft import ServingDraft
from specrl.models.target import Decoded, Target


@dataclass(frozen=True)
class SessionConfig:
    """Settings of a session.

    Args:
        batch_size: live requests.
        max_batch_size: the largest batch size that `resize` accepts.
        max_context: tokens that a request may reach.
        seed: seed of all sampling.
        use_rejection_sampling: see `specrl.decoding.engine.LocalEngine`.
        trace: keep traces for `drain`, if there are aux layers.
        aux_layers: layers of the target whose inputs the draft reads and a trace holds; () without a draft: none.
    """

    batch_size: int
    max_batch_size: int
    max_context: int
    seed: int
    use_rejection_sampling: bool = True
    trace: bool = False
    aux_layers: tuple[int, ...] = ()


class SessionState:
    """Models, caches and requests of a session; with `fixed_shapes` there are slots and rows for padding.

    Attributes:
        batch: the requests.
        cache: the target's keys and values.
        pending: the draft, its cache and the hidden states that it has not read; None: without a draft.
    """

    def __init__(
        self, target: Target, draft: ServingDraft | None, config: SessionConfig, *, fixed_shapes: bool
    ) -> None:
        self.target, self.config, self.fixed_shapes = target, config, fixed_shapes
        rows, padding = config.max_batch_size, MAX_DRAFT_TOKENS if fixed_shapes else 0
        capacity, fused = config.max_context + MAX_DRAFT_TOKENS + max(padding, 1), fixed_shapes or None
        self.batch = Batch(rows, capacity, target.device)
        self.cache = target.new_cache(rows, capacity, fused)
        self.pending: PendingFeatures | None = None
        if draft is not None:
            cache = draft.new_cache(rows, capacity, fused)
            self.pending = PendingFeatures(draft, cache, self.batch, max_context=config.max_context, padding=padding)

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 without a draft."""
        return 0 if self.pending is None else self.pending.draft.version

    def decode(
        self, proposal: Proposal, slots: Tensor, length: int, *, equal_lengths: bool = False, fixed_shapes: bool = False
    ) -> Decoded:
        """Run the target over a proposal, and write the cache from `slots [B]` of the committed tokens on.

        `length` and `equal_lengths` as in `TokenSlots`, `fixed_shapes` as in `tree_mask`.
        """
        count, inside = proposal.tokens.shape[1], proposal.attention_mask
        mask = positions = None
        if inside is not None:
            mask, positions = tree_mask(inside, slots, length, fixed_shapes), slots[:, None] + proposal.depths
        columns = slots[:, None] if count == 1 else slots[:, None] + torch.arange(count, device=slots.device)
        where = TokenSlots(columns, length, positions, mask, equal_lengths=equal_lengths)
        return self.target.decode(proposal.tokens, self.cache, where, aux_layers=self.config.aux_layers)


def round_trace(state: SessionState, plan: Plan, proposal: Proposal, verified: Verified, committed: Committed) -> Trace:
    """Return the trace of a committed round whose finished requests are not replaced yet."""
    tensors: list[Any] = [proposal.tokens, verified.hidden_states, verified.logits, proposal.parents, verified.path]
    if state.fixed_shapes:  # the next round overwrites them
        tensors = [tensor.clone() for tensor in tensors]
    ids, positions, live = committed.request_ids, committed.context_lengths - 1, state.batch.live
    temperatures = tuple(one.request.temperature for one in live)
    ended = tuple(live[row].id for row in committed.ended)
    tokens, features, logits, parents, path = tensors
    version = state.draft_version
    return Trace(ids, positions, tokens, features, logits, parents, path, version, plan, temperatures, ended)


def prefill_trace(state: SessionState, new: LiveRequest, tokens: Tensor, decoded: Decoded, ends: bool) -> Trace:
    """Return the trace of the prefill of a prompt `tokens [1, T]`; `ends`: the request ends with its first token."""
    ids, positions = np.array([new.id]), np.zeros(1, dtype=np.int64)
    rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
    features: Any = decoded.aux_hidden_states
    temperatures, version, ended = (new.request.temperature,), state.draft_version, (new.id,) if ends else ()
    return Trace(ids, positions, tokens, features, decoded.logits, rows - 1, rows, version, None, temperatures, ended)
