"""From traces to training sequences: the accepted path of each request, joined round by round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Trace


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    """One finished request as the target saw it: T positions whose next token is known.

    `logits[t]` is the target's distribution over `tokens[t + 1]`, `features[t]` its aux hidden states at `tokens[t]`.
    """

    tokens: Tensor  # [T] int64
    features: Tensor  # [T, 3H]
    logits: Tensor  # [T, V] float32 or float16
    temperature: float
    draft_version: int  # of its last round
    prompt_tokens: int = 0  # leading tokens that the target did not choose
    rejected: RejectedDrafts | None = None  # None: they were not kept

    def to(self, device: torch.device) -> TrainingSequence:
        """The sequence on a device; copies to a GPU are asynchronous."""
        if self.tokens.device == device:
            return self
        tokens, features, logits = (_move(tensor, device) for tensor in (self.tokens, self.features, self.logits))
        rejected = None if self.rejected is None else self.rejected.to(device)
        return replace(self, tokens=tokens, features=features, logits=logits, rejected=rejected)


@dataclass(frozen=True, slots=True)
class RejectedDrafts:
    """Rejected drafts, at most one for each position of a sequence, and the target's distributions after them."""

    positions: Tensor  # [R] int64, ascending: the last accepted token before the draft
    tokens: Tensor  # [R] int64, the draft, in place of `TrainingSequence.tokens[positions + 1]`
    logits: Tensor  # [R, V], the target's distribution after it

    def to(self, device: torch.device) -> RejectedDrafts:
        """The drafts on a device."""
        return RejectedDrafts(*(_move(tensor, device) for tensor in (self.positions, self.tokens, self.logits)))


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=device.type == "cuda")


@dataclass(slots=True)
class _Open:
    """A request that is being assembled."""

    tokens: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    rejected: list[tuple[int, int, Tensor]] = field(default_factory=list)  # position, token, logits [V]
    known: int = 0
    prompt_tokens: int = 0


