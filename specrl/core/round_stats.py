"""The one statistic of rounds: sums that can be added, merged and turned into means.

Logs, live estimates, measurements and evaluations all use `RoundStats`. An interval needs several of them: rounds are
grouped into windows or blocks, and the groups are resampled.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from specrl.core.round import Round

WINDOW = 64  # rounds of a window of live traffic


@dataclass(slots=True)
class RoundStats:
    """Sums over rounds.

    Attributes:
        rounds: number of rounds.
        requests: sum of batch sizes: one for each request and round.
        tokens: tokens committed, of all requests.
        tokens_per_request: sum of each round's mean tokens per request.
        plain_s: seconds that plain decoding would have taken for these tokens; 0 if it was not measured.
        draft_s, verify_s, other_s: seconds of the parts of the rounds.
        thinking_s: seconds that choosing plans took.
        prefill_s: seconds of prefills after the rounds; not in `seconds`.
        proposed: [num_steps] for each draft position k, the requests x rounds that proposed at least k + 1 drafts.
        accepted: [num_steps] for each draft position k, the requests x rounds that accepted at least k + 1 drafts.
    """

    rounds: int = 0
    requests: int = 0
    tokens: int = 0
    tokens_per_request: float = 0.0
    plain_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    thinking_s: float = 0.0
    prefill_s: float = 0.0
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, done: Round, plain_s: float = 0.0, thinking_s: float = 0.0) -> None:
        """Add one round.

        Args:
            done: the round.
            plain_s: seconds of a plain decoding step at its batch size and context.
            thinking_s: seconds that choosing its plan took.
        """
        batch, tokens, steps = done.batch_size, int(done.tokens.sum()), done.plan.num_steps
        self.rounds += 1
        self.requests += batch
        self.tokens += tokens
        self.tokens_per_request += tokens / batch
        self.plain_s += tokens / batch * plain_s
        self.draft_s += done.draft_s
        self.verify_s += done.verify_s
        self.other_s += done.other_s
        self.thinking_s += thinking_s
        self.prefill_s += done.prefill_s
        if steps:
            self._lengthen(steps)
            reached = done.histogram()[::-1].cumsum()[::-1].tolist()  # requests with at least 0, 1, .. correct drafts
            for position in range(steps):
                self.proposed[position] += batch
                self.accepted[position] += reached[position + 1]

    def merge(self, other: RoundStats) -> None:
        """Add the rounds of another statistic."""
        for name in ("rounds", "requests", "tokens", "tokens_per_request", "plain_s", "draft_s", "verify_s", "other_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.thinking_s += other.thinking_s
        self.prefill_s += other.prefill_s
        self._lengthen(len(other.proposed))
        for position, (proposed, accepted) in enumerate(zip(other.proposed, other.accepted, strict=True)):
            self.proposed[position] += proposed
            self.accepted[position] += accepted

    def _lengthen(self, steps: int) -> None:
        missing = steps - len(self.proposed)
        if missing > 0:
            self.proposed += [0] * missing
            self.accepted += [0] * missing

    @property
    def seconds(self) -> float:
        """Seconds of the rounds, choosing plans included and prefill excluded."""
        return self.draft_s + self.verify_s + self.other_s + self.thinking_s

    @property
    def speedup(self) -> float:
        """Speedup over plain decoding, Σ N · t0 / B ÷ Σ Δt; nan without rounds."""
        return self.plain_s / self.seconds if self.seconds else math.nan

    @property
    def round_s(self) -> float:
        """Mean seconds of a round; nan without rounds."""
        return self.seconds / self.rounds if self.rounds else math.nan

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and verification, the bonus token included; nan without rounds."""
        return 1.0 + sum(self.accepted) / self.requests if self.requests else math.nan

    def row(self) -> dict[str, object]:
        """The sums as a row of a CSV file; accepted_1 is the count of the first draft position."""
        row: dict[str, object] = {"rounds": self.rounds, "requests": self.requests, "tokens": self.tokens}
        row |= {name: round(getattr(self, name), 7) for name in ("plain_s", "draft_s", "verify_s", "other_s")}
        return row | {f"accepted_{position}": count for position, count in enumerate(self.accepted, 1)}


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
