"""The weights of a learner: the trained ones, their moving average, and the last good average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig

_COUNTS = ("updates", "bad_updates", "rollbacks")


class LearnedWeights:
    """Trained weights, their moving average, which serves, and the last good average.

    Args:
        tensors: initial weights, float32, by name; they are copied.
        config: of the optimiser, the average, and the number of bad updates that is allowed.

    Attributes:
        parameters, averages, good: the three by name.
        optimizer: AdamW, with weight decay on matrices only.
        updates, bad_updates, rollbacks: number of good updates, updates that were not finite, and restorations.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: LearnerConfig) -> None:
        self.parameters = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        self.averages = {name: t.clone() for name, t in tensors.items()}
        groups = [
            {"params": [p for p in self.parameters.values() if p.ndim == 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self._ema_decay, self._max_bad_updates = config.ema_decay, config.max_bad_updates
        self.updates = self.bad_updates = self.rollbacks = self._consecutive_bad_updates = 0
        self.snapshot()

    def admits(self, loss: float, gradient_norm: float) -> bool:
        """Return whether an update is finite; restore the good weights after too many in a row that are not."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self._consecutive_bad_updates = 0
            return True
        self.bad_updates += 1
        self._consecutive_bad_updates += 1
        if self._consecutive_bad_updates >= self._max_bad_updates:
            self.roll_back()
        return False

    @torch.no_grad()
    def step(self) -> None:
        """Make a step of the optimiser, and update the averages."""
        self.optimizer.step()
        self.updates += 1
        decay = min(self._ema_decay, self.updates / (self.updates + 10.0))  # smaller in the first updates
        for name, average in self.averages.items():
            average.lerp_(self.parameters[name], 1.0 - decay)

    def snapshot(self) -> None:
        """Save the present averages as good weights, if they are finite."""
        if all(bool(torch.isfinite(tensor).all()) for tensor in self.averages.values()):
            self.good = {name: tensor.clone() for name, tensor in self.averages.items()}

    @torch.no_grad()
    def roll_back(self) -> None:
        """Restore the good weights, in parameters and averages, and clear the optimiser's state."""
        for name, good in self.good.items():
            self.parameters[name].copy_(good)
            self.averages[name].copy_(good)
        self.optimizer.state.clear()
        self.rollbacks += 1
        self._consecutive_bad_updates = 0

    def state_dict(self, *, good: bool) -> dict[str, Any]:
        """Return the counts, and 'tensors' by name, with the good weights if `good` is set."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameters.{name}"] = parameter.detach()
            tensors[f"averages.{name}"] = self.averages[name]
            if good:
                tensors[f"good.{name}"] = self.good[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        return {"tensors": tensors, **{name: getattr(self, name) for name in _COUNTS}}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict` of the same draft, with its averages as good weights if it has no others."""
        tensors: Mapping[str, Tensor] = state["tensors"]
        for name, parameter in self.parameters.items():
            saved = tensors.get(f"parameters.{name}")
            shape = None if saved is None else tuple(saved.shape)
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"a learner's state must fit its draft: {name} is {tuple(parameter.shape)}, but got {shape}"
                )
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameters.{name}"])
            self.averages[name].copy_(tensors[f"averages.{name}"])
            self.good[name].copy_(tensors.get(f"good.{name}", self.averages[name]))
            if f"step.{name}" in tensors:
                moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {k: t.to(parameter.device, copy=True) for k, t in moments.items()}
        for name in _COUNTS:
            setattr(self, name, state[name])
