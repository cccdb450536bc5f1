"""How many requests are live: batch sizes over rounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of `rounds` rounds at `batch_size` live requests.

    Raises:
        ValueError: either is below 1.
    """

    batch_size: int
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.rounds < 1:
            raise ValueError(
                f"batch_size and rounds of traffic must be at least 1, but got {self.batch_size} x {self.rounds}"
            )


def parse_traffic(text: str) -> tuple[Phase, ...]:
    """Read '16x96,4x24,1x24' (batch size x rounds, repeated for ever) or '8'.

    Raises:
        ValueError: another form, or a number below 1.
    """
    phases = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", part.strip())
        if match is None:
            raise ValueError(f"traffic is written 'batch size x rounds', as in '16x96,4x24,1x24', but got {part!r}")
        phases.append(Phase(int(match[1]), int(match[2] or 1)))
    return tuple(phases)


def batch_sizes(phases: Sequence[Phase]) -> Iterator[int]:
    """The batch size of each round, endlessly."""
    while True:
        for phase in phases:
            for _ in range(phase.rounds):
                yield phase.batch_size
