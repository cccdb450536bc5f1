"""Write your own chooser of plans, check it, and hold it against ours.

    python examples/own_chooser.py

No base class: `plans`, `choose` and `learn` are all there is (docs/extend/chooser.md).
"""

from __future__ import annotations

from specrl.agents.choosers.registry import CHOOSERS
from specrl.commands.evaluate import evaluate
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.evaluation.simulation import Schedule
from specrl.testing.agent import CHECKS


class LongestThatStands:
    """One step more after a round in which more than two thirds of the drafts stood, one less below a third."""

    def __init__(self, plans: tuple[Plan, ...]) -> None:
        self.plans = tuple(sorted(plan for plan in plans if plan.is_chain and plan.num_steps))
        self._at = 0

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round."""
        return self.plans[self._at]

    def learn(self, done: Round) -> None:
        """Take a finished round."""
        stood = (done.accept_length - 1.0) / done.plan.num_steps
        if stood > 2 / 3:
            self._at = min(self._at + 1, len(self.plans) - 1)
        elif stood < 1 / 3:
            self._at = max(self._at - 1, 0)


def main() -> None:
    """Check it as ours is checked, give it a name, compare."""
    for check in CHECKS:
        check(LongestThatStands)
    CHOOSERS["own"] = lambda known, seed: LongestThatStands(known.plans)
    evaluate(
        profiles=("aurora-qwen3-coder-next-fp8",),
        choosers=("adaptive", "own"),
        reference="own",
        seeds=2,
        schedule=Schedule(rounds=480),
    )


if __name__ == "__main__":
    main()
