"""Keeps a learner from diverging: updates that are not finite are refused, and good weights come back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class Guard:
    """Counts what is not finite, and holds a copy of the last good weights: those of the running average, which serves.

    Args:
        parameters: that are learnt.
        served: their running average.
        optimizer: of the parameters; it begins anew after a rollback.
        patience: refused updates in a row after which the good weights return.

    Attributes:
        good: the weights remembered.

    Raises:
        ValueError: weights that are not finite to begin with.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        served: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        patience: int,
    ) -> None:
        self._parameters, self._served = parameters, served
        self._optimizer, self._patience = optimizer, patience
        self.bad = self.rollbacks = self._in_a_row = 0
        broken = [name for name, tensor in served.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"a learner's weights must be finite, but {broken[0]} is not; begin from another draft")
        self.keep()

    def admits(self, loss: float, gradient_norm: float) -> bool:
        """Whether an update with these may be made."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._in_a_row = 0
            return True
        self.bad += 1
        self._in_a_row += 1
        if self._in_a_row >= self._patience:
            self.roll_back()
        return False

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the served weights of now; if one is not finite, go on remembering the earlier ones."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in self._served.values()):
            self.good = {name: tensor.clone() for name, tensor in self._served.items()}

    @torch.no_grad()
    def roll_back(self) -> None:
        """Return to the weights remembered, to learn from and to serve, and forget the optimiser's moments."""
        for name, good in self.good.items():
            self._parameters[name].copy_(good)
            self._served[name].copy_(good)
        self._optimizer.state.clear()
        self.rollbacks += 1
        self._in_a_row = 0
