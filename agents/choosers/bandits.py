"""Bandits over plans, one for each group of batch sizes: bucketed ε-greedy, UCB1 and EXP3. NumPy only.

UCB1 and EXP3 need rewards in [0, 1]. The reward of a round is v / (v + m): v is its tokens per second and request, m
the mean of all v in the group so far. Its mean is not the ratio of sums that is the speedup of a run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from specrl.core.batch_schedule import reached_bound
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round

GROUPS = (1, 2, 4, 8, 16, 32, 64, 128)  # lower bounds


@dataclass(slots=True)
class _Arms:
    """The plans as arms of a bandit, in one group of batch sizes."""

    sums: list[float]  # of rewards (UCB1), or the logarithms of weights (EXP3)
    counts: list[float]
    speed: float = 0.0  # mean tokens per second and request
    rounds: int = 0
    pending: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=64))  # arm, its probability

    def reward(self, done: Round) -> float:
        """Return the reward of a round, in (0, 1); 1/2 is the mean speed so far."""
        speed = done.accept_length / done.seconds
        self.rounds += 1
        self.speed += (speed - self.speed) / self.rounds
        return speed / (speed + self.speed)


class _Bandit(PlanChooser):
    def __init__(self, plans: Sequence[Plan], groups: Sequence[int]) -> None:
        require(len(plans) > 0, "plans", "at least one plan", plans)
        require(min(groups, default=0) >= 1, "groups", "lower bounds of batch sizes, at least 1", groups)
        self.plans, self._groups = tuple(plans), tuple(groups)
        self._arms = {group: _Arms([0.0] * len(plans), [0.0] * len(plans)) for group in groups}

    def _group(self, batch_size: int) -> _Arms:
        return self._arms[reached_bound(self._groups, batch_size)]


class MedianGreedy(_Bandit):
    """Bucketed ε-greedy on medians (BEG-MAB of TLT; Hu et al., 2025, arXiv:2511.16665, section 5).

    The reward of a round is the median accept length of its plan over all groups, times requests, over seconds. With
    probability ε the plan is random, otherwise the one with the highest median reward in the window; a plan without
    rewards comes first.

    Args:
        plans: the plans to choose from, at least one.
        tiers: lower bound of the batch size -> plans that are allowed (TLT lets large batches verify fewer tokens);
            None: all plans at all batch sizes.
        epsilon: ε, in [0, 1].
        window: rewards in each median, at least 1.
        groups: lower bounds of the groups of batch sizes, at least 1.
        seed: seed of the exploration.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        tiers: Mapping[int, Sequence[Plan]] | None = None,
        epsilon: float = 0.1,
        window: int = 1000,
        groups: Sequence[int] = GROUPS,
        seed: int = 0,
    ) -> None:
        super().__init__(plans, groups)
        require(0.0 <= epsilon <= 1.0, "epsilon", "in [0, 1]", epsilon)
        require(window >= 1, "window", "at least 1", window)
        self._tiers = tiers or {1: self.plans}
        self._epsilon, self._rng = epsilon, np.random.default_rng(seed)
        self._lengths = {plan: deque[float](maxlen=window) for plan in self.plans}
        self._rewards = {(group, plan): deque[float](maxlen=window) for group in self._groups for plan in self.plans}
        self._scores = dict.fromkeys(self._rewards, math.inf)

    def choose(self, observation: Observation) -> Plan:
        allowed = self._tiers[reached_bound(self._tiers, observation.batch_size)]
        if self._rng.random() < self._epsilon:
            return allowed[int(self._rng.integers(len(allowed)))]
        group = reached_bound(self._groups, observation.batch_size)
        return max(allowed, key=lambda plan: self._scores[group, plan])

    def learn(self, done: Round) -> None:
        lengths, key = self._lengths[done.plan], (reached_bound(self._groups, done.batch_size), done.plan)
        lengths.append(done.accept_length)
        self._rewards[key].append(float(np.median(lengths)) * done.batch_size / done.seconds)
        self._scores[key] = float(np.median(self._rewards[key]))


class UCB1(_Bandit):
    """The arm with the highest x̄_j + scale · sqrt(2 ln n / n_j) (Auer, Cesa-Bianchi and Fischer, 2002, figure 1).

    Args:
        plans: the plans to choose from, at least one.
        groups: lower bounds of the groups of batch sizes, at least 1.
        scale: scale of the bonus, at least 0; 1 in the paper. Rewards of plans differ little, so 1 explores for long.
    """

    def __init__(self, plans: Sequence[Plan], *, groups: Sequence[int] = GROUPS, scale: float = 1.0) -> None:
        super().__init__(plans, groups)
        require(scale >= 0.0, "scale", "at least 0", scale)
        self._scale = scale

    def choose(self, observation: Observation) -> Plan:
        arms = self._group(observation.batch_size)
        if 0.0 in arms.counts:
            return self.plans[arms.counts.index(0.0)]
        bonus = 2.0 * math.log(sum(arms.counts))
        bounds = [s / n + self._scale * math.sqrt(bonus / n) for s, n in zip(arms.sums, arms.counts, strict=True)]
        return self.plans[bounds.index(max(bounds))]

    def learn(self, done: Round) -> None:
        arms, index = self._group(done.batch_size), self.plans.index(done.plan)
        arms.sums[index] += arms.reward(done)
        arms.counts[index] += 1.0


class EXP3(_Bandit):
    """Exponential weights for rewards chosen by an adversary (Auer, Cesa-Bianchi, Freund and Schapire, 2002, figure 1).

    p_j = (1 - γ) w_j / Σw + γ / K, and after reward x of arm j: w_j ← w_j exp(γ x / (p_j K)).

    Args:
        plans: the plans to choose from, at least one.
        groups: lower bounds of the groups of batch sizes, at least 1.
        gamma: γ, in (0, 1].
        seed: seed of the choices.
    """

    def __init__(
        self, plans: Sequence[Plan], *, groups: Sequence[int] = GROUPS, gamma: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__(plans, groups)
        require(0.0 < gamma <= 1.0, "gamma", "in (0, 1]", gamma)
        self._gamma, self._rng = gamma, np.random.default_rng(seed)

    def _probabilities(self, arms: _Arms) -> list[float]:
        top = max(arms.sums)
        weights = [math.exp(s - top) for s in arms.sums]
        total = sum(weights)
        return [(1.0 - self._gamma) * w / total + self._gamma / len(weights) for w in weights]

    def choose(self, observation: Observation) -> Plan:
        arms = self._group(observation.batch_size)
        p = self._probabilities(arms)
        index, rest = 0, self._rng.random() - p[0]
        while rest > 0.0 and index < len(p) - 1:
            index += 1
            rest -= p[index]
        arms.pending.append((index, p[index]))
        return self.plans[index]

    def learn(self, done: Round) -> None:
        arms, index = self._group(done.batch_size), self.plans.index(done.plan)
        p = self._probabilities(arms)[index]  # if another chooser chose the plan
        for choice in arms.pending:
            if choice[0] == index:
                arms.pending.remove(choice)
                p = choice[1]
                break
        arms.sums[index] += self._gamma * arms.reward(done) / (p * len(self.plans))
