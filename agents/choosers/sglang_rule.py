"""SGLang's adaptive rule for the number of draft steps, as a baseline. NumPy only.

It follows sglang 0.5.23, `srt/speculative/adaptive_spec_params.py` (`--speculative-adaptive`). The rule ignores time:
it increases the number of drafts as long as they are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specrl.core.batch_schedule import reached_bound
from specrl.core.checks import require, require_known
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan, chains_of
from specrl.core.round import Round

# The defaults of `--speculative-adaptive`, by lower bound of the batch size.
DEFAULTS: Mapping[str, Any] = {
    "1": {"candidate_steps": [1, 3, 5, 7], "down_hysteresis": -0.25},
    "8": {"candidate_steps": [0, 1, 3], "down_hysteresis": 0.0},
    "32": {"candidate_steps": [0, 1], "down_hysteresis": 0.0},
    "64": {"candidate_steps": [0], "down_hysteresis": 0.0},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one tier, with SGLang's names and defaults."""

    candidate_steps: Sequence[int] = ()
    ema_alpha: float = 0.2  # weight of the newest round
    update_interval: int = 5  # rounds between decisions
    warmup_batches: int = 10  # rounds before the first decision
    down_hysteresis: float = -0.25  # added to the threshold for fewer steps
    up_hysteresis: float = 0.0  # added to the threshold for more steps
    ceiling_coeff: float = 0.0  # 0: no ceiling

    def __post_init__(self) -> None:
        steps = self.candidate_steps
        valid = {type(count) for count in steps} == {int} and min(steps) >= 0
        require(valid, "candidate_steps", "at least one whole number from 0 on", steps)


class Tier:
    """The number of steps at one range of batch sizes, from the moving mean e of correct drafts per request.

    Every `update_interval` rounds: go down while e <= c' - 1/2 + down_hysteresis for the next smaller candidate c' (if
    c' is 0: while e <= 1/2 + down_hysteresis); else go up while e > c - 1/2 + up_hysteresis for the present c. From 0
    steps, every decision tries the next candidate.
    """

    def __init__(self, settings: Settings, initial_steps: int) -> None:
        self.settings = settings
        steps = self.candidates = sorted(set(settings.candidate_steps))
        self.steps = initial_steps if initial_steps in steps else steps[len(steps) // 2]
        self.mean = float(self.steps - 1)
        self.rounds = 0

    def update(self, correct: Sequence[int]) -> None:
        """Add the correct drafts of each request of a round."""
        s = self.settings
        if self.steps > 0:
            self.mean = (1 - s.ema_alpha) * self.mean + s.ema_alpha * (sum(correct) / len(correct))
        self.rounds += 1
        since = self.rounds - s.warmup_batches
        if since > 0 and since % s.update_interval == 0:
            self.steps = self._try_drafting() if self.steps == 0 else self._decide()

    def _try_drafting(self) -> int:
        steps = self.candidates[min(1, len(self.candidates) - 1)]
        if steps > 0 and self.mean < 0:  # there were no drafts yet
            self.mean = float(steps - 1)
        return steps

    def _decide(self) -> int:
        s, steps = self.settings, self.candidates
        index = first = steps.index(self.steps)
        while index > 0 and self.mean <= (steps[index - 1] - 0.5 if steps[index - 1] else 0.5) + s.down_hysteresis:
            index -= 1
        if index == first:
            while index < len(steps) - 1 and self.mean > steps[index] - 0.5 + s.up_hysteresis:
                index += 1
        if s.ceiling_coeff > 0 and steps[index] <= self.steps:  # the ceiling never increases the number of steps
            ceiling = max(1, math.ceil(self.mean * s.ceiling_coeff))
            while index > 0 and steps[index] > ceiling:
                index -= 1
        return steps[index]


class SGLangRule(PlanChooser):
    """SGLang's adaptive rule as a plan chooser, on chains.

    Args:
        plans: the plans to choose from, at least one chain; only chains that are candidates are chosen.
        config: in the format of `--speculative-adaptive-config`: tiers by lower bound of the batch size, and settings
            of `Settings` in a tier or for all tiers. None: SGLang's defaults with the candidates among the plans; a
            tier without any has all chains.
        initial_steps: `--speculative-num-steps` of the server.
        graph_batch_sizes: captured batch sizes, to which a batch size is padded before its tier is looked up.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        *,
        config: Mapping[str, Any] | None = None,
        initial_steps: int = 3,
        graph_batch_sizes: Sequence[int] = (),
    ) -> None:
        self._chains = {plan.num_steps: plan for plan in chains_of(plans)}
        self._graphs, self._tiers = tuple(graph_batch_sizes), dict[int, Tier]()
        for bound, settings in _read_config(DEFAULTS if config is None else config).items():
            steps = [count for count in settings.candidate_steps if count in self._chains]
            known = config is None or len(steps) == len(settings.candidate_steps)
            require(known, "candidate_steps", "steps of the plans", settings.candidate_steps)
            self._tiers[bound] = Tier(replace(settings, candidate_steps=steps or list(self._chains)), initial_steps)
        used = {steps for tier in self._tiers.values() for steps in tier.candidates}
        self.plans = tuple(plan for plan in plans if plan.is_chain and plan.num_steps in used)

    def _tier(self, batch_size: int) -> Tier:
        padded = min((graph for graph in self._graphs if graph >= batch_size), default=batch_size)
        return self._tiers[reached_bound(self._tiers, padded)]

    def best(self, batch_size: int) -> Plan:
        return self._chains[self._tier(batch_size).steps]

    def choose(self, observation: Observation) -> Plan:
        return self.best(observation.batch_size)

    def learn(self, done: Round) -> None:
        self._tier(done.batch_size).update(done.correct_drafts.tolist())  # for any plan, as the original does


def _read_config(config: Mapping[str, Any]) -> dict[int, Settings]:
    """Return the settings of each tier by lower bound; the settings outside of tiers hold for all of them."""
    shared = {name: value for name, value in config.items() if not name.isdigit()}
    tiers = {int(name): {**shared, **tier} for name, tier in config.items() if name.isdigit()}
    require(len(tiers) > 0, "the config", 'of at least one tier such as "1": {"candidate_steps": [1, 3]}', list(config))
    for name in {name for tier in tiers.values() for name in tier}:
        require_known("a setting of the rule", name, Settings.__dataclass_fields__)
    return {bound: Settings(**tier) for bound, tier in tiers.items()}
