"""What a round costs: seconds by batch size and plan, robustly averaged in log space. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specrl.plan import Plan

_NOISE = 0.12  # log standard deviation of one round's seconds until it is known better
_STEP = 0.15  # what one draft step is taken to add, relative to plan 0, before it is measured
_GUESS = 0.35  # log standard deviation of such a guess
_SPIKE = 0.6  # a round more than this above the mean in log seconds is a hiccup, unless it recurs


@dataclass(slots=True)
class Cell:
    """Running log seconds of one plan at one batch size."""

    mean: float
    variance: float = _NOISE**2
    weight: float = 1.0
    seen: int = 0  # the clock of the last visit
    odd: int = 0  # hiccups in a row


class Costs:
    """T(batch size, plan).

    Args:
        plans: on offer.
        memory: rounds of a plan at a batch size after which a cost has faded to 1/e.
        drift: log standard deviation that a cost may have moved by for every thousand rounds unseen.
    """

    def __init__(self, plans: Sequence[Plan], memory: float = 100.0, drift: float = 0.05) -> None:
        self.plans, self._keep, self._drift = tuple(plans), math.exp(-1.0 / memory), drift
        self._cells: dict[tuple[int, Plan], Cell] = {}
        self.rounds = 0

    def learn(self, batch_size: int, plan: Plan, seconds: float) -> None:
        """Take the seconds of a round."""
        self.rounds += 1
        x, key = math.log(seconds), (batch_size, plan)
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = Cell(x, seen=self.rounds)
            return
        cell.seen = self.rounds
        if x - cell.mean > _SPIKE and cell.odd < 3:
            cell.odd += 1
            return
        if cell.odd >= 3 or cell.mean - x > _SPIKE:  # it recurs, or the first visit was the hiccup: begin anew
            cell.mean, cell.weight, cell.variance, cell.odd = x, 1.0, _NOISE**2, 0
            return
        cell.odd = 0
        cell.weight = cell.weight * self._keep + 1.0
        step, error = 1.0 / cell.weight, x - cell.mean
        cell.mean += step * error
        cell.variance += step * (error**2 - cell.variance) if cell.weight > 5 else 0.0

    def tried(self, batch_size: int, plan: Plan) -> float:
        """Weight of the evidence; 0 where there is none."""
        cell = self._cells.get((batch_size, plan))
        return 0.0 if cell is None else cell.weight

    def unseen(self, batch_size: int, plan: Plan) -> int:
        """Rounds since the plan last ran at this batch size."""
        cell = self._cells.get((batch_size, plan))
        return self.rounds if cell is None else self.rounds - cell.seen

    def log_seconds(self, batch_size: int, plan: Plan) -> tuple[float, float]:
        """Mean and standard deviation of our belief about log T."""
        cell = self._cells.get((batch_size, plan))
        if cell is None:
            return self._guess(batch_size, plan), _GUESS
        stale = self._drift**2 * (self.rounds - cell.seen) / 1000.0
        return cell.mean, math.sqrt(cell.variance / cell.weight + stale)

    def _guess(self, batch_size: int, plan: Plan) -> float:
        """From a plan known at this batch size, moved by what the two differ by elsewhere, or by their steps."""
        known = [p for p in self.plans if (batch_size, p) in self._cells]
        if not known:
            return 0.0
        near = min(known, key=lambda p: (abs(p.num_steps - plan.num_steps), p.topk != plan.topk))
        here = self._cells[batch_size, near].mean
        sizes = [b for b, p in self._cells if p == plan and (b, near) in self._cells]
        if sizes:
            b = min(sizes, key=lambda size: abs(math.log(size / batch_size)))
            return here + self._cells[b, plan].mean - self._cells[b, near].mean
        return here + math.log((1 + _STEP * plan.num_steps) / (1 + _STEP * near.num_steps))

    def state_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        cells = [[b, str(p), c.mean, c.variance, c.weight, c.seen] for (b, p), c in self._cells.items()]
        return {"rounds": self.rounds, "cells": cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.rounds = int(state["rounds"])
        self._cells = {
            (int(b), Plan.parse(p)): Cell(mean, variance, weight, int(seen))
            for b, p, mean, variance, weight, seen in state["cells"]
        }
