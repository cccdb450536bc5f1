"""The observation of a plan chooser: a few numbers that any serving engine knows. Python and NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.checks import require
from specrl.core.plan import Plan
from specrl.core.round import Round

MEMORY = 50.0  # rounds after which an average has forgotten all but 1/e
MIN_COST_STEP = 0.1  # smallest weight of a new cost in its average
MAX_CONTEXT = 1 << 20
MAX_COST = 16.0  # a round's seconds over plain decoding's; larger ratios are clipped
MAX_AGE = (1 << 20) - 1
BATCH_OCTAVES, CONTEXT_OCTAVES, AGE_OCTAVES = 10.0, 20.0, 20.0  # log2 of the values that are shown as 1
COST_OCTAVES = math.log2(MAX_COST)


class Layout(NamedTuple):
    """The number of entries of `Observation.vector`, and the slices of its parts after the first five entries."""

    size: int
    survival: slice
    costs: slice
    tried: slice
    last_plan: slice

    @classmethod
    def of(cls, steps: int, plans: int) -> Layout:
        """The layout for a largest num_steps of `steps` and a number of plans."""
        ends = [5, 5 + steps, *(5 + steps + (part + 1) * plans for part in range(3))]
        return cls(ends[-1], *map(slice, ends, ends[1:]))


class Observation(NamedTuple):
    """The state before a round, as a vector and under names. Measured entries have a neutral value at first.

    Attributes:
        batch_size: live requests, 1 .. 1024.
        context: mean tokens known per live request.
        values: the entries of `vector`.
        steps: K, the largest num_steps of the plans.
    """

    batch_size: int
    context: float
    values: list[float]
    steps: int

    def vector(self) -> NDArray[np.float32]:
        """Return [5 + K + 3 * plans] float32; log-ratios of costs are in [-4, 4], all other entries in [0, 1].

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
        return round(2.0 ** (AGE_OCTAVES * self.values[3])) - 1

    @property
    def survival(self) -> tuple[float, ...]:
        """K values: the share of recent rounds that accepted k drafts, of those that proposed them; starts at 0."""
        return tuple(self.values[self._layout.survival])

    @property
    def costs(self) -> tuple[float, ...]:
        """Recent seconds of each plan's rounds over plain decoding's at this batch size; starts at 1."""
        return tuple(2.0**octaves for octaves in self.values[self._layout.costs])

    @property
    def tried(self) -> tuple[float, ...]:
        """1 for each plan whose cost was measured at this batch size, else 0."""
        return tuple(self.values[self._layout.tried])

    @property
    def last_plan(self) -> int:
        """Index of the last round's plan; starts at 0."""
        return self.values[self._layout.last_plan].index(1.0)

    @property
    def _layout(self) -> Layout:
        return Layout.of(self.steps, (len(self.values) - 5 - self.steps) // 3)


def vector_bounds(plans: Sequence[Plan]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the lowest and highest values of `Observation.vector` for these plans."""
    layout = Layout.of(max((plan.num_steps for plan in plans), default=0), len(plans))
    low = np.zeros(layout.size, dtype=np.float32)
    high = np.ones_like(low)
    low[layout.costs], high[layout.costs] = -COST_OCTAVES, COST_OCTAVES
    return low, high


class Observer:
    """Keeps the recent averages of an observation.

    Args:
        plans: the plans to choose from, in the order of the actions.
        memory: rounds after which an average has forgotten all but 1/e, at least 1.
    """

    def __init__(self, plans: Sequence[Plan], memory: float = MEMORY) -> None:
        require(memory >= 1.0, "memory", "at least 1 round", memory)
        self.plans = tuple(plans)
        self._index = {plan: i for i, plan in enumerate(self.plans)}
        self._steps = max((plan.num_steps for plan in self.plans), default=0)
        self._keep = math.exp(-1.0 / memory)
        self.reset()

    def reset(self) -> None:
        """Forget all rounds."""
        self._correct = self._weight = 0.0  # discounted sums: mean correct drafts, rounds
        self._survived = [0.0] * self._steps
        self._proposed = [0.0] * self._steps
        self._costs: dict[int, tuple[list[float], list[float]]] = {}  # batch size -> log2 ratios, tried; by plan
        self._last, self._age, self._version = 0, 0, -1

    def record(self, done: Round, plain_s: float) -> None:
        """Add a finished round; `plain_s`: t0, seconds of a plain decoding step at its batch size and context."""
        # Plain Python is faster than NumPy on a dozen numbers, and this runs between rounds of few milliseconds.
        keep, correct = self._keep, done.correct_drafts.tolist()
        share = 1.0 / len(correct)
        self._correct = self._correct * keep + sum(correct) * share
        self._weight = self._weight * keep + 1.0
        for k, reached in enumerate(done.reached()[1:]):
            self._survived[k] = self._survived[k] * keep + reached * share
            self._proposed[k] = self._proposed[k] * keep + 1.0
        ratio = min(max(math.log2(max(done.seconds, 1e-9) / plain_s), -COST_OCTAVES), COST_OCTAVES)
        costs, tried = self._costs_at(len(correct))
        index = self._index[done.plan]
        costs[index] += (max(1.0 - keep, MIN_COST_STEP) if tried[index] else 1.0) * (ratio - costs[index])
        tried[index] = 1.0
        self._age = min(self._age + 1, MAX_AGE) if done.draft_version == self._version else 0
        self._last, self._version = index, done.draft_version

    def observe(self, batch_size: int, context: float) -> Observation:
        """Return the observation before a round of `batch_size` requests with `context` tokens on average."""
        costs, tried = self._costs_at(batch_size)
        steps = self._steps
        values = [
            math.log2(batch_size) / BATCH_OCTAVES,
            math.log2(max(context, 1.0)) / CONTEXT_OCTAVES,
            self._correct / (self._weight * steps) if self._weight and steps else 0.0,
            math.log2(1.0 + self._age) / AGE_OCTAVES,
            1.0,
            *[s / p if p else 0.0 for s, p in zip(self._survived, self._proposed, strict=True)],
            *costs,
            *tried,
            *[float(index == self._last) for index in range(len(costs))],
        ]
        return Observation(batch_size, context, values, steps)

    def _costs_at(self, batch_size: int) -> tuple[list[float], list[float]]:
        if batch_size not in self._costs:
            self._costs[batch_size] = [0.0] * len(self.plans), [0.0] * len(self.plans)
        return self._costs[batch_size]
