"""Choosers by name, made from the plans and profiled costs of an engine. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.bandits import EXP3, UCB1, MedianGreedy
from specrl.agents.choosers.rules import ThresholdStopping, ThroughputRule
from specrl.agents.choosers.sglang_rule import SGLangRule
from specrl.agents.choosers.table import FixedPlan, best_table
from specrl.core.checks import require_known
from specrl.core.interfaces import PlanChooser
from specrl.core.plan import Plan, chains_of


@dataclass(frozen=True, slots=True)
class Known:
    """The knowledge that a chooser may start with; the adaptive chooser needs the plans only."""

    plans: tuple[Plan, ...]  # to choose from
    costs: Mapping[int, Mapping[Plan, float]] = field(default_factory=dict)  # batch size -> plan -> seconds of a round
    accept_lengths: Mapping[Plan, float] = field(default_factory=dict)  # E[τ] of each plan


Make = Callable[[Known, int], PlanChooser]  # knowledge, seed
CHOOSERS: dict[str, Make] = {
    "adaptive": lambda known, seed: AdaptiveChooser(known.plans, seed=seed),
    "sglang": lambda known, seed: SGLangRule(known.plans),
    "sglang-same": lambda known, seed: SGLangRule(  # with all chains as candidates at every batch size
        known.plans, config={"1": {"candidate_steps": [plan.num_steps for plan in chains_of(known.plans)]}}
    ),
    # the original, which always drafts; with plan 0; without hysteresis, with decisions after every round
    "throughput": lambda known, seed: ThroughputRule(tuple(p for p in known.plans if p.num_steps), known.costs),
    "throughput-0": lambda known, seed: ThroughputRule(known.plans, known.costs),
    "throughput-eager": lambda known, seed: ThroughputRule(
        known.plans, known.costs, update_interval=1, hysteresis=0.0, forget=False
    ),
    "threshold": lambda known, seed: ThresholdStopping(known.plans),
    "median-greedy": lambda known, seed: MedianGreedy(known.plans, seed=seed),
    "ucb1": lambda known, seed: UCB1(known.plans),
    "exp3": lambda known, seed: EXP3(known.plans, seed=seed),
    "best-table": lambda known, seed: best_table(known.costs, known.accept_lengths),
}


def make_chooser(name: str, known: Known, seed: int = 0) -> PlanChooser:
    """Make a chooser of `CHOOSERS`, or for a plan such as '3/1/4' the one that always chooses it.

    Raises:
        ValueError: an unknown name, a plan that is not among the plans, or missing costs.
    """
    if name[:1].isdigit():
        plan = Plan.parse(name)
        require_known("a fixed plan", plan, known.plans)
        return FixedPlan(plan)
    require_known("a chooser", name, CHOOSERS, " or a plan")
    return CHOOSERS[name](known, seed)
