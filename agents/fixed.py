"""Choosers that do not learn: one plan for all rounds, or one per batch size. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specrl.observation import Observation
from specrl.plan import Plan
from specrl.rounds import Round


class PlanTable:
    """One plan per batch size, by lower bound: a batch size takes the entry of the largest bound it reaches.

    Args:
        table: lower bound -> plan; a batch size below the least bound takes the least one's.

    Raises:
        ValueError: an empty table, or a bound below 1.
    """

    def __init__(self, table: Mapping[int, Plan | str]) -> None:
        if not table or min(table) < 1:
            raise ValueError(f"a plan table needs entries for batch sizes from 1 on, but got {dict(table)}")
        self._table = {bound: Plan.parse(table[bound]) for bound in sorted(table)}
        self.plans = tuple(dict.fromkeys(self._table.values()))

    def best(self, batch_size: int) -> Plan:
        """The plan for a batch size."""
        reached = [bound for bound in self._table if bound <= batch_size]
        return self._table[max(reached) if reached else min(self._table)]

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round."""
        return self.best(observation.batch_size)

    def learn(self, done: Round) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The table, JSON-able: {"1": "3/1/4", ...}."""
        return {str(bound): str(plan) for bound, plan in self._table.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing: a table does not change."""


class FixedPlan(PlanTable):
    """The same plan at every batch size."""

    def __init__(self, plan: Plan) -> None:
        super().__init__({1: plan})
