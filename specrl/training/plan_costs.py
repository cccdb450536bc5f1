"""The present cost of rounds, for a learner whose loss counts seconds."""

from __future__ import annotations

from collections.abc import Mapping

from specrl.core.interfaces import PlanChooser, PlanCost
from specrl.core.round_stats import RecentStats, RoundStats


def plan_costs(chooser: PlanChooser, recent: Mapping[int, RecentStats]) -> tuple[list[PlanCost], float]:
    """The costs of the chains that ran, weighted by the rounds at each batch size, and the recent speedup (λ).

    A chooser without estimates, such as a table, is taken to run its best plan at each batch size; the seconds of a
    round are then the mean of recent rounds. If its best plan is unknown too, there are no costs.
    """
    costs: list[PlanCost] = []
    everything = RoundStats()
    for batch, stats in recent.items():
        total = stats.total
        everything.merge(total)
        seconds = {e.plan: e.seconds for e in chooser.estimates(batch) if e.tried and e.plan.is_chain}
        best = chooser.best(batch)
        if not seconds and best is not None and best.is_chain:
            seconds[best] = total.round_s
        plain_s, share = total.plain_s / total.tokens_per_request, stats.rounds / max(1, len(seconds))
        costs += [PlanCost(batch, plan.num_steps, plain_s, round_s, share) for plan, round_s in seconds.items()]
    return costs, everything.speedup if everything.rounds else 1.0
