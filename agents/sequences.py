"""From traces to training sequences: the accepted path of each request, joined round by round."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specrl.rounds import Trace


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


@dataclass(slots=True)
class _Open:
    tokens: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    known: int = 0


class Assembler:
    """Joins traces into sequences.

    A request that is not seen from its prefill on, or whose features or logits are not finite (in `dtype`; -inf, a
    token that never comes, is), is skipped, and counted in `skipped`.

    Args:
        dtype: that logits are kept in.
    """

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self._open: dict[int, _Open | None] = {}  # None: skipped, and counted already
        self._dtype = dtype
        self.skipped = 0

    def add(self, traces: Iterable[Trace]) -> list[Sequence]:
        """Take traces in the order of their rounds; the sequences of the requests that ended with them."""
        done = []
        for trace in traces:
            paths = trace.path.tolist()
            for b, request in enumerate(trace.request_ids.tolist()):
                rows = [row for row in paths[b] if row >= 0]
                start = int(trace.positions[b])
                if trace.plan is None:
                    self._open[request] = _Open()
                held = self._open.setdefault(request, _Open())
                if held is not None:
                    index = torch.tensor(rows)
                    features, logits = trace.features[b][index], trace.logits[b][index].to(self._dtype)
                    if held.known == start and _is_finite(features, logits):
                        held.tokens.append(trace.tokens[b][index])
                        held.features.append(features)
                        held.logits.append(logits)
                        held.known += len(rows)
                    else:
                        held = self._open[request] = None
                        self.skipped += 1
                if request in trace.finished:
                    del self._open[request]
                    if held is not None:
                        done.append(_sequence(held, trace.temperatures[b], trace.draft_version))
        return done


def _is_finite(features: Tensor, logits: Tensor) -> bool:
    """Whether features [n, 3H] are finite and logits [n, V] make distributions."""
    return bool(torch.isfinite(features).all()) and bool(torch.isfinite(logits.amax(-1)).all())


def _sequence(held: _Open, temperature: float, version: int) -> Sequence:
    return Sequence(
        torch.cat(held.tokens).clone(), torch.cat(held.features), torch.cat(held.logits), temperature, version
    )


class Replay:
    """The most recent sequences, drawn with more weight on the newer ones.

    Args:
        capacity: sequences kept; the oldest leaves first.
        half_life: how many sequences back the weight of a draw halves.
        seed: of the draws.
    """

    def __init__(self, capacity: int, half_life: float, seed: int) -> None:
        if capacity < 1 or not half_life > 0:
            raise ValueError(f"capacity and half_life must be positive, but got {capacity} and {half_life}")
        self._held: deque[Sequence] = deque(maxlen=capacity)
        self._decay = 0.5 ** (1.0 / half_life)
        self.rng = np.random.default_rng(seed)
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._held)

    def extend(self, sequences: Iterable[Sequence]) -> None:
        """Add newer sequences."""
        for sequence in sequences:
            self.dropped += len(self._held) == self._held.maxlen
            self._held.append(sequence)

    def draw(self, count: int) -> list[Sequence]:
        """`count` sequences (fewer if fewer are held), without repeats."""
        size = len(self._held)
        weights = self._decay ** np.arange(size - 1, -1, -1.0)
        picks = self.rng.choice(size, min(count, size), replace=False, p=weights / weights.sum())
        return [self._held[i] for i in picks]


def collate(sequences: list[Sequence]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad on the right: tokens [B, T], features [B, T, 3H], logits [B, T, V], valid [B, T] bool."""
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(s.tokens) for s in sequences])
    tokens = pad([s.tokens for s in sequences], batch_first=True)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    features = pad([s.features for s in sequences], batch_first=True)
    logits = pad([s.logits for s in sequences], batch_first=True)
    return tokens, features, logits, valid
