"""What a chooser of plans sees: a few numbers that any serving engine knows when it decides. NumPy only.

The same code runs in the environments and inside a serving engine. Everything measured starts neutral, so that
the first observation of an episode depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specrl.plan import Plan
from specrl.rounds import Round

MAX_BATCH_SIZE = 1024
MAX_CONTEXT = 1 << 20
MAX_COST = 16.0  # relative to plain; beyond it a plan is hopeless, whatever it accepts
MAX_AGE = 1 << 20


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known before a round. `vector` lays it out for function approximators.

    Attributes:
        batch_size: live requests, 1 .. 1024.
        context: mean tokens known per live request.
        accept_length: recent mean, bonus included, 1 .. 1 + K; starts at 1.
        survival: [K] recent share of rounds whose first k drafts were all accepted, among those that proposed
            k; 0 .. 1, starts at 0. K is the largest num_steps on offer.
        costs: [plans] recent seconds of each plan's round over plain decoding's, at this batch size; starts at 1.
        tried: [plans] 1 where that cost was measured at this batch size, else 0.
        last_plan: index of the last round's plan; starts at 0.
        draft_age: rounds since the draft's weights changed.
    """

    batch_size: int
    context: float
    accept_length: float
    survival: NDArray[np.float64]
    costs: NDArray[np.float64]
    tried: NDArray[np.float64]
    last_plan: int
    draft_age: int

    def vector(self) -> NDArray[np.float32]:
        """[5 + K + 3 * plans] float32, every entry in [0, 1] but log-ratios of cost, which are in [-4, 4].

        In order: log2(batch) / 10, log2(context) / 20, (accept_length - 1) / K, log2(1 + draft_age) / 20,
        constant 1, survival [K], log2(costs) [plans], tried [plans], one-hot last plan [plans].
        """
        steps = max(len(self.survival), 1)
        head = [
            np.log2(self.batch_size) / 10.0,
            np.log2(max(self.context, 1.0)) / 20.0,
            (self.accept_length - 1.0) / steps,
            np.log2(1.0 + self.draft_age) / 20.0,
            1.0,
        ]
        last = np.zeros(len(self.costs))
        last[self.last_plan] = 1.0
        return np.concatenate([head, self.survival, np.log2(self.costs), self.tried, last]).astype(np.float32)


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
        self._keep = float(np.exp(-1.0 / memory))
        self.reset()

    def reset(self) -> None:
        """Forget everything: neutral averages."""
        self._accepted = np.zeros(2)  # discounted sum of correct drafts, and weight
        self._survived = np.zeros((2, self._steps))
        self._costs: dict[int, NDArray[np.float64]] = {}  # batch size -> [plans] running log ratio, nan: untried
        self._last, self._age, self._version = 0, 0, -1

    def record(self, done: Round, plain_s: float) -> None:
        """Take a finished round and the plain cost t0 (seconds a round) at its batch size and context."""
        keep, steps = self._keep, done.plan.num_steps
        correct = done.correct_drafts
        self._accepted = self._accepted * keep + (correct.mean(), 1.0)
        if steps:
            reached = (correct[:, None] >= np.arange(1, steps + 1)).mean(0)
            self._survived[:, :steps] *= keep
            self._survived[0, :steps] += reached
            self._survived[1, :steps] += 1.0
        ratio = float(np.clip(np.log2(done.seconds / plain_s), -4.0, 4.0))
        costs = self._costs.setdefault(done.batch_size, np.full(len(self.plans), np.nan))
        index = self._index[done.plan]
        step = 1.0 - keep if np.isfinite(costs[index]) else 1.0
        costs[index] = ratio if step == 1.0 else costs[index] + max(step, 0.1) * (ratio - costs[index])
        self._age = self._age + 1 if done.draft_version == self._version else 0
        self._last, self._version = index, done.draft_version

    def observe(self, batch_size: int, context: float) -> Observation:
        """What is known before the next round of `batch_size` requests at mean `context` tokens."""
        costs = self._costs.get(batch_size, np.full(len(self.plans), np.nan))
        tried = np.isfinite(costs)
        weight = self._accepted[1]
        return Observation(
            batch_size=batch_size,
            context=float(context),
            accept_length=1.0 + (self._accepted[0] / weight if weight else 0.0),
            survival=np.divide(
                self._survived[0], self._survived[1], out=np.zeros(self._steps), where=self._survived[1] > 0
            ),
            costs=np.exp2(np.where(tried, costs, 0.0)),
            tried=tried.astype(np.float64),
            last_plan=self._last,
            draft_age=min(self._age, MAX_AGE),
        )
