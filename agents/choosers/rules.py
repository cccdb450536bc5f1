"""Rules for the number of draft steps, as baselines: confidence-threshold stopping and throughput. NumPy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate

from specrl.agents.choosers.survival import Survival
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan, chains_of
from specrl.core.round import Round


class ThresholdStopping(PlanChooser):
    """Confidence-threshold stopping: the longest chain whose last draft is accepted with at least this probability.

    The original stops the draft of a request when the draft's probability of its token is below a threshold: Kangaroo
    (Liu et al., 2024, arXiv:2404.18911: 0.6), transformers (0.4), llama.cpp (0.75). A plan is fixed for a whole batch
    before its first draft, so a_k replaces the confidence at position k: the recent share of drafts at k that were
    accepted after all earlier ones were. A position without recent drafts is assumed to be as good as the one before
    it, so longer chains are tried from time to time. Like the original, the rule always drafts and ignores time.

    Args:
        plans: the plans to choose from, at least one chain.
        threshold: in (0, 1).
        memory: rounds after which evidence has faded to 1/e.
    """

    def __init__(self, plans: Sequence[Plan], *, threshold: float = 0.4, memory: float = 50.0) -> None:
        chains = chains_of(plans)
        self.plans = tuple(plan for plan in chains if plan.num_steps > 0) or chains
        require(0.0 < threshold < 1.0, "threshold", "in (0, 1)", threshold)
        self._threshold, self._survival = threshold, Survival(memory)

    def choose(self, observation: Observation) -> Plan:
        steps = self._survival.steps_above(self._threshold, self.plans[-1].num_steps)
        return max((plan for plan in self.plans if plan.num_steps <= steps), default=self.plans[0])

    def learn(self, done: Round) -> None:
        self._survival.learn(done)


class ThroughputRule(PlanChooser):
    """Tokens per second from recent acceptance and costs that were profiled once, for chains.

    score(s) = (1 + Σ_{k<=s} P_k) / cost(B, s). The chain with the highest score replaces the present one if it is
    better by more than `hysteresis`. Proposed to SGLang (sgl-project/sglang pull request 28045, open at the time of
    writing).

    P_k is the mean over the last `window` rounds that proposed k drafts, at all batch sizes; a position that was never
    reached is extrapolated geometrically. The costs come from a profile at start-up and never change.

    The original always drafts. Here plan 0 may be one of the plans: it scores 1 / cost, and after `probe` rounds of it
    the shortest chain runs once, so that the windows are updated.

    Args:
        plans: the plans to choose from, at least one chain; trees are never chosen.
        costs: batch size -> plan -> seconds of a round, for all chains; a batch size between two has the larger one's.
        window: rounds in the mean P_k, at least 1.
        update_interval: rounds between decisions, at least 1.
        hysteresis: share by which a plan must be better to replace the present one, at least 0.
        forget: forget the positions beyond a shorter plan when it replaces the present one, as in the original.
        probe: rounds of plan 0 between two drafts, at least 1.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        costs: Mapping[int, Mapping[Plan, float]],
        *,
        window: int = 20,
        update_interval: int = 5,
        hysteresis: float = 0.1,
        forget: bool = True,
        probe: int = 20,
    ) -> None:
        self.plans = chains_of(plans)
        counts = window, update_interval, probe
        require(min(counts) >= 1, "window, update_interval and probe", "at least 1", counts)
        require(hysteresis >= 0, "hysteresis", "at least 0", hysteresis)
        missing = [f"{plan} at {batch}" for batch, known in costs.items() for plan in self.plans if plan not in known]
        if not costs or missing:
            raise ValueError(
                f"costs must include all chains, but lack {', '.join(missing) or 'all'}; profile the engine"
            )
        self._costs = costs
        self._windows: list[deque[float]] = [deque(maxlen=window) for _ in range(self.plans[-1].num_steps)]
        self._interval, self._hysteresis, self._forget, self._probe = update_interval, hysteresis, forget, probe
        self._since = self._idle = 0  # rounds since the last decision, and rounds of plan 0 in a row
        self._shortest = next((plan for plan in self.plans if plan.num_steps), self.plans[0])
        self._now = self.plans[len(self.plans) // 2]

    def choose(self, observation: Observation) -> Plan:
        if self._since >= self._interval:
            self._since = 0
            if all(len(window) == window.maxlen for window in self._windows[: self._now.num_steps]):
                self._decide(observation.batch_size)
        return self._shortest if self._idle >= self._probe else self._now

    def _decide(self, batch_size: int) -> None:
        measured = min((batch for batch in self._costs if batch >= batch_size), default=max(self._costs))
        costs, tokens = self._costs[measured], self.accept_lengths()
        scores = {plan: tokens[plan.num_steps] / costs[plan] for plan in self.plans if plan.num_steps < len(tokens)}
        best = max(scores, key=lambda plan: scores[plan])
        if scores[best] > scores[self._now] * (1.0 + self._hysteresis):
            if self._forget and 0 < best.num_steps < self._now.num_steps:
                for window in self._windows[best.num_steps :]:
                    window.clear()
            self._now = best

    def accept_lengths(self) -> list[float]:
        """Return E[τ] of the chains with 0, 1, 2, … steps, as far as it is known."""
        survival: list[float] = []
        for window in self._windows:
            if window:
                survival.append(sum(window) / len(window))
            elif len(survival) > 1 and survival[0] > 0:
                ratio = (survival[-1] / survival[0]) ** (1.0 / (len(survival) - 1))
                survival.append(survival[-1] * min(ratio, 1.0))
            elif survival:
                survival.append(survival[-1])
            else:
                break
        return list(accumulate(survival, initial=1.0))

    def learn(self, done: Round) -> None:
        for window, reached in zip(self._windows, done.reached()[1:], strict=False):
            window.append(reached / done.batch_size)
        self._since += 1
        self._idle = 0 if done.plan.num_steps else self._idle + 1
