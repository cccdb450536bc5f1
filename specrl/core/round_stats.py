"""The one statistic of rounds: sums that can be added, merged and turned into means.

Logs, live estimates, measurements and evaluations all use `RoundStats`. An interval needs several of them: rounds are
grouped into windows or blocks, and the groups are resampled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import Any

import numpy as np

from specrl.core.round import Round
from specrl.core.statistics import Interval, ratio_of_sums

WINDOW = 64  # rounds of a window of live traffic
BLOCK = 16  # rounds of a block; neighbouring rounds are alike, so intervals resample blocks
RECENT_BLOCKS = 25  # blocks of the recent statistics
_MIN_BLOCKS = 8  # blocks that an interval needs


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
        correct, tokens = done.correct_drafts.tolist(), sum(done.tokens.tolist())
        batch = len(correct)
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
        for counts in (self.proposed, self.accepted):
            counts += [0] * (done.plan.num_steps - len(counts))
        reached = batch  # requests whose first `position` drafts were accepted
        for position in range(done.plan.num_steps):
            reached -= correct.count(position)
            self.proposed[position] += batch
            self.accepted[position] += reached

    def merge(self, other: RoundStats) -> None:
        """Add the rounds of another statistic."""
        for entry in fields(self):
            mine, theirs = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, list):
                total = [a + b for a, b in zip_longest(mine, theirs, fillvalue=0)]
            else:
                total = mine + theirs
            setattr(self, entry.name, total)

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


class RecentStats:
    """The most recent rounds, as blocks of `BLOCK` rounds.

    Attributes:
        rounds: number of all rounds added, older ones included.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self._blocks: deque[RoundStats] = deque(maxlen=RECENT_BLOCKS)

    def add(self, done: Round, plain_s: float, thinking_s: float = 0.0) -> None:
        """Add one round (see `RoundStats.add`)."""
        if self.rounds % BLOCK == 0:
            self._blocks.append(RoundStats())
        self._blocks[-1].add(done, plain_s, thinking_s)
        self.rounds += 1

    @property
    def total(self) -> RoundStats:
        """The sums over the recent rounds: the last 385 to 400."""
        total = RoundStats()
        for block in self._blocks:
            total.merge(block)
        return total

    def intervals(self) -> tuple[Interval, Interval] | None:
        """95 % intervals of speedup and accept length, by resampling blocks; None: fewer than 8 full blocks.

        They show how much rounds vary. An error of the plain cost, which all rounds share, is not included.
        """
        if self.rounds < _MIN_BLOCKS * BLOCK:
            return None
        blocks = self._blocks
        return (
            _interval([b.plain_s for b in blocks], [b.seconds for b in blocks]),
            _interval([b.requests + sum(b.accepted) for b in blocks], [b.requests for b in blocks]),
        )

    def state_dict(self) -> dict[str, Any]:
        """The blocks, JSON-able."""
        return {"rounds": self.rounds, "blocks": [asdict(block) for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.rounds = state["rounds"]
        self._blocks = deque((RoundStats(**block) for block in state["blocks"]), maxlen=RECENT_BLOCKS)


def _interval(numerator: list[float], denominator: list[float]) -> Interval:
    return ratio_of_sums(numerator, denominator, resamples=1000, rng=np.random.default_rng(0))


class StatsByWindow:
    """Statistics of live rounds by batch size and plan, in windows of at most `WINDOW` rounds."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, str], list[RoundStats]] = {}

    def add(self, done: Round, plain_s: float, thinking_s: float = 0.0) -> None:
        """Add one round (see `RoundStats.add`)."""
        windows = self._windows.setdefault((done.batch_size, str(done.plan)), [RoundStats()])
        if windows[-1].rounds == WINDOW:
            windows.append(RoundStats())
        windows[-1].add(done, plain_s, thinking_s)

    def take_rows(self) -> list[dict[str, object]]:
        """A row for each window since the last call, with its batch size and plan; they are forgotten then."""
        rows = [
            {"batch_size": batch, "plan": plan, **window.row()}
            for (batch, plan), windows in sorted(self._windows.items())
            for window in windows
        ]
        self._windows.clear()
        return rows
