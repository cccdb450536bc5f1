"""The statistic of rounds for logs, live estimates and evaluation: sums, and groups of rounds for intervals."""

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
    """Sums over rounds. A request counts once for each round."""

    rounds: int = 0
    requests: int = 0  # sum of batch sizes
    tokens: int = 0  # committed, of all requests
    tokens_per_request: float = 0.0  # sum of each round's mean tokens per request
    plain_s: float = 0.0  # seconds that plain decoding would have taken for these tokens; 0 if not measured
    draft_s: float = 0.0
    verify_s: float = 0.0
    other_s: float = 0.0
    thinking_s: float = 0.0  # seconds that choosing plans took
    prefill_s: float = 0.0  # seconds of prefills after the rounds; not in `seconds`
    proposed: list[int] = field(default_factory=list)  # at index k: requests that proposed more than k drafts
    accepted: list[int] = field(default_factory=list)  # at index k: requests that accepted more than k drafts

    def add(self, done: Round, plain_s: float = 0.0, thinking_s: float = 0.0) -> None:
        """Add a round; `plain_s` is the seconds of a plain decoding step at its batch size and context."""
        batch, tokens = done.batch_size, sum(done.tokens.tolist())
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
        for position, reached in enumerate(done.reached()[1:]):
            self.proposed[position] += batch
            self.accepted[position] += reached

    def merge(self, other: RoundStats) -> None:
        """Add the rounds of another statistic."""
        for name in (entry.name for entry in fields(self)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if isinstance(ours, list):
                setattr(self, name, [a + b for a, b in zip_longest(ours, theirs, fillvalue=0)])
            else:
                setattr(self, name, ours + theirs)

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
        """Return the sums as a row of a CSV file; accepted_1 is the count of the first draft position."""
        row: dict[str, object] = {"rounds": self.rounds, "requests": self.requests, "tokens": self.tokens}
        row |= {name: round(getattr(self, name), 7) for name in ("plain_s", "draft_s", "verify_s", "other_s")}
        return row | {f"accepted_{position}": count for position, count in enumerate(self.accepted, 1)}


class RecentStats:
    """The most recent rounds, as blocks of `BLOCK` rounds."""

    def __init__(self) -> None:
        self.rounds = 0  # all that were added, including those that are not recent
        self._blocks: deque[RoundStats] = deque(maxlen=RECENT_BLOCKS)

    def add(self, done: Round, plain_s: float, thinking_s: float = 0.0) -> None:
        """Add one round (see `RoundStats.add`)."""
        if self.rounds % BLOCK == 0:
            self._blocks.append(RoundStats())
        self._blocks[-1].add(done, plain_s, thinking_s)
        self.rounds += 1

    @property
    def total(self) -> RoundStats:
        """Sums over the last 385 to 400 rounds."""
        total = RoundStats()
        for block in self._blocks:
            total.merge(block)
        return total

    def intervals(self) -> tuple[Interval, Interval] | None:
        """Return 95 % intervals of speedup and accept length, by resampling blocks; None: fewer than 8 full blocks.

        They show how much rounds vary. An error of the plain cost, which all rounds share, is not included.
        """
        if self.rounds < _MIN_BLOCKS * BLOCK:
            return None
        blocks, rng = self._blocks, np.random.default_rng
        plain_s, seconds = [b.plain_s for b in blocks], [b.seconds for b in blocks]
        tokens, requests = [b.requests + sum(b.accepted) for b in blocks], [b.requests for b in blocks]
        return (
            ratio_of_sums(plain_s, seconds, resamples=1000, rng=rng(0)),
            ratio_of_sums(tokens, requests, resamples=1000, rng=rng(0)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the blocks, JSON-able."""
        return {"rounds": self.rounds, "blocks": [asdict(block) for block in self._blocks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.rounds = state["rounds"]
        self._blocks = deque((RoundStats(**block) for block in state["blocks"]), maxlen=RECENT_BLOCKS)


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
        """Return a row for each window since the last call, with its batch size and plan."""
        rows = [
            {"batch_size": batch, "plan": plan, **window.row()}
            for (batch, plan), windows in sorted(self._windows.items())
            for window in windows
        ]
        self._windows.clear()
        return rows
