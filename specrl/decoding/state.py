"""What the parts of a session share: settings, models, caches and requests, the traces kept, and a timer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specrl.core.clock import Clock
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.decoding.batch import Batch, Committed, LiveRequest
from specrl.decoding.pending_features import PendingFeatures
from specrl.decoding.propose import MAX_DRAFT_TOKENS, Proposal
from specrl.decoding.verify import Verified
from specrl.models.draft import ServingDraft
from specrl.models.target import Target


@dataclass(frozen=True)
class SessionConfig:
    """Settings of a session.

    Args:
        batch_size: live requests.
        max_batch_size: the largest batch size that `resize` accepts.
        max_context: tokens that a request may reach.
        seed: of all sampling.
        use_rejection_sampling: see `specrl.decoding.engine.LocalEngine`.
        trace: keep traces for `drain`.
        aux_layers: layers of the target whose inputs the draft reads and a trace holds; () without a draft: none.

    Raises:
        ValueError: a batch size is out of range.
    """

    batch_size: int
    max_batch_size: int
    max_context: int
    seed: int
    use_rejection_sampling: bool = True
    trace: bool = False
    aux_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        most = self.max_batch_size
        if not 1 <= self.batch_size <= most:
            raise ValueError(f"batch_size must be in [1, max_batch_size={most}], but got {self.batch_size}")


class SessionState:
    """Models, caches and requests of a session; with `fixed_shapes` there are slots and rows for padding.

    Attributes:
        batch: the requests.
        cache: of the target.
        pending: the draft, its cache and the hidden states that it has not read; None: without a draft.
    """

    def __init__(
        self, target: Target, draft: ServingDraft | None, config: SessionConfig, *, fixed_shapes: bool
    ) -> None:
        self.target, self.config = target, config
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


class Traces:
    """Traces of a session, in order. A session without aux layers has none.

    `copy`: copy tensors, because the next round overwrites them.
    """

    def __init__(self, state: SessionState, *, copy: bool) -> None:
        self._state, self._copy, self._kept = state, copy, list[Trace]()

    def drain(self) -> list[Trace]:
        """Take the traces kept so far."""
        kept, self._kept = self._kept, []
        return kept

    def add_round(self, plan: Plan, proposal: Proposal, verified: Verified, committed: Committed) -> None:
        """Add a round that is committed; its finished requests are not replaced yet."""
        if verified.hidden_states is None:
            return
        tensors = (proposal.tokens, verified.hidden_states, verified.logits, proposal.parents, verified.path)
        tokens, features, logits, parents, path = (tensor.clone() if self._copy else tensor for tensor in tensors)
        ids, positions = committed.request_ids, committed.context_lengths - 1
        live, version = self._state.batch.live, self._state.draft_version
        temperatures = tuple(one.request.temperature for one in live)
        finished = tuple(live[row].id for row in committed.ended)
        trace = Trace(ids, positions, tokens, features, logits, parents, path, version, plan, temperatures, finished)
        self._kept.append(trace)

    def add_prefill(
        self, one: LiveRequest, tokens: Tensor, hidden_states: Tensor | None, logits: Tensor, ended: bool
    ) -> None:
        """Add the prefill of a prompt `tokens [1, T]`; `ended`: the request ended with its first token."""
        if hidden_states is None:
            return
        ids, positions = np.array([one.id]), np.zeros(1, dtype=np.int64)
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        temperatures, finished = (one.request.temperature,), (one.id,) if ended else ()
        version = self._state.draft_version
        trace = Trace(
            ids, positions, tokens, hidden_states, logits, rows - 1, rows, version, None, temperatures, finished
        )
        self._kept.append(trace)


class RoundTimer:
    """Times the parts of a round; starts when it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, clock.now()

    def lap(self) -> float:
        """Seconds since the last lap, after all work given to the device is done."""
        last, self._last = self._last, self._clock.now()
        return self._last - last
