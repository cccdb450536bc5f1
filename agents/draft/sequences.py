"""From traces to training sequences: the accepted path of each request, joined round by round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Trace


@dataclass(frozen=True, slots=True)
class Sequence:
    """One finished request as the target saw it: T positions whose next token is known.

    `logits[t]` is the target's distribution over `tokens[t + 1]`, `features[t]` its fused taps at `tokens[t]`.
    """

    tokens: Tensor  # [T] int64
    features: Tensor  # [T, 3H]
    logits: Tensor  # [T, V] float32 or float16
    temperature: float
    draft_version: int  # of its last round
    prompt_tokens: int = 0  # the first tokens, which the target did not choose
    rejected: Rejected | None = None  # None: not kept


@dataclass(frozen=True, slots=True)
class Rejected:
    """Drafts that fell, at most one for each position of a sequence, and what the target would have said after them."""

    positions: Tensor  # [R] int64, ascending: the last accepted token before the draft
    tokens: Tensor  # [R] int64, the draft, in place of `Sequence.tokens[positions + 1]`
    logits: Tensor  # [R, V], the target's distribution after it


@dataclass(slots=True)
class _Open:
    tokens: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    fallen: list[tuple[int, int, Tensor]] = field(default_factory=list)  # position, token, logits [V]
    known: int = 0
    prompt_tokens: int = 0


class Assembler:
    """Joins traces into sequences.

    A request that is not seen from its prefill on, or whose features or logits are not finite (in `dtype`; -inf, a
    token that never comes, is), is skipped, and counted in `skipped`. One that sampling passes over is counted in
    `passed_over`, one that opted out in `opted_out`; of neither is anything kept.

    Args:
        dtype: that logits are kept in.
        sample: the share of requests that is taken, by a hash of their ids.
        seed: of that hash.
        rejected: keep the first draft that fell at each position too (of a tree's, the best).

    Raises:
        ValueError: a share out of (0, 1].
    """

    def __init__(
        self, dtype: torch.dtype = torch.float16, *, sample: float = 1.0, seed: int = 0, rejected: bool = False
    ) -> None:
        if not 0 < sample <= 1:
            raise ValueError(f"sample must be in (0, 1], but got {sample}; to learn from nothing, do not learn")
        self._open: dict[int, _Open | None] = {}  # None: left out, and counted already
        self._dtype, self._sample, self._seed, self._rejected = dtype, sample, seed, rejected
        self._refusing: set[int] = set()
        self.skipped = self.passed_over = self.opted_out = 0

    @property
    def open(self) -> int:
        """Requests that are being assembled."""
        return sum(held is not None for held in self._open.values())

    def opt_out(self, requests: Iterable[int]) -> None:
        """Keep nothing of these requests, whether they are known already or yet to come."""
        for request in requests:
            self._refusing.add(request)
            if self._open.get(request) is not None:
                self._open[request] = None
                self.opted_out += 1

    def forget(self) -> None:
        """Throw away what is not finished: the session ended, and the ids of the next one begin anew."""
        self._open.clear()
        self._refusing.clear()

    def add(self, traces: Iterable[Trace]) -> list[Sequence]:
        """Take traces in the order of their rounds; the sequences of the requests that ended with them."""
        done = []
        for trace in traces:
            paths = trace.path.tolist()
            for b, request in enumerate(trace.request_ids.tolist()):
                held = self._begun(request, prefill=trace.plan is None)
                if held is not None and not self._extend(held, trace, b, [row for row in paths[b] if row >= 0]):
                    held = self._open[request] = None
                    self.skipped += 1
                if request in trace.finished:
                    del self._open[request]
                    self._refusing.discard(request)
                    if held is not None:
                        done.append(_sequence(held, trace.temperatures[b], trace.draft_version, self._rejected))
        return done

    def _begun(self, request: int, prefill: bool) -> _Open | None:
        """What is held of a request; None: it is left out."""
        if request not in self._open or prefill:
            self._open[request] = _Open()
            if request in self._refusing:
                self._open[request] = None
                self.opted_out += 1
            elif self._sample < 1.0 and uniform_hash(request, self._seed) >= self._sample:
                self._open[request] = None
                self.passed_over += 1
        return self._open[request]

    def _extend(self, held: _Open, trace: Trace, b: int, rows: list[int]) -> bool:
        """Add the accepted rows of request `b`; False: they do not follow, or are not finite."""
        index = torch.tensor(rows)
        features, logits = trace.features[b][index], trace.logits[b][index].to(self._dtype)
        if held.known != int(trace.positions[b]) or not _is_finite(features, logits):
            return False
        if self._rejected and trace.plan is not None:
            held.fallen += self._fallen(trace, b, rows, held.known)
        held.tokens.append(trace.tokens[b][index])
        held.features.append(features)
        held.logits.append(logits)
        held.known += len(rows)
        if trace.plan is None:
            held.prompt_tokens = held.known
        return True

    def _fallen(self, trace: Trace, b: int, path: list[int], start: int) -> list[tuple[int, int, Tensor]]:
        """The first row off the path under each row on it: position of that row, token, logits [V]."""
        first: dict[int, int] = {}
        for row, parent in enumerate(trace.parents[b].tolist()):
            if row not in path and parent in path:
                first.setdefault(parent, row)
        found = []
        for depth, row in enumerate(path):
            if row in first:
                logits = trace.logits[b, first[row]].to(self._dtype)
                if bool(torch.isfinite(logits.amax())):
                    found.append((start + depth, int(trace.tokens[b, first[row]]), logits))
        return found


def uniform_hash(request: int, seed: int) -> float:
    """A number in [0, 1) that depends on both arguments only (SplitMix64; Steele et al., 2014)."""
    x = (request + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = ((x ^ ((x % 2**64) >> shift)) * factor) % 2**64
    return x / 2**64


def _is_finite(features: Tensor, logits: Tensor) -> bool:
    """Whether features [n, 3H] are finite and logits [n, V] make distributions."""
    return bool(torch.isfinite(features).all()) and bool(torch.isfinite(logits.amax(-1)).all())


def _sequence(held: _Open, temperature: float, version: int, rejected: bool) -> Sequence:
    fallen = None
    logits = torch.cat(held.logits)
    if rejected:
        positions = torch.tensor([at for at, _, _ in held.fallen], dtype=torch.int64)
        tokens = torch.tensor([token for _, token, _ in held.fallen], dtype=torch.int64)
        after = torch.stack([row for _, _, row in held.fallen]) if held.fallen else logits[:0]
        fallen = Rejected(positions, tokens, after)
    return Sequence(
        torch.cat(held.tokens).clone(),
        torch.cat(held.features),
        logits,
        temperature,
        version,
        held.prompt_tokens,
        fallen,
    )


class Replay:
    """The most recent sequences, drawn with more weight on the newer ones.

    Args:
        capacity: sequences kept; the oldest leaves first.
        half_life: how many sequences back the weight of a draw halves.
        seed: of the draws.
        stale_half_life: how many draft versions behind it halves as well; None: staleness does not count.
    """

    def __init__(self, capacity: int, half_life: float, seed: int, stale_half_life: float | None = None) -> None:
        if capacity < 1 or not half_life > 0:
            raise ValueError(f"capacity and half_life must be positive, but got {capacity} and {half_life}")
        self._held: deque[Sequence] = deque(maxlen=capacity)
        self._decay = 0.5 ** (1.0 / half_life)
        self._stale_half_life = stale_half_life
        self.rng = np.random.default_rng(seed)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._held)

    def clear(self) -> None:
        """Hold nothing; what is thrown away so does not count as dropped."""
        self._held.clear()

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add newer sequences."""
        for sequence in sequences:
            self.dropped += len(self._held) == self._held.maxlen
            self._held.append(sequence)

    def draw(self, count: int, version: int = 0) -> list[Sequence]:
        """`count` sequences (fewer if fewer are held), without repeats, for a draft of this version."""
        size = len(self._held)
        weights = self._decay ** np.arange(size - 1, -1, -1.0)
        if self._stale_half_life is not None:
            behind = version - np.array([s.draft_version for s in self._held], dtype=np.float64)
            weights *= 0.5 ** ((behind - behind.min()) / self._stale_half_life)
        picks = self.rng.choice(size, min(count, size), replace=False, p=weights / weights.sum())
        return [self._held[i] for i in picks]


def collate(sequences: list[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right: tokens [B, T], features [B, T, 3H], valid [B, T] bool. Logits are too large to be copied."""
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(s.tokens) for s in sequences])
    tokens = pad([s.tokens for s in sequences], batch_first=True)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    return tokens, pad([s.features for s in sequences], batch_first=True), valid


def next_tokens(sequences: list[Sequence]) -> list[Tensor]:
    """[T - 1] int64 of each sequence: the token that slot t predicts, t + 2; -1 for the last, which is not known."""
    return [torch.nn.functional.pad(s.tokens[2:], (0, 1), value=-1) for s in sequences]


def chosen_by_target(sequences: list[Sequence], inside: Tensor) -> Tensor:
    """[B, T] bool: slots whose next token the target chose, and the prompt did not."""
    prompts = torch.tensor([s.prompt_tokens for s in sequences])[:, None]
    return inside & (torch.arange(inside.shape[1]) + 2 >= prompts)
