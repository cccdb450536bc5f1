"""What rounds came to: tokens, seconds by part and drafts that stood, summed over a stretch of rounds of one plan.

Every sum is of one stretch (a block of a measurement, or the time between two lines of a log), so that whoever reads
them can give an interval: the stretches are what varies.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from specrl.core.round import Round

WINDOW = 64  # rounds of a stretch of live traffic


@dataclass(slots=True)
class RoundSums:
    """Rounds of one plan, added up."""

    rounds: int = 0
    verified: int = 0  # requests x rounds
    tokens: int = 0  # committed and kept, of all requests
    plain_s: float = 0.0  # that plain decoding would have taken for these tokens; 0 where nobody knows
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    stood: list[int] = field(default_factory=list)  # [num_steps], requests x rounds whose drafts stood to position k

    def add(self, done: Round, plain_s: float = 0.0) -> None:
        """Take a round; `plain_s`: a plain step at its batch size and context."""
        self.rounds += 1
        self.verified += done.batch_size
        tokens = int(done.tokens.sum())
        self.tokens += tokens
        self.plain_s += tokens / done.batch_size * plain_s
        self.draft_s += done.draft_s
        self.verify_s += done.verify_s
        self.other_s += done.other_s
        if len(self.stood) < done.plan.num_steps:
            self.stood += [0] * (done.plan.num_steps - len(self.stood))
        reached = done.histogram()[::-1].cumsum()[::-1].tolist()  # with at least 0, 1, .. correct drafts
        for position in range(done.plan.num_steps):
            self.stood[position] += reached[position + 1]

    def row(self) -> dict[str, object]:
        """As a row of CSV: 'stood_1' is the first draft's."""
        row: dict[str, object] = {"rounds": self.rounds, "verified": self.verified, "tokens": self.tokens}
        row |= {name: round(getattr(self, name), 7) for name in ("plain_s", "draft_s", "verify_s", "other_s")}
        return row | {f"stood_{position}": count for position, count in enumerate(self.stood, 1)}


class Windows:
    """Sums of live rounds by batch size and plan, of at most `WINDOW` rounds each.

    Args:
        then: is handed every round too.
    """

    def __init__(self, then: Callable[[Round, float], None] | None = None) -> None:
        self._then, self._sums = then, dict[tuple[int, str], list[RoundSums]]()

    def take(self, done: Round, plain_s: float) -> None:
        """Take a round and the seconds of a plain step there."""
        stretches = self._sums.setdefault((done.batch_size, str(done.plan)), [RoundSums()])
        if stretches[-1].rounds == WINDOW:
            stretches.append(RoundSums())
        stretches[-1].add(done, plain_s)
        if self._then is not None:
            self._then(done, plain_s)

    def rows(self, requests: int) -> list[dict[str, object]]:
        """What came in since the last call, `requests` served by now."""
        out = [
            {"requests": requests, "batch_size": batch, "plan": plan, **sums.row()}
            for (batch, plan), stretches in sorted(self._sums.items())
            for sums in stretches
        ]
        self._sums.clear()
        return out


def read_windows(directory: Path, requests: int) -> list[dict[str, object]]:
    """The rows of a directory's windows.csv up to `requests` served: what a resumed run goes on from."""
    path = directory / "windows.csv"
    if requests == 0 or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file) if int(row["requests"]) <= requests]
