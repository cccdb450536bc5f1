"""The cost of rounds: seconds by batch size and plan, robustly averaged in log space. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from specrl.core.plan import Plan

_NOISE = 0.12  # log standard deviation of one round's seconds, before it is estimated
_STEP = 0.15  # assumed cost of a draft step relative to plan 0, before it is measured
_GUESS = 0.35  # log standard deviation of such an assumption
_OCTAVE = 0.05  # log difference of a ratio of two plans between batch sizes, for every doubling
_BETWEEN = 0.015  # `_OCTAVE` for a batch size between two known ones
_SPIKE = 0.6  # log seconds above the mean that make a round an outlier, unless it recurs
_SLACK, _ALARM = 0.75, 11.0  # of the change detection, in standard deviations of one round
_MAX_RESIDUAL = 2.0  # so that at least nine rounds must agree on a change, because outliers come in bursts
_ENOUGH = 40.0  # evidence above which a cost ignores other batch sizes
_SAME, _OTHER = 0.8, 0.3  # probability that a change is shared by another batch size, and by another plan


@dataclass(slots=True)
class Cell:
    """Running log seconds of one plan at one batch size."""

    mean: float
    weight: float = 1.0
    seen: int = 0  # number of the last round
    outliers: int = 0  # in a row
    above: float = 0.0  # CUSUM of residuals, upwards
    below: float = 0.0  # and downwards
    run: float = 0.0  # sum of the residuals since both were zero
    length: int = 0  # and their number
    visits: int = 1  # rounds in all


_NO_EVIDENCE = Cell(0.0, weight=0.0, visits=0)


class Costs:
    """T(batch size, plan).

    Each cost is a mean of log seconds that forgets slowly. A sudden change of a cost is detected by a two-sided CUSUM
    of its standardised residuals z, clipped at ±2 (Page, 1954): S ← max(0, S ± z - 0.75), and S > 11 is a change. The
    cost is then estimated again from the rounds in S. Cost changes are usually shared: when one is detected, the plan's
    costs at other batch sizes have changed too with probability 0.8, and other plans' costs with 0.3. Their means move
    by that share, and their variances grow accordingly. A cost with little evidence also uses the ratio of its plan to
    another one at the nearest batch size.

    Args:
        plans: the plans to choose from.
        memory: rounds of a plan at a batch size after which a round has faded to 1/e.
        drift: log standard deviation of the change of a cost in a thousand rounds without its plan.
    """

    def __init__(self, plans: Sequence[Plan], memory: float = 250.0, drift: float = 0.02) -> None:
        self.plans, self._keep, self._drift = tuple(plans), math.exp(-1.0 / memory), drift
        self._cells: dict[tuple[int, Plan], Cell] = {}
        self._seen: dict[Plan, int] = {}  # the clock of a plan's last round
        self._variance = _NOISE**2
        self.rounds = 0
        self.changes = 0  # detected so far

    def learn(self, batch_size: int, plan: Plan, seconds: float) -> None:
        """Learn from the seconds of a round."""
        self.rounds += 1
        self._seen[plan] = self.rounds
        x, key = math.log(seconds), (batch_size, plan)
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = Cell(x, seen=self.rounds)
            return
        stale = self._stale(cell)
        cell.seen = self.rounds
        error = x - cell.mean
        if error > _SPIKE and cell.outliers < 3:
            cell.outliers += 1
            return
        if cell.outliers >= 3 or error < -_SPIKE:  # it recurs, or the first round was the outlier: start again
            self._cells[key] = Cell(x, seen=self.rounds)
            return
        cell.outliers, cell.visits = 0, cell.visits + 1
        if self._changed(cell, error):
            shift, weight = cell.run / cell.length, float(cell.length)
            self._cells[key] = Cell(cell.mean + shift, weight, seen=self.rounds, visits=cell.visits)
            self._spread(key, shift)
            return
        cell.weight = self._variance / (self._variance / cell.weight + stale) * self._keep + 1.0
        cell.mean += error / cell.weight
        if cell.weight > 5.0:
            self._variance += 0.005 * (error**2 - self._variance)

    def _changed(self, cell: Cell, error: float) -> bool:
        """Whether this residual completes the evidence of a change."""
        z = error / math.sqrt(self._variance * (1.0 + 1.0 / cell.weight))
        z = max(-_MAX_RESIDUAL, min(z, _MAX_RESIDUAL))
        cell.above, cell.below = max(0.0, cell.above + z - _SLACK), max(0.0, cell.below - z - _SLACK)
        if cell.above == cell.below == 0.0:
            cell.run, cell.length = 0.0, 0
            return False
        cell.run, cell.length = cell.run + error, cell.length + 1
        return max(cell.above, cell.below) > _ALARM

    def _spread(self, changed: tuple[int, Plan], shift: float) -> None:
        """Move other costs, which may share the change."""
        self.changes += 1
        for key, cell in self._cells.items():
            if key != changed:
                p = _SAME if key[1] == changed[1] else _OTHER
                cell.mean += p * shift
                cell.weight = self._variance / (self._variance / cell.weight + p * (1.0 - p) * shift**2)
                cell.above, cell.below, cell.run, cell.length = 0.0, 0.0, 0.0, 0

    def _stale(self, cell: Cell) -> float:
        return self._drift**2 * (self.rounds - cell.seen) / 1000.0

    def cell(self, batch_size: int, plan: Plan) -> Cell:
        """Return the evidence about a cost; weight and visits are 0 if there is none."""
        return self._cells.get((batch_size, plan), _NO_EVIDENCE)

    def unseen_anywhere(self, plan: Plan) -> int:
        """Return the number of rounds since the plan ran at any batch size."""
        return self.rounds - self._seen.get(plan, 0)

    def log_seconds(self, batch_size: int, plan: Plan) -> tuple[float, float]:
        """Return the posterior mean and standard deviation of log T."""
        cell = self._cells.get((batch_size, plan))
        if cell is None:
            mean, variance = self._guess(batch_size, plan)
            return mean, math.sqrt(variance)
        mean, variance = cell.mean, self._variance / cell.weight + self._stale(cell)
        if cell.weight < _ENOUGH:
            guess, guess_variance = self._guess(batch_size, plan)
            if guess_variance < _GUESS**2:
                precision = 1.0 / variance + 1.0 / guess_variance
                mean, variance = (mean / variance + guess / guess_variance) / precision, 1.0 / precision
        return mean, math.sqrt(variance)

    def _guess(self, batch_size: int, plan: Plan) -> tuple[float, float]:
        """Return mean and variance without the plan's own rounds at this batch size.

        They come from the most similar plan that is known at this batch size, and the ratio of the two plans at the
        nearest batch sizes, or else their numbers of steps. If no plan is known at this batch size, they come from the
        plan's cost at the nearest batch size.
        """
        cells = self._cells
        known = [p for p in self.plans if p != plan and (batch_size, p) in cells]
        if not known:
            sizes = [b for b, p in cells if p == plan and b != batch_size]
            if not sizes:
                return 0.0, _GUESS**2
            b = min(sizes, key=lambda size: abs(math.log(size / batch_size)))
            return cells[b, plan].mean, _GUESS**2
        known = [p for p in known if cells[batch_size, p].visits > 1] or known  # a single round may be an outlier
        near = min(known, key=lambda p: (abs(p.num_steps - plan.num_steps), p.topk != plan.topk))
        here = cells[batch_size, near]
        sizes = [b for b, p in cells if p == plan and b != batch_size and (b, near) in cells]
        if sizes:
            ratio, variance, spread = self._ratio(batch_size, plan, near, sizes)
            return here.mean + ratio, self._variance / here.weight + variance + spread**2
        steps = math.log((1 + _STEP * plan.num_steps) / (1 + _STEP * near.num_steps))
        return here.mean + steps, _GUESS**2

    def _ratio(self, batch_size: int, plan: Plan, near: Plan, sizes: Sequence[int]) -> tuple[float, float, float]:
        """Return the log ratio of two plans' costs from other batch sizes, its variance, and its possible error.

        It is interpolated over log batch size, and constant beyond the outermost batch sizes.
        """
        low = max((b for b in sizes if b < batch_size), default=0)
        high = min((b for b in sizes if b > batch_size), default=0)
        if low and high:
            weight, spread = math.log(batch_size / low) / math.log(high / low), _BETWEEN * math.log2(high / low)
        else:
            low = high = low or high
            weight, spread = 0.0, _OCTAVE * (0.5 + abs(math.log2(low / batch_size)))
        ratio = variance = 0.0
        for share, b in ((1.0 - weight, low), (weight, high)):
            one, two = self._cells[b, plan], self._cells[b, near]
            ratio += share * (one.mean - two.mean)
            variance += share**2 * self._variance * (1.0 / one.weight + 1.0 / two.weight)
        return ratio, variance, spread

    def state_dict(self) -> dict[str, Any]:
        cells = [[batch, str(plan), *astuple(cell)] for (batch, plan), cell in self._cells.items()]
        return {"rounds": self.rounds, "changes": self.changes, "variance": self._variance, "cells": cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self.changes, self._variance = state["rounds"], state["changes"], state["variance"]
        self._cells = {(b, Plan.parse(p)): Cell(*numbers) for b, p, *numbers in state["cells"]}
        self._seen = {plan: max(c.seen for (_, p), c in self._cells.items() if p == plan) for _, plan in self._cells}
