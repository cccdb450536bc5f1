"""Where choosers are evaluated: a simulation of a profile, or an engine on its own clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import Engine, PlanChooser, Workload
from specrl.core.plan import Plan
from specrl.evaluation.live import run_live
from specrl.evaluation.regret import CycleSpeedups, cycle_speedups
from specrl.evaluation.scores import Score, score, speedup_interval
from specrl.evaluation.simulation import ChooserSimulation
from specrl.evaluation.trajectory import PLAIN, PlanSeconds, Trajectory, block_speedups, plan_seconds
from specrl.measure.arms import open_engine
from specrl.simulation.profile import Profile
from specrl.simulation.shifts import Shift

Advance = Callable[[float], None]  # is called with the number of runs that were done since the last call


class Evaluation(NamedTuple):
    """Choosers on one source.

    Attributes:
        source: name of the profile, or 'live'.
        scores: by chooser, one for each seed.
        bounds: speedups of the bounds by name.
        cycles: live: for the oracle gap.
    """

    source: str
    scores: Mapping[str, Sequence[Score]]
    bounds: Mapping[str, float]
    cycles: CycleSpeedups | None


class Backend(Protocol):
    """A source of scores."""

    @property
    def name(self) -> str:
        """Of the source."""
        ...

    def evaluate(self, choosers: Sequence[str], seeds: Sequence[int], advance: Advance) -> Evaluation:
        """Score choosers, each with every seed."""
        ...

    def close(self) -> None:
        """Release the engine."""
        ...


class SimulatedBackend:
    """A profile; all choosers have the same random numbers with a seed.

    Args:
        profile: to simulate.
        phases: of the load, repeated.
        rounds: of a run.
        shifts: changes of costs and acceptance, by round.
    """

    def __init__(self, profile: Profile, phases: Sequence[Phase], rounds: int, shifts: Sequence[Shift] = ()) -> None:
        self.simulation, self.name = ChooserSimulation(profile, phases, rounds, shifts), profile.name

    def evaluate(self, choosers: Sequence[str], seeds: Sequence[int], advance: Advance) -> Evaluation:
        """Score choosers, and the best table, the best single plan and the oracle as bounds."""
        simulation = self.simulation
        scores: dict[str, list[Score]] = {name: [] for name in choosers}
        bounds: dict[str, list[float]] = {"best table": [], "best plan": [], "clairvoyant": []}
        for seed in seeds:
            for name in choosers:
                scores[name].append(self.score(make_chooser(name, simulation.known, seed), seed))
                advance(1.0)
            bounds["best table"].append(simulation.speedup(simulation.run(simulation.best_table(), seed)))
            bounds["best plan"].append(simulation.speedup(simulation.run(simulation.best_plan(), seed)))
            bounds["clairvoyant"].append(simulation.speedup(simulation.run_oracle(seed)))
        reached = {name: speedup_interval(np.array(found)).value for name, found in bounds.items()}
        return Evaluation(self.name, scores, reached, None)

    def score(self, chooser: PlanChooser, seed: int) -> Score:
        """Score one run."""
        trajectory = self.simulation.run(chooser, seed)
        speedup = np.array([self.simulation.speedup(trajectory)])
        return score(speedup, self.simulation.expected, trajectory.choices)

    def close(self) -> None:
        """Nothing is open."""


class LiveBackend:
    """An engine. Bounds and regret are estimated from runs of every single plan in the same session of measurements.

    The best of several measured plans is a little worse than it looks, so the bounds are too high rather than too low.

    Args:
        engine: decodes.
        workload: prompts.
        plans: that are offered.
        phases: of the load.
        cycles: repetitions of the phases, for each seed.
        name: of the source.

    Raises:
        ValueError: fewer than two cycles, or plans that the engine cannot run.
    """

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        plans: tuple[Plan, ...],
        phases: Sequence[Phase],
        cycles: int,
        *,
        name: str = "live",
    ) -> None:
        if cycles < 2:
            raise ValueError(f"an interval needs at least 2 cycles of the load, but got {cycles}; raise rounds")
        if wrong := [str(plan) for plan in plans if not engine.supports(plan)]:
            raise ValueError(f"plans must be ones that the engine runs, but it cannot run {', '.join(wrong)}")
        self.name, self._engine, self._workload = name, engine, workload
        self._plans, self._phases, self._cycles = plans, tuple(phases), cycles
        self._sizes = sorted({phase.batch_size for phase in phases})

    def evaluate(self, choosers: Sequence[str], seeds: Sequence[int], advance: Advance) -> Evaluation:
        """Score choosers, and the best table and the best single plan as bounds."""
        fixed = {str(plan): FixedPlan(plan) for plan in self._plans}
        known = self._known(fixed)
        cycle_rounds = sum(phase.rounds + 1 for phase in self._phases)
        scores: dict[str, list[Score]] = {name: [] for name in choosers}
        bounds: dict[str, list[float]] = {"best table": [], "best plan": []}
        cycles: list[CycleSpeedups] = []
        for seed in seeds:
            arms: dict[str, PlanChooser] = {**fixed, **{name: make_chooser(name, known, seed) for name in choosers}}
            found = self._run(arms, self._cycles, seed, lambda _: advance(len(choosers) / self._cycles))
            plain = found[PLAIN]
            cycles.append(cycle_speedups(found, choosers, self._plans, self._sizes, cycle_rounds))
            size = np.searchsorted(self._sizes, plain.batch_sizes)
            expected = PlanSeconds(
                *(part[size] for part in plan_seconds(found, self._plans, self._sizes))
            )  # [R, plans]
            rows, best = np.arange(len(size)), (expected.plain_s / expected.round_s).argmax(1)
            bounds["best table"].append(expected.plain_s[rows, best].sum() / expected.round_s[rows, best].sum())
            bounds["best plan"].append((expected.plain_s.sum(0) / expected.round_s.sum(0)).max())
            for name in choosers:
                speedups = block_speedups(plain, found[name], cycle_rounds)
                scores[name].append(score(speedups, expected, found[name].choices))
        reached = {name: float(np.exp(np.mean(np.log(values)))) for name, values in bounds.items()}
        return Evaluation(self.name, scores, reached, CycleSpeedups.concatenate(cycles))

    def close(self) -> None:
        """Close the engine, with servers that were launched for it."""
        self._engine.close()

    def _run(
        self, arms: Mapping[str, PlanChooser], cycles: int, seed: int, on_cycle: Callable[[int], None]
    ) -> dict[str, Trajectory]:
        return run_live(
            self._engine, self._workload, arms, self._plans, self._phases, cycles, seed=seed, on_cycle=on_cycle
        )

    def _known(self, fixed: Mapping[str, PlanChooser]) -> Known:
        """Costs and accept lengths of the plans, measured in two cycles as a server does when it starts."""
        plain_s, round_s = plan_seconds(self._run(fixed, 2, 0, lambda _: None), self._plans, self._sizes)
        costs = {b: dict(zip(self._plans, round_s[i].tolist(), strict=True)) for i, b in enumerate(self._sizes)}
        t0 = plain_s[:, self._plans.index(Plan(0))] if Plan(0) in self._plans else plain_s.min(1)
        lengths = (plain_s / t0[:, None]).mean(0)
        return Known(self._plans, costs, dict(zip(self._plans, lengths.tolist(), strict=True)))


def open_live(
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    plans: tuple[Plan, ...],
    phases: Sequence[Phase],
    cycles: int,
) -> LiveBackend:
    """A live backend on prompts held out from training."""
    prompts = workload.open(target.name, "held_out")
    opened = open_engine(engine, target, draft, workload, plans)
    name = "live" if engine.is_local else f"live-{engine.name}"
    return LiveBackend(opened, prompts, plans, phases, cycles, name=name)