class Assembler:
    """Joins traces into sequences.

    A request is skipped if its traces do not start with its prefill, have a gap, or hold features or logits that are
    not finite in `dtype` (logits of -inf, for impossible tokens, are allowed).

    Args:
        dtype: dtype of the logits that are kept.
        sample_rate: share of requests to take, by a hash of their ids.
        seed: of that hash.
        keep_rejected: also keep the first rejected draft at each position (the best one of a tree).

    Attributes:
        skipped, passed_over, opted_out: requests that were skipped, not sampled, or opted out.

    Raises:
        ValueError: a share out of (0, 1].
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float16,
        *,
        sample_rate: float = 1.0,
        seed: int = 0,
        keep_rejected: bool = False,
    ) -> None:
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], but got {sample_rate}; to learn nothing, do not learn")
        self._open: dict[int, _Open | None] = {}  # None: left out, and counted
        self._dtype, self._sample_rate, self._seed = dtype, sample_rate, seed
        self._keep_rejected = keep_rejected
        self._opted_out: set[int] = set()
        self.skipped = self.passed_over = self.opted_out = 0

    @property
    def open(self) -> int:
        """Number of requests that are being assembled."""
        return sum(request is not None for request in self._open.values())

    def counts(self) -> dict[str, int]:
        """Requests that were left out, by reason."""
        return {"skipped": self.skipped, "passed_over": self.passed_over, "opted_out": self.opted_out}

    def load_counts(self, counts: Mapping[str, int]) -> None:
        """Restore `counts`."""
        self.skipped, self.passed_over, self.opted_out = (
            counts[name] for name in ("skipped", "passed_over", "opted_out")
        )

    def opt_out(self, requests: Iterable[int]) -> None:
        """Keep nothing of these requests, by id, whether or not they have started."""
        for request in requests:
            self._opted_out.add(request)
            if self._open.get(request) is not None:
                self._open[request] = None
                self.opted_out += 1

    def forget(self) -> None:
        """Forget unfinished requests: the session is over, and ids start again."""
        self._open.clear()
        self._opted_out.clear()

    def add(self, traces: Iterable[Trace]) -> list[TrainingSequence]:
        """Add traces in the order of their rounds; returns the sequences of the requests that finished."""
        finished = []
        for trace in traces:
            paths = trace.path.tolist()
            for b, request in enumerate(trace.request_ids.tolist()):
                held = self._begin(request, prefill=trace.plan is None)
                if held is not None and not self._extend(held, trace, b, [row for row in paths[b] if row >= 0]):
                    held = self._open[request] = None
                    self.skipped += 1
                if request in trace.finished:
                    del self._open[request]
                    self._opted_out.discard(request)
                    if held is not None:
                        finished.append(self._sequence(held, trace.temperatures[b], trace.draft_version))
        return finished

    def _begin(self, request: int, prefill: bool) -> _Open | None:
        """The request so far; None: it is left out."""
        if request not in self._open or prefill:
            self._open[request] = _Open()
            if request in self._opted_out:
                self._open[request] = None
                self.opted_out += 1
            elif self._sample_rate < 1.0 and uniform_hash(request, self._seed) >= self._sample_rate:
                self._open[request] = None
                self.passed_over += 1
        return self._open[request]

    def _extend(self, held: _Open, trace: Trace, b: int, rows: list[int]) -> bool:
        """Add the accepted rows of request `b`; False: there is a gap before them, or they are not finite."""
        index = torch.tensor(rows)
        features, logits = trace.features[b][index], trace.logits[b][index].to(self._dtype)
        if held.known != int(trace.positions[b]) or not _is_finite(features, logits):
            return False
        if self._keep_rejected and trace.plan is not None:
            held.rejected += self._rejected(trace, b, rows, held.known)
        held.tokens.append(trace.tokens[b][index])
        held.features.append(features)
        held.logits.append(logits)
        held.known += len(rows)
        if trace.plan is None:
            held.prompt_tokens = held.known
        return True

    def _rejected(self, trace: Trace, b: int, path: list[int], start: int) -> list[tuple[int, int, Tensor]]:
        """The first rejected child of each row on the path: position of that row, token, logits [V]."""
        first: dict[int, int] = {}
        for row, parent in enumerate(trace.parents[b].tolist()):
            if row not in path and parent in path:
                first.setdefault(parent, row)
        rejected = []
        for depth, row in enumerate(path):
            if row in first:
                logits = trace.logits[b, first[row]].to(self._dtype)
                if bool(torch.isfinite(logits.amax())):
                    rejected.append((start + depth, int(trace.tokens[b, first[row]]), logits))
        return rejected

    def _sequence(self, held: _Open, temperature: float, version: int) -> TrainingSequence:
        logits, rejected = torch.cat(held.logits), None
        if self._keep_rejected:
            positions = torch.tensor([position for position, _, _ in held.rejected], dtype=torch.int64)
            tokens = torch.tensor([token for _, token, _ in held.rejected], dtype=torch.int64)
            after = torch.stack([row for _, _, row in held.rejected]) if held.rejected else logits[:0]
            rejected = RejectedDrafts(positions, tokens, after)
        return TrainingSequence(
            torch.cat(held.tokens).clone(),
            torch.cat(held.features),
            logits,
            temperature,
            version,
            held.prompt_tokens,
            rejected,
        )


def uniform_hash(request: int, seed: int) -> float:
    """A pseudo-random number in [0, 1) from both arguments (SplitMix64; Steele et al., 2014)."""
    x = (request + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = ((x ^ ((x % 2**64) >> shift)) * factor) % 2**64
    return x / 2**64


def _is_finite(features: Tensor, logits: Tensor) -> bool:
    """Whether features [n, 3H] are finite and every row of logits [n, V] is a distribution."""
    return bool(torch.isfinite(features).all()) and bool(torch.isfinite(logits.amax(-1)).all())


class Replay:
    """A replay buffer of the most recent sequences; newer ones are drawn more often.

    Args:
        capacity: sequences kept; the oldest is dropped first.
        half_life: number of newer sequences that halves the probability of being drawn.
        seed: of the draws.
        stale_half_life: number of newer draft versions that halves it as well; None: versions do not count.

    Attributes:
        dropped: number of sequences dropped for newer ones.

    Raises:
        ValueError: a capacity or half-life that is not positive.
    """

    def __init__(self, capacity: int, half_life: float, seed: int, stale_half_life: float | None = None) -> None:
        if capacity < 1 or not half_life > 0:
            raise ValueError(f"capacity and half_life must be positive, but got {capacity} and {half_life}")
        self._held: deque[TrainingSequence] = deque(maxlen=capacity)
        self._decay = 0.5 ** (1.0 / half_life)
        self._stale_half_life = stale_half_life
        self._rng = np.random.default_rng(seed)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[TrainingSequence]:
        return iter(self._held)

    def clear(self) -> None:
        """Remove all sequences; they do not count as dropped."""
        self._held.clear()

    def extend(self, sequences: Iterable[TrainingSequence]) -> None:
        """Add newer sequences."""
        for sequence in sequences:
            self.dropped += len(self._held) == self._held.maxlen
            self._held.append(sequence)

    def draw(self, count: int, version: int = 0) -> list[TrainingSequence]:
        """`count` sequences (fewer if fewer are held), without repeats, for a draft of this version."""
        size = len(self._held)
        weights = self._decay ** np.arange(size - 1, -1, -1.0)
        if self._stale_half_life is not None:
            behind = version - np.array([s.draft_version for s in self._held], dtype=np.float64)
            weights *= 0.5 ** ((behind - behind.min()) / self._stale_half_life)
        picks = self._rng.choice(size, min(count, size), replace=False, p=weights / weights.sum())
        return [self._held[i] for i in picks]

    def state_dict(self) -> dict[str, Any]:
        """The state without sequences, JSON-able."""
        return {"rng": self._rng.bit_generator.state, "dropped": self.dropped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._rng.bit_generator.state, self.dropped = state["rng"], state["dropped"]


def collate(sequences: list[TrainingSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right: tokens [B, T], features [B, T, 3H], valid [B, T] bool. Logits are too large to copy."""
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(s.tokens) for s in sequences])
    tokens = pad([s.tokens for s in sequences], batch_first=True)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens, pad([s.features for s in sequences], batch_first=True), valid


def next_tokens(sequences: list[TrainingSequence]) -> list[Tensor]:
    """[T - 1] int64 of each sequence: the token t + 2, which slot t predicts; -1 in the last slot, not known."""
    return [torch.nn.functional.pad(s.tokens[2:], (0, 1), value=-1) for s in sequences]


def chosen_by_target(sequences: list[TrainingSequence], inside: Tensor) -> Tensor:
    """[B, T] bool: slots whose next token was chosen by the target, not given in the prompt."""
    prompts = torch.tensor([s.prompt_tokens for s in sequences])[:, None]
    return inside & (torch.arange(inside.shape[1]) + 2 >= prompts)
