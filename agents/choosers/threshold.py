"""Confidence-threshold stopping, carried over to plans that are chosen a round at a time. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

from specrl.agents.choosers.survival import Survival
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round


class ThresholdStopping:
    """The longest chain whose last draft still stands with probability of at least `threshold`, given those before it.

    The original stops a proposal where the draft's own probability of its token falls below a threshold: Kangaroo
    (Liu et al., 2024, arXiv 2404.18911: η = 0.6), `assistant_confidence_threshold` of transformers (0.4), `p_min` of
    llama.cpp (0.75). It needs an engine that looks at q(x_k) within a round and lets each request stop for itself.

    A plan holds for a whole batch and is fixed before its first draft, so this is an approximation: the confidence of
    position k is replaced by a_k, the recent share of drafts at k that stood given that those before stood. For a
    calibrated draft a_k is its mean confidence there; what tokens and requests differ by within a round is lost. A
    position that was not reached lately is taken to be as good as the one before it, so one step more is tried now and
    then. Like the original it always drafts, knows no time, and chooses no tree.

    Args:
        plans: on offer.
        threshold: in (0, 1).
        memory: rounds after which evidence has faded to 1/e.

    Raises:
        ValueError: no chain on offer, or a threshold out of range.
    """

    def __init__(self, plans: Sequence[Plan], *, threshold: float = 0.4, memory: float = 50.0) -> None:
        chains = sorted(plan for plan in plans if plan.is_chain)
        self.plans = tuple(plan for plan in chains if plan.num_steps > 0) or tuple(chains)
        if not self.plans:
            raise ValueError(f"stopping needs a chain (topk=1), but got {', '.join(map(str, plans)) or 'no plan'}")
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must be in (0, 1), but got {threshold}; transformers takes 0.4")
        self._threshold, self._survival = threshold, Survival(memory)

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round."""
        steps = self._survival.steps_above(self._threshold, self.plans[-1].num_steps)
        return max((plan for plan in self.plans if plan.num_steps <= steps), default=self.plans[0])

    def learn(self, done: Round) -> None:
        """Take a finished round."""
        self._survival.learn(done)
