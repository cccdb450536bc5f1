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

from specrl.core.plan import Plan
from specrl.core.round import Round

MAX_CONTEXT = 1 << 20
MAX_COST = 16.0  # relative to plain; beyond it a plan is hopeless, whatever it accepts
MAX_AGE = (1 << 20) - 1
_MOST = math.log2(MAX_COST)


class Observation(NamedTuple):
    """What is known before a round: numbers for function approximators, under names for everyone else.

    Attributes:
        batch_size: live requests, 1 .. 1024.
        context: mean tokens known per live request.
        values: what `vector` holds.
        steps: K, the largest num_steps on offer.
    """

    batch_size: int
    context: float
    values: list[float]
    steps: int

    def vector(self) -> NDArray[np.float32]:
        """[5 + K + 3 * plans] float32, every entry in [0, 1] but log-ratios of cost, which are in [-4, 4].

        In order: log2(batch) / 10, log2(context) / 20, (accept_length - 1) / K, log2(1 + draft_age) / 20,
        constant 1, survival [K], log2(costs) [plans], tried [plans], one-hot last plan [plans].
        """
        return np.array(self.values, dtype=np.float32)

    @property
    def accept_length(self) -> float:
        """Recent mean tokens per request and round, bonus included, 1 .. 1 + K; starts at 1."""
        return 1.0 + self.values[2] * max(self.steps, 1)

    @property
    def draft_age(self) -> int:
        """Rounds since the draft's weights changed; starts at 0."""
        return round(2.0 ** (20.0 * self.values[3])) - 1

    @property
    def survival(self) -> tuple[float, ...]:
        """K values: recent share of rounds whose first k drafts stood, among those that proposed k; starts at 0."""
        return tuple(self.values[5 : 5 + self.steps])

    @property
    def costs(self) -> tuple[float, ...]:
        """By plan, recent seconds of its round over plain decoding's, at this batch size; starts at 1."""
        return tuple(2.0**octaves for octaves in self._by_plan(0))

    @property
    def tried(self) -> tuple[float, ...]:
        """By plan, 1 where that cost was measured at this batch size, else 0."""
        return tuple(self._by_plan(1))

    @property
    def last_plan(self) -> int:
        """Index of the last round's plan; starts at 0."""
        return self._by_plan(2).index(1.0)

    def _by_plan(self, part: int) -> list[float]:
        first = 5 + self.steps
        count = (len(self.values) - first) // 3
        return self.values[first + part * count : first + (part + 1) * count]


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
        self._costs: dict[int, tuple[list[float], list[float]]] = {}  # batch size -> log2 ratios, tried; by plan
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
            reached = len(correct)
            for k in range(steps):
                reached -= correct.count(k)
                self._survived[k] = self._survived[k] * keep + reached * share
                self._proposed[k] = self._proposed[k] * keep + 1.0
        ratio = min(max(math.log2(max(done.seconds, 1e-9) / plain_s), -_MOST), _MOST)
        costs, tried = self._of(len(correct))
        index = self._index[done.plan]
        costs[index] += (max(1.0 - keep, 0.1) if tried[index] else 1.0) * (ratio - costs[index])
        tried[index] = 1.0
        self._age = min(self._age + 1, MAX_AGE) if done.draft_version == self._version else 0
        self._last, self._version = index, done.draft_version

    def observe(self, batch_size: int, context: float) -> Observation:
        """What is known before the next round of `batch_size` requests at mean `context` tokens."""
        costs, tried = self._of(batch_size)
        steps = self._steps
        last = [0.0] * len(costs)
        last[self._last] = 1.0
        values = [
            math.log2(batch_size) / 10.0,
            math.log2(max(context, 1.0)) / 20.0,
            self._correct / (self._weight * steps) if self._weight and steps else 0.0,
            math.log2(1.0 + self._age) / 20.0,
            1.0,
            *[s / p if p else 0.0 for s, p in zip(self._survived, self._proposed, strict=True)],
            *costs,
            *tried,
            *last,
        ]
        return Observation(batch_size, context, values, steps)

    def _of(self, batch_size: int) -> tuple[list[float], list[float]]:
        found = self._costs.get(batch_size)
        if found is None:
            found = self._costs[batch_size] = [0.0] * len(self.plans), [0.0] * len(self.plans)
        return found
