"""Choosers that do not learn: one plan, one plan per batch size, and an upper bound. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specrl.core.batch_schedule import reached_bound
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan, chains_of


class PlanTable(PlanChooser):
    """One plan per batch size, by lower bound: a batch size takes the entry of the largest bound it reaches.

    Args:
        table: lower bound, at least 1 -> plan, both also as text; smaller batch sizes have the plan of the least bound.
    """

    def __init__(self, table: Mapping[int, Plan | str]) -> None:
        parsed = {int(bound): Plan.parse(plan) for bound, plan in table.items()}
        require(min(parsed, default=0) >= 1, "a plan table", "of at least one batch size, all at least 1", table)
        self._table = dict(sorted(parsed.items()))
        self.plans = tuple(dict.fromkeys(self._table.values()))

    def best(self, batch_size: int) -> Plan:
        return self._table[reached_bound(self._table, batch_size)]

    def choose(self, observation: Observation) -> Plan:
        return self.best(observation.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the table, JSON-able: {"1": "3/1/4", ...}."""
        return {str(bound): str(plan) for bound, plan in self._table.items()}


class FixedPlan(PlanTable):
    """The same plan at every batch size."""

    def __init__(self, plan: Plan) -> None:
        super().__init__({1: plan})


def best_table(costs: Mapping[int, Mapping[Plan, float]], accept_lengths: Mapping[Plan, float]) -> PlanTable:
    """Return the best fixed plan per batch size, argmax E[τ] / T(B, plan), which choosers are compared with.

    Args:
        costs: T, batch size -> plan -> seconds of a round.
        accept_lengths: E[τ] = 1 + Σ P_k of every plan in `costs`.
    """
    unknown = sorted({str(plan) for known in costs.values() for plan in known} - set(map(str, accept_lengths)))
    if unknown:
        raise ValueError(f"every plan needs an accept length, but got none of {', '.join(unknown)}")
    return PlanTable({b: max(known, key=lambda p: accept_lengths[p] / known[p]) for b, known in costs.items()})


class ClairvoyantLength(PlanChooser):
    """An upper bound: it knows in advance how many drafts of each request will be accepted.

    It takes the chain with the highest N - λ·T: N tokens per request, T seconds, and the rate λ = ΣN / ΣT of its rounds
    at this batch size (Dinkelbach, 1967). Only a simulation knows the future.

    Args:
        plans: the plans to choose from, at least one chain; trees are never chosen.
        costs: T, batch size -> plan -> seconds; a batch size without an entry takes that of the next smaller one.
        foresee: returns each request's correct drafts in the next round under the longest chain.
    """

    def __init__(
        self, plans: Sequence[Plan], costs: Mapping[int, Mapping[Plan, float]], foresee: Callable[[], Sequence[int]]
    ) -> None:
        require(len(costs) > 0, "costs", "known at one batch size at least", costs)
        self.plans, self._costs, self._foresee = chains_of(plans), costs, foresee
        self._sums = dict.fromkeys(costs, (0.0, 0.0))  # tokens per request, seconds

    def choose(self, observation: Observation) -> Plan:
        bound = reached_bound(self._costs, observation.batch_size)
        costs, correct = self._costs[bound], list(self._foresee())
        gains = [1.0 + sum(min(c, plan.num_steps) for c in correct) / len(correct) for plan in self.plans]
        tokens, seconds = self._sums[bound]
        ratios = [gain / costs[plan] for gain, plan in zip(gains, self.plans, strict=True)]
        rate = tokens / seconds if seconds else max(ratios)
        values = [gain - rate * costs[plan] for gain, plan in zip(gains, self.plans, strict=True)]
        best = values.index(max(values))
        self._sums[bound] = tokens + gains[best], seconds + costs[self.plans[best]]
        return self.plans[best]
