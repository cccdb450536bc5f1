"""The adaptive plan chooser: survival pooled over batch sizes, costs by batch size and plan, posterior sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.survival import Survival
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser, PlanEstimate
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round

_WELL_KNOWN = 50.0  # rounds after which a cost is well known
_PATIENCE = 600  # rounds, times the number of plans, after which a plan of well known cost is tried again
_PLAUSIBLE = 0.8  # a plan below this share of the best plan's speed is not tried again
_SETTLED = 0.03  # log standard deviation of a cost below which it is sampled with less than its spread
_HOLD = 8  # rounds that a sampled plan is kept
_IDLE = 200  # rounds without drafts after which drafting is tried again
_DELAY = 3  # rounds by which the drafts of one request delay this


class AdaptiveChooser(PlanChooser):
    """Chooses the plan with the most tokens per second, E[τ] / T(B, plan), by posterior sampling.

    Acceptance and costs are sampled from their posteriors (Thompson, 1933), so plans are tried as long as they may be
    best. A cost that is known to within a few per cent is sampled with less than its spread, because it is not worth
    many rounds to compare nearly equal plans.

    Each posterior sample is kept for several rounds at its batch size, because the first speculative round after plan
    0, or after a change of batch size, includes the draft's catch-up. This round counts for survival but not for the
    plan's cost. The cost of the catch-up reduces the value of plans that would follow plan 0.

    `Survival` and `Costs` detect changes. To see changes, the chooser tries a plan again that has not run for long,
    sooner if two standard deviations of its cost might make it best, and drafts again after many rounds of plan 0.

    Args:
        plans: the plans to choose from, at least one.
        seed: seed of the sampling.
        revisit: rounds, at any batch size, after which a plan that has not run is tried again if it is as good as the
            best plan; after twice as many rounds it is tried if it has 80 % of the best plan's speed. One trial is
            enough because costs and acceptance mostly change at all batch sizes together.
    """

    def __init__(self, plans: Sequence[Plan], *, seed: int = 0, revisit: int = 600) -> None:
        require(len(plans) > 0, "plans", "at least one plan", plans)
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
        """Sample a plan from the posterior; also return the number of rounds to keep it."""
        costs = self.costs
        untried = [plan for plan in self.plans if self._worth_trying(batch, plan)]
        if untried:
            return untried[int(self._rng.integers(len(untried)))], 2
        lengths = self.survival.accept_lengths(self.plans, self._rng)
        noise = self._rng.standard_normal(len(self.plans)).tolist()
        after_plan_0 = self._last is not None and self._last[1].num_steps == 0
        speeds = []
        for plan, length, z in zip(self.plans, lengths, noise, strict=True):
            mean, sd = costs.log_seconds(batch, plan)
            catch_up = math.log1p(self._catch_up / _HOLD) if after_plan_0 and plan.num_steps else 0.0
            speeds.append(math.log(length) - mean - z * sd * sd / (sd + _SETTLED) - catch_up)
        best = self.plans[speeds.index(max(speeds))]
        if best.num_steps == 0 and self._idle >= _IDLE and len(self.plans) > 1:
            self._idle = 0
            drafting = [speed if plan.num_steps else -math.inf for plan, speed in zip(self.plans, speeds, strict=True)]
            return self.plans[drafting.index(max(drafting))], 1
        means = self._speeds(batch)
        fastest = max(means[plan] for plan in self._tried(batch))
        for plan in self.plans:
            if plan != best and self._due(batch, plan, fastest - means[plan]):
                return plan, 2
        return best, _HOLD

    def _worth_trying(self, batch: int, plan: Plan) -> bool:
        """Whether a plan with fewer than two rounds might beat the best tried one, at three standard deviations."""
        visits = self.costs.cell(batch, plan).visits
        if visits:
            return visits == 1  # this round may have been an outlier
        tried, speeds = self._tried(batch), self._speeds(batch)
        margin = 3.0 * self.costs.log_seconds(batch, plan)[1]
        return len(tried) == len(self.plans) or speeds[plan] + margin > max(speeds[p] for p in tried)

    def _due(self, batch: int, plan: Plan, gap: float) -> bool:
        """Whether to try a plan again that is slower than the best one by `gap` in log speed."""
        overdue = self.costs.unseen_anywhere(plan) / self._revisit - 1.0
        if gap < -math.log(_PLAUSIBLE) * min(overdue, 1.0):
            return True
        cell = self.costs.cell(batch, plan)
        patience = _PATIENCE * len(self.plans) * min(cell.weight / _WELL_KNOWN, 1.0)
        return self.costs.rounds - cell.seen > patience and gap < 2.0 * self.costs.log_seconds(batch, plan)[1]

    def _tried(self, batch: int) -> Sequence[Plan]:
        """Return the plans that ran at least twice at a batch size; all plans if none did."""
        return [plan for plan in self.plans if self.costs.cell(batch, plan).visits >= 2] or self.plans

    def _speeds(self, batch: int) -> dict[Plan, float]:
        """Return the posterior mean of log E[τ] / T of every plan."""
        lengths = self.survival.accept_lengths(self.plans)
        return {p: math.log(n) - self.costs.log_seconds(batch, p)[0] for p, n in zip(self.plans, lengths, strict=True)}

    def learn(self, done: Round) -> None:
        self.survival.learn(done)
        self._idle = self._idle + 1 if done.plan.num_steps == 0 else max(0, self._idle - _DELAY * done.batch_size)
        batch, plan = done.batch_size, done.plan
        last, self._last = self._last, (batch, plan)
        if not plan.num_steps or (last is not None and last[0] == batch and last[1].num_steps):
            self.costs.learn(batch, plan, done.seconds)
        elif last is not None and last[1].num_steps == 0 and self.costs.cell(batch, plan).visits >= 2:
            usual = math.exp(self.costs.log_seconds(batch, plan)[0])
            extra = min(max(done.seconds / usual - 1.0, -0.5), 2.0)
            self._catch_up += 0.1 * (extra - self._catch_up)

    def best(self, batch_size: int) -> Plan:
        return max(self._tried(batch_size), key=self._speeds(batch_size).__getitem__)

    def estimates(self, batch_size: int) -> list[PlanEstimate]:
        costs, lengths = self.costs, self.survival.accept_lengths(self.plans)
        return [
            PlanEstimate(p, length, math.exp(costs.log_seconds(batch_size, p)[0]), costs.cell(batch_size, p).weight)
            for p, length in zip(self.plans, lengths, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
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
        self.survival.load_state_dict(state["survival"])
        self.costs.load_state_dict(state["costs"])
        self._rng.bit_generator.state = state["rng"]
        self._last = None if state["last"] is None else (state["last"][0], Plan.parse(state["last"][1]))
        self._catch_up, self._changes, self._idle = state["catch_up"], state["changes"], state["idle"]
        self._held = {batch: (Plan.parse(plan), left) for batch, plan, left in state["held"]}
