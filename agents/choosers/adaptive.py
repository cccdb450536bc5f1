"""The adaptive plan chooser: survival pooled over batch sizes, costs by batch size and plan, posterior sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.survival import Survival
from specrl.core.interfaces import PlanChooser, PlanEstimate
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round

_WELL_KNOWN = 50.0  # rounds after which only a change is a reason to try a plan again
_PATIENCE = 600  # rounds, times the number of plans, after which such a plan is tried again if it may be best
_PLAUSIBLE = 0.8  # a plan below this share of the best plan's speed is not tried again
_SETTLED = 0.03  # log standard deviation of a cost below which it is sampled with less than its spread
_HOLD = 8  # rounds that a sampled plan is kept
_IDLE = 200  # rounds without drafts after which drafting is tried again
_BUYS = 3  # rounds by which one request's draft delays that


class AdaptiveChooser(PlanChooser):
    """Chooses the plan with the most tokens per second, E[τ] / T(B, plan), by posterior sampling.

    This plan maximises every objective that is a ratio of tokens to seconds at a batch size. Acceptance and costs are
    sampled from their posteriors (Thompson, 1933), so plans are tried as long as they may be best. A cost that is known
    to within a few per cent is sampled with less than its spread, because telling nearly equal plans apart is not worth
    the rounds.

    Each posterior sample is kept for several rounds at its batch size, because the first speculative round after plan
    0, or after a change of batch size, pays for the draft's catch-up. That round counts for survival but not for the
    plan's cost. The catch-up cost is learnt too, and reduces the value of plans that would follow plan 0.

    `Survival` and `Costs` detect changes. So that changes are seen, a plan that has not run for long is tried again,
    sooner if two standard deviations of its cost might make it best, and drafting is tried again after many rounds of
    plan 0.

    Args:
        plans: the plans to choose from.
        seed: of the sampling.
        revisit: rounds, at any batch size, after which a plan that has not run is tried again: at first only if it is
            as good as the best plan, after twice as many rounds if it has 80 % of the best plan's speed. One trial is
            enough because costs and acceptance mostly change at all batch sizes together.

    Raises:
        ValueError: no plans.
    """

    def __init__(self, plans: Sequence[Plan], *, seed: int = 0, revisit: int = 600) -> None:
        if not plans:
            raise ValueError("a chooser needs at least one plan, but got none")
        self.plans = tuple(plans)
        self.survival, self.costs = Survival(), Costs(self.plans)
        self._rng = np.random.default_rng(seed)
        self._revisit = revisit
        self._last: tuple[int, Plan] | None = None
        self._catch_up = 0.0  # extra seconds of the first speculative round after plan 0, as a share of a round's
        self._held: dict[int, tuple[Plan, int]] = {}  # batch size -> plan, rounds left
        self._changes = 0
        self._idle = 0  # rounds without drafts, less those that drafts delayed

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round."""
        batch = observation.batch_size
        changes = self.survival.changes + self.costs.changes
        if changes != self._changes:
            self._changes = changes
            self._held.clear()
        plan, left = self._held.get(batch, (self.plans[0], 0))
        if left == 0:
            plan, left = self._sample(batch)
        self._held[batch] = plan, left - 1
        return plan

    def _sample(self, batch: int) -> tuple[Plan, int]:
        """A plan sampled from the posterior, and the number of rounds to keep it."""
        costs = self.costs
        untried = [plan for plan in self.plans if costs.cell(batch, plan).visits < 2 and self._worth(batch, plan)]
        if untried:
            return untried[int(self._rng.integers(len(untried)))], 2
        lengths = self.survival.accept_lengths(self.plans, self._rng)
        noise = self._rng.standard_normal(len(self.plans)).tolist()
        leaving = self._last is not None and self._last[1].num_steps == 0
        speeds = []
        for plan, length, z in zip(self.plans, lengths, noise, strict=True):
            mean, sd = costs.log_seconds(batch, plan)
            toll = math.log1p(self._catch_up / _HOLD) if leaving and plan.num_steps else 0.0
            speeds.append(math.log(length) - mean - z * sd * sd / (sd + _SETTLED) - toll)
        best = self.plans[speeds.index(max(speeds))]
        if best.num_steps == 0 and self._idle >= _IDLE and len(self.plans) > 1:
            self._idle = 0
            drafting = [speed if plan.num_steps else -math.inf for plan, speed in zip(self.plans, speeds, strict=True)]
            return self.plans[drafting.index(max(drafting))], 1
        means = self._speeds(batch)
        lead = max(means[plan] for plan in self._tried(batch))
        for plan in self.plans:
            if plan != best and self._due(batch, plan, lead - means[plan]):
                return plan, 2
        return best, _HOLD

    def _worth(self, batch: int, plan: Plan) -> bool:
        """Whether an untried plan might still beat the best tried one, at three standard deviations."""
        if self.costs.cell(batch, plan).visits == 1:  # its only round may have been an outlier
            return True
        tried, speeds = self._tried(batch), self._speeds(batch)
        doubt = 3.0 * self.costs.log_seconds(batch, plan)[1]
        return len(tried) == len(self.plans) or speeds[plan] + doubt > max(speeds[p] for p in tried)

    def _due(self, batch: int, plan: Plan, behind: float) -> bool:
        """Whether a plan that is not chosen any more, `behind` the best one in log speed, should be tried again."""
        overdue = self.costs.unseen_anywhere(plan) / self._revisit - 1.0
        if behind < -math.log(_PLAUSIBLE) * min(overdue, 1.0):
            return True
        cell = self.costs.cell(batch, plan)
        patience = _PATIENCE * len(self.plans) * min(cell.weight / _WELL_KNOWN, 1.0)
        return self.costs.rounds - cell.seen > patience and behind < 2.0 * self.costs.log_seconds(batch, plan)[1]

    def _tried(self, batch: int) -> Sequence[Plan]:
        """Plans that ran at least twice at a batch size; all plans if none did."""
        return [plan for plan in self.plans if self.costs.cell(batch, plan).visits >= 2] or self.plans

    def _speeds(self, batch: int) -> dict[Plan, float]:
        """Mean belief about log E[τ] / T of every plan."""
        lengths = self.survival.accept_lengths(self.plans)
        return {p: math.log(n) - self.costs.log_seconds(batch, p)[0] for p, n in zip(self.plans, lengths, strict=True)}

    def learn(self, done: Round) -> None:
        """Learn from a finished round."""
        self.survival.learn(done)
        self._idle = self._idle + 1 if done.plan.num_steps == 0 else max(0, self._idle - _BUYS * done.batch_size)
        last, self._last = self._last, (done.batch_size, done.plan)
        caught_up = last is not None and last[0] == done.batch_size and (last[1].num_steps or not done.plan.num_steps)
        if caught_up or not done.plan.num_steps:
            self.costs.learn(done.batch_size, done.plan, done.seconds)
        elif last is not None and last[1].num_steps == 0 and self.costs.cell(done.batch_size, done.plan).visits >= 2:
            usual = math.exp(self.costs.log_seconds(done.batch_size, done.plan)[0])
            longer = min(max(done.seconds / usual - 1.0, -0.5), 2.0)
            self._catch_up += 0.1 * (longer - self._catch_up)

    def best(self, batch_size: int) -> Plan:
        """The plan with the highest expected speed now, among those that ran at this batch size (all if none did)."""
        return max(self._tried(batch_size), key=self._speeds(batch_size).__getitem__)

    def estimates(self, batch_size: int) -> list[PlanEstimate]:
        """The expected accept length and seconds of every plan at a batch size."""
        found = []
        for plan, length in zip(self.plans, self.survival.accept_lengths(self.plans), strict=True):
            seconds = math.exp(self.costs.log_seconds(batch_size, plan)[0])
            found.append(PlanEstimate(plan, length, seconds, self.costs.cell(batch_size, plan).weight))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state, JSON-able."""
        return {
            "survival": self.survival.state_dict(),
            "costs": self.costs.state_dict(),
            "rng": self._rng.bit_generator.state,
            "last": None if self._last is None else [self._last[0], str(self._last[1])],
            "catch_up": self._catch_up,
            "held": [[batch, str(plan), left] for batch, (plan, left) in self._held.items()],
            "changes": self._changes,
            "idle": self._idle,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.survival.load_state_dict(state["survival"])
        self.costs.load_state_dict(state["costs"])
        self._rng.bit_generator.state = state["rng"]
        self._last = None if state["last"] is None else (state["last"][0], Plan.parse(state["last"][1]))
        self._catch_up, self._changes, self._idle = state["catch_up"], state["changes"], state["idle"]
        self._held = {batch: (Plan.parse(plan), left) for batch, plan, left in state["held"]}
