"""What the parts of a session share: settings, models, caches and requests, and how a round is run and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from specrl.core.clock import Clock
from specrl.core.plan import Plan
from specrl.decoding.batch import Batch
from specrl.decoding.pending_features import PendingFeatures
from specrl.decoding.propose import MAX_DRAFT_TOKENS, Proposal
from specrl.decoding.sampling import Source
from specrl.decoding.verify import Verified
from specrl.models.draft import ServingDraft
from specrl.models.kv_cache import KVCache
from specrl.models.target import Target


@dataclass(frozen=True)
class SessionConfig:
    """Settings of a session.

    Args:
        batch_size: live requests.
        max_batch_size: the largest batch size that `resize` accepts.
        max_context: tokens that a request may reach.
        seed: of all sampling.
        use_rejection_sampling: sample chains from the draft and accept them by rejection sampling (SGLang's option of
            that name). Otherwise, and for every tree, the draft's best tokens are proposed, and accepted where the
            target itself chooses them.
        trace: keep traces for `drain`.
        aux_layers: in a session without a draft, the layers whose inputs a trace holds as features.

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


@dataclass(frozen=True)
class SessionState:
    """Models, caches and requests of a session.

    Args:
        target, cache: the model and its cache.
        batch: the requests.
        pending: the draft, its cache and what it has not read; None: without a draft.
        max_context, use_rejection_sampling: see `SessionConfig`.
        aux_layers: layers whose inputs the draft reads and a trace holds.
    """

    target: Target
    cache: KVCache
    batch: Batch
    pending: PendingFeatures | None
    max_context: int
    use_rejection_sampling: bool
    aux_layers: tuple[int, ...]

    @classmethod
    def new(cls, target: Target, draft: ServingDraft | None, config: SessionConfig, fixed_shapes: bool) -> SessionState:
        """Empty caches for all requests; for rounds in fixed shapes with slots and rows for padding.

        Raises:
            ValueError: `max_context` is larger than the positions of the target.
        """
        context, most = config.max_context, target.config.max_position_embeddings
        if not 2 <= context <= most:
            raise ValueError(f"max_context must be in [2, {most}], the target's positions, but got {context}")
        capacity = context + MAX_DRAFT_TOKENS + (MAX_DRAFT_TOKENS if fixed_shapes else 1)
        fused = True if fixed_shapes else None
        batch = Batch(config.max_batch_size, capacity, target.device)
        cache = target.new_cache(config.max_batch_size, capacity, fused)
        if draft is None:
            return cls(target, cache, batch, None, context, config.use_rejection_sampling, config.aux_layers)
        padding = MAX_DRAFT_TOKENS if fixed_shapes else 0
        pending = PendingFeatures(draft, batch, max_context=context, capacity=capacity, fused=fused, padding=padding)
        return cls(target, cache, batch, pending, context, config.use_rejection_sampling, draft.config.aux_layers)


class RoundRunner(Protocol):
    """Runs the parts of a round on the device."""

    def prepare(self, plan: Plan) -> None:
        """Build what a round of `plan` needs, such as kernels; untimed, and without any other effect."""
        ...

    def propose(self, plan: Plan, source: Source) -> Proposal:
        """Draft for every live request."""
        ...

    def verify(self, plan: Plan, proposal: Proposal, source: Source) -> Verified:
        """Run the target over the proposal and accept."""
        ...

    def keep(self, plan: Plan, verified: Verified) -> None:
        """Keep the hidden states of the verified tokens for the draft, unless `verify` did."""
        ...

    def plain_step(self, source: Source) -> list[int]:
        """One step of plain decoding: a token for each live request."""
        ...


class RoundTimer:
    """Times the parts of a round; starts when it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, clock.now()

    def lap(self) -> float:
        """Seconds since the last lap, after all work given to the device is done."""
        last, self._last = self._last, self._clock.now()
        return self._last - last
