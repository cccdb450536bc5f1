"""`specrl.core.observation.Observer` for N environments at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specrl.core.observation import (
    AGE_OCTAVES,
    BATCH_OCTAVES,
    CONTEXT_OCTAVES,
    COST_OCTAVES,
    MEMORY,
    MIN_COST_STEP,
    Layout,
)
from specrl.core.plan import Plan
from specrl.simulation.vector import Rounds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class VectorObserver:
    """Keeps the recent averages of `count` observations of these plans; `sizes` are the batch sizes that occur."""

    def __init__(self, plans: Sequence[Plan], sizes: Sequence[int], count: int) -> None:
        self._plans, self._steps, self._count = len(plans), max(p.num_steps for p in plans), count
        self._keep = math.exp(-1.0 / MEMORY)
        self._layout = Layout.of(self._steps, self._plans)
        proposes = np.arange(self._steps)[:, None] < np.array([p.num_steps for p in plans])
        self._proposes = proposes.astype(np.float32)  # [K, plans]
        self._fades = np.where(proposes, self._keep, 1.0).astype(np.float32)  # [K, plans]
        self._log_size = np.log2(sizes).astype(np.float32) / np.float32(BATCH_OCTAVES)
        self._sizes = len(sizes)
        self._one_hot = np.eye(len(plans), dtype=np.float32)
        self._row = np.arange(count)
        self._correct, self._weight = np.zeros((2, count))
        self._survived, self._proposed = np.zeros((2, self._steps, count), dtype=np.float32)
        self._costs = np.zeros((count * len(sizes), 2 * len(plans)), dtype=np.float32)  # log2 ratios, then tried
        self._last, self._age = np.zeros((2, count), dtype=np.int64)
        self._state = [  # views of all of these, with the environments first
            *(self._correct, self._weight, self._last, self._age),
            *(self._survived.T, self._proposed.T, self._costs.reshape(count, -1)),
        ]

    def reset(self, which: Ints) -> None:
        """Forget all rounds of these environments."""
        for array in self._state:
            array[which] = 0

    def record(self, plan: Ints, size: Ints, live: Ints, done: Rounds, plain_s: Floats, *, skip: Ints) -> None:
        """Add a round of every environment except those to `skip`; the arguments are those before the round."""
        skipped = [array[skip] for array in self._state]
        keep, share = self._keep, 1.0 / live
        self._correct *= keep
        self._correct += done.correct * share
        self._weight *= keep
        self._weight += 1.0
        fades = self._fades.take(plan, axis=1)
        self._survived *= fades
        self._survived += done.reached * share.astype(np.float32)
        self._proposed *= fades
        self._proposed += self._proposes.take(plan, axis=1)
        ratio = np.clip(np.log2(np.maximum(done.seconds, 1e-9) / plain_s), -COST_OCTAVES, COST_OCTAVES)
        flat, cell = self._costs.reshape(-1), (self._row * self._sizes + size) * (2 * self._plans) + plan
        before, tried = flat.take(cell), flat.take(cell + self._plans)
        flat[cell] = before + np.where(tried > 0, max(1.0 - keep, MIN_COST_STEP), 1.0) * (ratio - before)
        flat[cell + self._plans] = 1.0
        self._last[:] = plan
        self._age += 1
        for array, values in zip(self._state, skipped, strict=True):
            array[skip] = values

    def observe(self, size: Ints, context: Floats) -> NDArray[np.float32]:
        """Return [N, 5 + K + 3 * plans] float32, as `Observation.vector`."""
        layout = self._layout
        out = np.empty((self._count, layout.size), dtype=np.float32)
        out[:, 0] = self._log_size.take(size)
        out[:, 1] = np.log2(np.maximum(context, 1.0)) / CONTEXT_OCTAVES
        out[:, 2] = self._correct / (np.maximum(self._weight, 1e-9) * max(self._steps, 1))
        out[:, 3] = np.log2(np.maximum(self._age, 1)) / AGE_OCTAVES  # the draft never changes in simulation
        out[:, 4] = 1.0
        out[:, layout.survival] = (self._survived / np.maximum(self._proposed, 1e-9)).T
        costs_and_tried = slice(layout.costs.start, layout.tried.stop)
        out[:, costs_and_tried] = self._costs.take(self._row * self._sizes + size, axis=0)
        out[:, layout.last_plan] = self._one_hot.take(self._last, axis=0)
        return out
