"""Our plan chooser: survival pooled over batch sizes, costs per batch size and plan, posterior sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specrl.agents.costs import Costs
from specrl.agents.survival import Survival
from specrl.observation import Observation
from specrl.plan import Plan
from specrl.rounds import Round

_PLAUSIBLE = 0.8  # a plan below this share of the best one's speed is not looked at again


@dataclass(frozen=True, slots=True)
class PlanEstimate:
    """What is believed of a plan at a batch size; `speed` is tokens per second and request."""

    plan: Plan
    accept_length: float
    seconds: float
    speed: float
    tried: float


class AdaptiveChooser:
    """Chooses the plan with the most tokens per second, E[τ] / T(B, plan), by posterior sampling.

    At a given batch size that ratio is what every objective of the ratio form comes to. Acceptance and cost are
    sampled from what is believed of them (Thompson, 1933), so plans are tried as long as they may be best; one that
    may be best and was not seen for `revisit` rounds is tried again, so that a change is noticed. The first
    speculative round after plan 0, or after a change of batch size, pays for the draft's catch-up; it counts for
    survival but not for the plan's cost.

    Args:
        plans: to choose from.
        seed: of the sampling.
        revisit: rounds after which a plausible plan is tried again.

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

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round."""
        batch, costs = observation.batch_size, self.costs
        untried = [plan for plan in self.plans if costs.tried(batch, plan) < 2.0 and self._worth(batch, plan)]
        if untried:
            return untried[int(self._rng.integers(len(untried)))]
        noise = self._rng.standard_normal(len(self.plans))
        best, most = self.plans[0], -math.inf
        for plan, z in zip(self.plans, noise.tolist(), strict=True):
            mean, sd = costs.log_seconds(batch, plan)
            speed = math.log(self.survival.accept_length(plan, self._rng)) - mean - sd * z
            if speed > most:
                best, most = plan, speed
        for plan in self.plans:
            if plan != best and costs.unseen(batch, plan) > self._revisit * len(self.plans) and self._near(batch, plan):
                return plan
        return best

    def _worth(self, batch: int, plan: Plan) -> bool:
        """Whether an untried plan might still beat the best tried one, at three standard deviations."""
        tried = [p for p in self.plans if self.costs.tried(batch, p) >= 2.0]
        if not tried:
            return True
        mean, sd = self.costs.log_seconds(batch, plan)
        hope = math.log(self.survival.accept_length(plan)) - mean + 3.0 * sd
        return hope > max(self._speed(batch, p) for p in tried)

    def _near(self, batch: int, plan: Plan) -> bool:
        return self._speed(batch, plan) > self._speed(batch, self.best(batch)) + math.log(_PLAUSIBLE)

    def _speed(self, batch: int, plan: Plan) -> float:
        return math.log(self.survival.accept_length(plan)) - self.costs.log_seconds(batch, plan)[0]

    def learn(self, done: Round) -> None:
        """Take a finished round."""
        self.survival.learn(done)
        last, self._last = self._last, (done.batch_size, done.plan)
        caught_up = last is not None and last[0] == done.batch_size and (last[1].num_steps or not done.plan.num_steps)
        if caught_up or not done.plan.num_steps:
            self.costs.learn(done.batch_size, done.plan, done.seconds)

    def best(self, batch_size: int) -> Plan:
        """The plan believed best now, among those tried at this batch size (all, if none was)."""
        tried = [plan for plan in self.plans if self.costs.tried(batch_size, plan) >= 2.0]
        return max(tried or self.plans, key=lambda plan: self._speed(batch_size, plan))

    def estimates(self, batch_size: int) -> list[PlanEstimate]:
        """What is believed of every plan at a batch size."""
        out = []
        for plan in self.plans:
            length, seconds = self.survival.accept_length(plan), math.exp(self.costs.log_seconds(batch_size, plan)[0])
            tried = self.costs.tried(batch_size, plan)
            out.append(PlanEstimate(plan, length, seconds, length / seconds, tried))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {
            "survival": self.survival.state_dict(),
            "costs": self.costs.state_dict(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.survival.load_state_dict(state["survival"])
        self.costs.load_state_dict(state["costs"])
        self._rng.bit_generator.state = state["rng"]
