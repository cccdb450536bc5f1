"""From traces to training sequences: the accepted path of each request, joined round by round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Trace


class RejectedDrafts(NamedTuple):
    """Rejected drafts, at most one for each position of a sequence, and the target's distributions after them."""

    positions: Tensor  # [R] int64, ascending: the last accepted token before the draft
    tokens: Tensor  # [R] int64, the draft, in place of `TrainingSequence.tokens[positions + 1]`
    logits: Tensor  # [R, V], the target's distribution after it


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One finished request as the target saw it: T positions whose next token is known."""

    tokens: Tensor  # [T] int64
    features: Tensor  # [T, 3H], the target's aux hidden states at each token
    logits: Tensor  # [T, V] float32 or float16, the target's distributions over the next tokens
    temperature: float
    draft_version: int  # of its last round
    prompt_tokens: int = 0  # leading tokens that the target did not choose
    rejected: RejectedDrafts | None = None  # None: they were not recorded

    def to(self, device: torch.device) -> TrainingSequence:
        """Copy the sequence to a device, asynchronously to a GPU."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=device.type == "cuda")

        tokens, features, logits = map(move, (self.tokens, self.features, self.logits))
        rejected = None if self.rejected is None else RejectedDrafts(*map(move, self.rejected))
        return replace(self, tokens=tokens, features=features, logits=logits, rejected=rejected)


@dataclass(slots=True)
class _PartialSequence:
    """A request that is being assembled."""

    tokens: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    rejected: list[RejectedDrafts] = field(default_factory=list)
    length: int = 0
    prompt_tokens: int = 0

    def finish(self, temperature: float, version: int) -> TrainingSequence:
        """Return the complete sequence."""
        tokens, features, logits = torch.cat(self.tokens).clone(), torch.cat(self.features), torch.cat(self.logits)
        rejected = RejectedDrafts(*map(torch.cat, zip(*self.rejected, strict=True))) if self.rejected else None
        return TrainingSequence(tokens, features, logits, temperature, version, self.prompt_tokens, rejected)


