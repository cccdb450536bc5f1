"""What rounds cost now, for a learner whose loss counts seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import PlanTable
from specrl.agents.draft.losses import PlanCost
from specrl.core.interfaces import PlanChooser


class Tallied(Protocol):
    """Recent rounds at one batch size."""

    rounds: int  # all of them, the recent and the older

    def sums(self) -> tuple[float, float, float]:
        """Seconds of plain decoding for the tokens, seconds spent, tokens per request; of the recent ones."""
        ...

    @property
    def round_s(self) -> float:
        """Mean seconds of a recent one."""
        ...


def plan_costs(chooser: PlanChooser, tallies: Mapping[int, Tallied]) -> tuple[list[PlanCost], float]:
    """t0(B) and T(B, plan) of the chains that were tried, by the share of rounds at B, and the speedup of late (λ).

    T is what our chooser believes. A table runs one plan at a batch size, and its T is the mean of recent rounds. Of
    other choosers nothing is known: no costs.
    """
    costs: list[PlanCost] = []
    plain = spent = 0.0
    for batch, tally in tallies.items():
        saved_s, spent_s, tokens = tally.sums()
        plain, spent = plain + saved_s, spent + spent_s
        known: list[tuple[int, float]] = []
        if isinstance(chooser, AdaptiveChooser):
            tried = [found for found in chooser.estimates(batch) if found.tried and found.plan.is_chain]
            known = [(found.plan.num_steps, found.seconds) for found in tried]
        elif isinstance(chooser, PlanTable) and chooser.best(batch).is_chain:
            known = [(chooser.best(batch).num_steps, tally.round_s)]
        share = tally.rounds / max(1, len(known))
        costs += [PlanCost(batch, steps, saved_s / tokens, round_s, share) for steps, round_s in known]
    return costs, plain / spent if spent else 1.0
