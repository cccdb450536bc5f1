"""How many requests are live: batch sizes over rounds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from specrl.core.checks import require


@dataclass(frozen=True, slots=True)
class Phase:
    """`rounds` rounds at `batch_size` live requests; both are at least 1."""

    batch_size: int
    rounds: int = 1

    def __post_init__(self) -> None:
        numbers = self.batch_size, self.rounds
        require(min(numbers) >= 1, "batch_size and rounds of traffic", "at least 1", numbers)


BatchSizes = int | str | Sequence[int] | Sequence[Phase]


def parse_traffic(text: str) -> tuple[Phase, ...]:
    """Read '16x96,4x24,1x24' (batch size x rounds, repeated) or '8'; raises ValueError for other forms."""
    phases = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", part.strip())
        if match is None:
            raise ValueError(f"traffic is written 'batch size x rounds', as in '16x96,4x24,1x24', but got {part!r}")
        phases.append(Phase(int(match[1]), int(match[2] or 1)))
    return tuple(phases)


def read_schedules(batch_size: BatchSizes) -> tuple[tuple[Phase, ...], ...]:
    """Return the schedules of batch sizes that an environment may have; each episode draws one of them.

    Args:
        batch_size: one size, several (a schedule each), a text for `parse_traffic`, or the phases of one schedule; at
            least one size, each at least 1.
    """
    if isinstance(batch_size, str):
        return (parse_traffic(batch_size),)
    sizes = [batch_size] if isinstance(batch_size, int | np.integer) else list(batch_size)
    require(len(sizes) > 0, "batch_size", "at least one size, such as 4 or [1, 4, 16]", batch_size)
    phases = tuple(size for size in sizes if isinstance(size, Phase))
    if len(phases) == len(sizes):
        return (phases,)
    return tuple((Phase(int(size)),) for size in sizes)  # type: ignore[call-overload]


def batch_sizes(phases: Sequence[Phase]) -> Iterator[int]:
    """Yield the batch size of each round, endlessly."""
    return cycle([phase.batch_size for phase in phases for _ in range(phase.rounds)])


def reached_bound(bounds: Collection[int], batch_size: int) -> int:
    """Return the largest of these lower bounds that a batch size reaches, or the least one if it reaches none."""
    return max((bound for bound in bounds if bound <= batch_size), default=min(bounds))
