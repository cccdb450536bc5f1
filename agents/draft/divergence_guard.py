"""Keeps a learner from diverging: it refuses updates that are not finite, and restores good weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class DivergenceGuard:
    """Counts updates that are not finite, and keeps a copy of the last good weights.

    Args:
        parameters: the weights that are learnt.
        averages: their moving average, which is served.
        optimizer: of the parameters; its state is cleared when weights are restored.
        max_bad_updates: refused updates in a row before the good weights are restored.

    Attributes:
        good: the good weights, a copy of `averages`.
        bad_updates, rollbacks: number of refused updates, and of restorations.

    Raises:
        ValueError: the weights are not finite.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        averages: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        max_bad_updates: int,
    ) -> None:
        self._parameters, self._averages = parameters, averages
        self._optimizer, self._max_bad_updates = optimizer, max_bad_updates
        self.bad_updates = self.rollbacks = self._in_a_row = 0
        broken = [name for name, tensor in averages.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"a draft's weights must be finite, but {broken[0]} is not; start from another draft")
        self.snapshot()

    def admits(self, loss: float, gradient_norm: float) -> bool:
        """Whether the optimiser may make this update; restores the good weights after too many refusals in a row."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._in_a_row = 0
            return True
        self.bad_updates += 1
        self._in_a_row += 1
        if self._in_a_row >= self._max_bad_updates:
            self.roll_back()
        return False

    @torch.no_grad()
    def snapshot(self) -> None:
        """Remember the present averages as good weights, if they are finite."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in self._averages.values()):
            self.good = {name: tensor.clone() for name, tensor in self._averages.items()}

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restore the good weights, in parameters and averages, and clear the optimiser's state."""
        for name, good in self.good.items():
            self._parameters[name].copy_(good)
            self._averages[name].copy_(good)
        self._optimizer.state.clear()
        self.rollbacks += 1
        self._in_a_row = 0