class Assembler:
    """Joins traces into sequences.

    A request is skipped if its traces do not start with its prefill, have a gap, or hold features or logits that are
    not finite in `dtype` (logits of -inf, for impossible tokens, are allowed).

    Args:
        dtype: of the logits in the sequences.
        sample_rate, seed: share of requests to use, by a hash of their ids and the seed.
        keep_rejected: include the first rejected draft at each position (the best one of a tree).

    Attributes:
        counts: numbers of requests that were 'skipped', 'passed_over' by sampling, and 'opted_out'.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float16,
        *,
        sample_rate: float = 1.0,
        seed: int = 0,
        keep_rejected: bool = False,
    ) -> None:
        self._open: dict[int, _PartialSequence | None] = {}  # None: left out, and counted
        self._dtype, self._sample_rate, self._seed, self._keep_rejected = dtype, sample_rate, seed, keep_rejected
        self._opted_out: set[int] = set()
        self.counts = {"skipped": 0, "passed_over": 0, "opted_out": 0}

    @property
    def open(self) -> int:
        """Number of requests that are being assembled."""
        return sum(partial is not None for partial in self._open.values())

    def opt_out(self, requests: Iterable[int]) -> None:
        """Use nothing of these requests, by id, whether or not they have started."""
        for request in requests:
            self._opted_out.add(request)
            if self._open.get(request) is not None:
                self._leave_out(request, "opted_out")

    def forget(self) -> None:
        """Discard unfinished requests: the session is over, and ids start again."""
        self._open.clear()
        self._opted_out.clear()

    def add(self, traces: Iterable[Trace]) -> list[TrainingSequence]:
        """Add traces in the order of their rounds; return the sequences of the requests that finished."""
        finished = []
        for trace in traces:
            paths = trace.path.tolist()
            for b, request in enumerate(trace.request_ids.tolist()):
                if request not in self._open or trace.plan is None:
                    self._begin(request)
                partial = self._open[request]
                if partial is not None and not self._extend(partial, trace, b, [row for row in paths[b] if row >= 0]):
                    self._leave_out(request, "skipped")
                if request in trace.finished:
                    partial = self._open.pop(request)
                    self._opted_out.discard(request)
                    if partial is not None:
                        finished.append(partial.finish(trace.temperatures[b], trace.draft_version))
        return finished

    def _leave_out(self, request: int, reason: str) -> None:
        self._open[request] = None
        self.counts[reason] += 1

    def _begin(self, request: int) -> None:
        self._open[request] = _PartialSequence()
        if request in self._opted_out:
            self._leave_out(request, "opted_out")
        elif self._sample_rate < 1.0 and uniform_hash(request, self._seed) >= self._sample_rate:
            self._leave_out(request, "passed_over")

    def _extend(self, partial: _PartialSequence, trace: Trace, b: int, rows: list[int]) -> bool:
        """Add the accepted rows of request `b`; return False if there is a gap before them or they are not finite."""
        index = torch.tensor(rows)
        features, logits = trace.features[b][index], trace.logits[b][index].to(self._dtype)
        finite = bool(torch.isfinite(features).all()) and bool(torch.isfinite(logits.amax(-1)).all())
        if partial.length != int(trace.positions[b]) or not finite:
            return False
        if self._keep_rejected:
            partial.rejected.append(self._rejected(trace, b, rows, partial.length))
        partial.tokens.append(trace.tokens[b][index])
        partial.features.append(features)
        partial.logits.append(logits)
        partial.length += len(rows)
        if trace.plan is None:
            partial.prompt_tokens = partial.length
        return True

    def _rejected(self, trace: Trace, b: int, path: list[int], start: int) -> RejectedDrafts:
        """Return the first rejected child of each row on the path; none for a prefill."""
        first: dict[int, int] = {}  # by depth
        if trace.plan is not None:
            for child, parent in enumerate(trace.parents[b].tolist()):
                if parent in path and child not in path:
                    first.setdefault(path.index(parent), child)
        depths = torch.tensor(sorted(first), dtype=torch.int64)
        children = torch.tensor([first[depth] for depth in sorted(first)], dtype=torch.int64)
        logits = trace.logits[b][children].to(self._dtype)
        finite = torch.isfinite(logits.amax(-1)).cpu()
        return RejectedDrafts(start + depths[finite], trace.tokens[b][children][finite], logits[finite])


def uniform_hash(request: int, seed: int) -> float:
    """Return a pseudo-random number in [0, 1) from both arguments (SplitMix64; Steele et al., 2014)."""
    x = (request + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = ((x ^ ((x % 2**64) >> shift)) * factor) % 2**64
    return x / 2**64


class Replay(deque[TrainingSequence]):
    """A replay buffer of the most recent sequences; newer ones are drawn more often.

    Args:
        capacity: number of sequences, at least 1; `extend` drops the oldest first, and counts them in `dropped`.
        half_life: number of newer sequences that halves the probability of drawing a sequence, above 0.
        seed: of the draws.
        stale_half_life: number of newer draft versions that halves it as well; None: versions do not count.
    """

    def __init__(self, capacity: int, half_life: float, seed: int, stale_half_life: float | None = None) -> None:
        super().__init__(maxlen=capacity)
        self._decay, self._stale_half_life = 0.5 ** (1.0 / half_life), stale_half_life
        self._rng = np.random.default_rng(seed)
        self.dropped = 0

    def extend(self, sequences: Iterable[TrainingSequence], /) -> None:
        """Add newer sequences."""
        for sequence in sequences:
            self.dropped += len(self) == self.maxlen
            self.append(sequence)

    def draw(self, count: int, version: int = 0) -> list[TrainingSequence]:
        """Draw `count` sequences (fewer if there are fewer), without repeats, for a draft of this version."""
        size = len(self)
        weights = self._decay ** np.arange(size - 1, -1, -1.0)
        if self._stale_half_life is not None:
            staleness = version - np.array([s.draft_version for s in self], dtype=np.float64)
            weights *= 0.5 ** ((staleness - staleness.min()) / self._stale_half_life)
        indices = self._rng.choice(size, min(count, size), replace=False, p=weights / weights.sum())
        return [self[i] for i in indices]

    def state_dict(self) -> dict[str, Any]:
        """Return the state without sequences, JSON-able."""
        return {"rng": self._rng.bit_generator.state, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._rng.bit_generator.state, self.dropped = state["rng"], state["dropped"]
