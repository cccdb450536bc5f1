"""A study's simulated trial: a chooser of plans on profiles. It reads no clock, so many may run at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.survival import Survival
from specrl.core.batch_schedule import parse_traffic
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.evaluation.simulation import LOAD, SimulatedBackend
from specrl.io.output import OutputDir
from specrl.simulation.profile import load_profile, shipped_profiles
from specrl.simulation.shifts import parse_shifts
from specrl.studies.goals import Budget, Measured, OnBlock, measure_blocks

if TYPE_CHECKING:
    from specrl.studies.config import Study


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the chooser 'adaptive'.

    Args:
        revisit: rounds, at any batch size, after which a plan that was not chosen is tried again.
        survival_memory: rounds after which an observed acceptance has 1/e of its weight.
        version_memory: factor on that weight when the draft's weights change.
        cost_memory: rounds of a plan at a batch size after which an observed cost has 1/e of its weight.
        cost_drift: log standard deviation of the change of a cost in a thousand rounds without an observation.
    """

    revisit: int = 600
    survival_memory: float = 1600.0
    version_memory: float = 0.97
    cost_memory: float = 250.0
    cost_drift: float = 0.02

    def __post_init__(self) -> None:
        for name in ("revisit", "survival_memory", "cost_memory"):
            require(getattr(self, name) >= 1, f"adaptive.{name}", "at least 1 round", getattr(self, name))
        require(0 < self.version_memory <= 1, "adaptive.version_memory", "in (0, 1]", self.version_memory)
        require(self.cost_drift > 0, "adaptive.cost_drift", "above 0", self.cost_drift)

    def make(self, known: Known, seed: int) -> AdaptiveChooser:
        """Return a new chooser with these settings."""
        chooser = AdaptiveChooser(known.plans, seed=seed, revisit=self.revisit)
        chooser.survival = Survival(self.survival_memory, self.version_memory)
        chooser.costs = Costs(chooser.plans, self.cost_memory, self.cost_drift)
        return chooser


@dataclass(frozen=True)
class SimulatedTrial:
    """A chooser on profiles.

    Args:
        profiles: names or .json files; by default all that are shipped.
        chooser: by name, as in `specrl evaluate`.
        traffic: batch size x rounds, repeated.
        shifts: of costs and acceptance, as in `specrl evaluate`.
        adaptive: settings of the chooser 'adaptive'.
    """

    OBJECTIVES: ClassVar[Mapping[str, Literal["maximize", "minimize"]]] = {
        "share": "maximize",
        "end": "maximize",
        "speedup": "maximize",
        "regret": "minimize",
    }
    device: ClassVar[str | None] = None  # no clock is read

    profiles: tuple[str, ...] = ()
    chooser: str = "adaptive"
    traffic: str = LOAD
    shifts: str = ""
    adaptive: AdaptiveSettings = AdaptiveSettings()

    def measure(self, study: Study, out: OutputDir, on_block: OnBlock | None = None) -> Measured:
        """Simulate every profile `budget.seeds` times; a block is one simulation.

        Returns:
            'share' of the speed of the best plan per batch size, 'end' (the same over the last quarter), 'speedup' and
            'regret' in rounds.
        """
        return measure_blocks(self._blocks(study.budget), study.objectives[0], on_block)

    def _blocks(self, budget: Budget) -> Iterator[dict[str, float]]:
        phases, shifts = parse_traffic(self.traffic), parse_shifts(self.shifts)
        profiles = [load_profile(name) for name in self.profiles or shipped_profiles()]
        sources = [SimulatedBackend(profile, phases, budget.rounds, shifts) for profile in profiles]
        for seed in range(budget.seeds):
            for source in sources:
                score = source.score(self._chooser(source.known, seed), seed)
                yield {
                    "share": score.share,
                    "end": score.end,
                    "speedup": float(np.log(score.speedups).mean()),
                    "regret": float(score.regret[-1]),
                }

    def _chooser(self, known: Known, seed: int) -> PlanChooser:
        if self.chooser == "adaptive":
            return self.adaptive.make(known, seed)
        return make_chooser(self.chooser, known, seed)
