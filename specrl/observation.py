"""What a chooser of plans sees: a few numbers that any serving engine knows when it decides. Python and NumPy only.

The same code runs in the environments and inside a serving engine. Everything measured starts neutral, so that
the first observation of an episode depends on the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.plan import Plan
from specrl.rounds import Round

MAX_BATCH_SIZE = 1024
MAX_CONTEXT = 1 << 20
MAX_COST = 16.0  # relative to plain; beyond it a plan is hopeless, whatever it accepts
MAX_AGE = 1 << 20
_MOST = math.log2(MAX_COST)


class Observation(NamedTuple):
    """What is known before a round. `vector` lays it out for function approximators.

    Attributes:
        batch_size: live requests, 1 .. 1024.
        context: mean tokens known per live request.
        accept_length: recent mean, bonus included, 1 .. 1 + K; starts at 1.
        survival: K values, recent share of rounds whose first k drafts were all accepted, among those that proposed
            k; 0 .. 1, starts at 0. K is the largest num_steps on offer.
        costs: by plan, recent seconds of each plan's round over plain decoding's, at this batch size; starts at 1.
        tried: by plan, 1 where that cost was measured at this batch size, else 0.
        last_plan: index of the last round's plan; starts at 0.
        draft_age: rounds since the draft's weights changed.
    """

    batch_size: int
    context: float
    accept_length: float
    survival: tuple[float, ...]
    costs: tuple[float, ...]
    tried: tuple[float, ...]
    last_plan: int
    draft_age: int

    def vector(self) -> NDArray[np.float32]:
        """[5 + K + 3 * plans] float32, every entry in [0, 1] but log-ratios of cost, which are in [-4, 4].

        In order: log2(batch) / 10, log2(context) / 20, (accept_length - 1) / K, log2(1 + draft_age) / 20,
        constant 1, survival [K], log2(costs) [plans], tried [plans], one-hot last plan [plans].
        """
        last = [0.0] * len(self.costs)
        last[self.last_plan] = 1.0
        values = [
            math.log2(self.batch_size) / 10.0,
            math.log2(max(self.context, 1.0)) / 20.0,
            (self.accept_length - 1.0) / max(len(self.survival), 1),
            math.log2(1.0 + self.draft_age) / 20.0,
            1.0,
            *self.survival,
            *map(math.log2, self.costs),
            *self.tried,
            *last,
        ]
        return np.array(values, dtype=np.float32)


def vector_bounds(plans: Sequence[Plan]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest values of `Observation.vector` for these plans."""
    steps, count = max((plan.num_steps for plan in plans), default=0), len(plans)
    low = np.zeros(5 + steps + 3 * count, dtype=np.float32)
    high = np.ones_like(low)
    costs = slice(5 + steps, 5 + steps + count)
    low[costs], high[costs] = -np.log2(MAX_COST), np.log2(MAX_COST)
    return low, high


class Observer:
    """Keeps the recent averages that an observation shows.

    Args:
        plans: on offer, in the order of the actions.
        memory: rounds after which an average has forgotten all but 1/e.
    """

    def __init__(self, plans: Sequence[Plan], memory: float = 50.0) -> None:
        if not memory >= 1.0:
            raise ValueError(f"memory must be at least 1 round, but got {memory}")
        self.plans = tuple(plans)
        self._index = {plan: i for i, plan in enumerate(self.plans)}
        self._steps = max((plan.num_steps for plan in self.plans), default=0)
        self._keep = math.exp(-1.0 / memory)
        self.reset()

    def reset(self) -> None:
        """Forget everything: neutral averages."""
        self._correct = self._weight = 0.0  # discounted sums: mean correct drafts, rounds
        self._survived = [0.0] * self._steps
        self._proposed = [0.0] * self._steps
        self._costs: dict[int, list[float | None]] = {}  # batch size -> running log2 ratio by plan; None: untried
        self._last, self._age, self._version = 0, 0, -1

    def record(self, done: Round, plain_s: float) -> None:
        """Take a finished round and the plain cost t0 (seconds a round) at its batch size and context.

        In plain Python: this runs between rounds of a few milliseconds, where NumPy on a dozen numbers is slower.
        """
        keep, correct = self._keep, done.correct_drafts.tolist()
        share = 1.0 / len(correct)
        self._correct = self._correct * keep + sum(correct) * share
        self._weight = self._weight * keep + 1.0
        steps = done.plan.num_steps
        if steps:
            counts = [0] * (steps + 1)
            for c in correct:
                counts[c] += 1
            reached = len(correct)
            for k in range(steps):
                reached -= counts[k]
                self._survived[k] = self._survived[k] * keep + reached * share
                self._proposed[k] = self._proposed[k] * keep + 1.0
        ratio = min(max(math.log2(max(done.seconds, 1e-9) / plain_s), -_MOST), _MOST)
        costs = self._costs.setdefault(done.batch_size, [None] * len(self.plans))
        index = self._index[done.plan]
        before = costs[index]
        costs[index] = ratio if before is None else before + max(1.0 - keep, 0.1) * (ratio - before)
        self._age = min(self._age + 1, MAX_AGE) if done.draft_version == self._version else 0
        self._last, self._version = index, done.draft_version

    def observe(self, batch_size: int, context: float) -> Observation:
        """What is known before the next round of `batch_size` requests at mean `context` tokens."""
        costs = self._costs.get(batch_size) or [None] * len(self.plans)
        return Observation(
            batch_size=batch_size,
            context=float(context),
            accept_length=1.0 + (self._correct / self._weight if self._weight else 0.0),
            survival=tuple([s / p if p else 0.0 for s, p in zip(self._survived, self._proposed, strict=True)]),
            costs=tuple([1.0 if cost is None else 2.0**cost for cost in costs]),
            tried=tuple([0.0 if cost is None else 1.0 for cost in costs]),
            last_plan=self._last,
            draft_age=self._age,
        )
