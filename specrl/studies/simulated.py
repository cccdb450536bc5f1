"""A study's simulated trial: a chooser of plans on profiles. No clock is read, so many may run at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.registry import make_chooser
from specrl.agents.choosers.survival import Survival
from specrl.commands.evaluate import LOAD, parse_shifts
from specrl.core.batch_schedule import Phase, parse_traffic
from specrl.evaluation.backends import Simulated
from specrl.evaluation.scores import Score
from specrl.simulation.profile import Profile, Shift, load_profile, shipped_profiles
from specrl.studies.objective import Measured, OnBlock


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of our chooser.

    Args:
        revisit: rounds, at any batch size, after which a plan that was not seen is tried again.
        survival_memory: rounds after which evidence of acceptance has faded to 1/e.
        version_memory: the share of that evidence kept when the draft's weights change.
        cost_memory: rounds of a plan at a batch size after which its cost has faded to 1/e.
        cost_drift: log standard deviation that a cost may have moved by in a thousand rounds unseen.
    """

    revisit: int = 600
    survival_memory: float = 1600.0
    version_memory: float = 0.97
    cost_memory: float = 250.0
    cost_drift: float = 0.02

    def __post_init__(self) -> None:
        if min(self.revisit, self.survival_memory, self.cost_memory) < 1 or not 0 < self.version_memory <= 1:
            raise ValueError(f"memories must be at least 1 round and version_memory in (0, 1], but got {self}")
        if not self.cost_drift > 0:
            raise ValueError(f"adaptive.cost_drift must be above 0, but got {self.cost_drift}")

    def apply(self, chooser: AdaptiveChooser) -> AdaptiveChooser:
        """A fresh chooser with these settings."""
        chooser.survival = Survival(self.survival_memory, self.version_memory)
        chooser.costs = Costs(chooser.plans, self.cost_memory, self.cost_drift)
        return chooser


@dataclass(frozen=True)
class Simulation:
    """A chooser, and what it plays."""

    profiles: Sequence[Profile]
    phases: Sequence[Phase]
    shifts: Sequence[Shift]
    chooser: str
    adaptive: AdaptiveSettings

    def measure(
        self, *, rounds: int, seeds: int, objective: str = "share", on_block: OnBlock | None = None
    ) -> Measured:
        """Play every profile `seeds` times; a block is a play.

        Returns:
            'share' of the best table's speed, 'end' (the same over the last quarter), 'speedup', 'regret' in rounds.
        """
        sources = [Simulated(profile, self.phases, rounds, self.shifts) for profile in self.profiles]
        blocks: dict[str, list[float]] = {"share": [], "end": [], "speedup": [], "regret": []}
        for seed in range(seeds):
            for source in sources:
                chooser = make_chooser(self.chooser, source.world.known, seed)
                if isinstance(chooser, AdaptiveChooser):
                    self.adaptive.apply(chooser)
                for name, value in _values(source.score(chooser, seed)).items():
                    blocks[name].append(value)
                if on_block is not None:
                    on_block(len(blocks[objective]) - 1, blocks[objective][-1])
        out = Measured()
        for name, samples in blocks.items():
            out.add(name, samples)
        return out


def simulated(
    *,
    profiles: tuple[str, ...] = (),
    chooser: str = "adaptive",
    traffic: str = LOAD,
    shifts: str = "",
    adaptive: AdaptiveSettings = AdaptiveSettings(),
) -> Simulation:
    """A chooser on profiles.

    Args:
        profiles: names or .json files; by default all that are shipped.
        chooser: by name, as `specrl evaluate` has them.
        traffic: batch size x rounds, repeated.
        shifts: of costs and acceptance, as `specrl evaluate` reads them.
        adaptive: settings of the chooser 'adaptive'.

    Raises:
        ValueError: an argument out of range.
    """
    found = [load_profile(name) for name in profiles or shipped_profiles()]
    return Simulation(found, parse_traffic(traffic), parse_shifts(shifts), chooser, adaptive)


def _values(score: Score) -> dict[str, float]:
    speedup = float(np.log(score.speedups).mean())
    return {"share": score.share, "end": score.end, "speedup": speedup, "regret": float(score.regret[-1])}
