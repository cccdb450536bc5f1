"""Live evaluation of choosers: plain decoding, every chooser and every single plan in turns under one load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.batch_schedule import Phase, batch_sizes
from specrl.core.checks import require
from specrl.core.interfaces import Engine, PlanChooser, Session, Workload
from specrl.core.plan import PLAIN, Plan
from specrl.core.rollout import Rollout, Step
from specrl.evaluation.regret import CycleSpeedups, concatenate_cycles, cycle_speedups
from specrl.evaluation.scores import Evaluation, Score, score
from specrl.evaluation.trajectory import PlainSeconds, Trajectory, plan_seconds
from specrl.measure.arms import open_engine
from specrl.measure.paired import SessionPool


class LiveBackend:
    """Runs choosers on an engine. Bounds and regret are estimated from runs of every single plan, in turns with them.

    The plan that was measured as best is on average slightly worse than measured, so the bounds are slightly too high.

    Args:
        engine: decodes; one with `single_session` continues the same requests for all choosers.
        workload: prompts.
        plans: the plans to choose from.
        phases: of the load; one repetition of them is a cycle.
        cycles: number of cycles for each seed.
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
        require(cycles >= 2, "cycles of the load", "at least 2 for an interval (raise rounds)", cycles)
        if wrong := [str(plan) for plan in plans if not engine.supports(plan)]:
            raise ValueError(f"plans must be supported by the engine, but {', '.join(wrong)} are not; leave them out")
        self.name, self._engine, self._workload = name, engine, workload
        self._plans, self._phases, self._cycles = plans, tuple(phases), cycles
        self._sizes = sorted({phase.batch_size for phase in phases})

    def evaluate(self, choosers: Sequence[str], seeds: Sequence[int], advance: Callable[[float], None]) -> Evaluation:
        """Score choosers, each with every seed, and compute the bounds (see `SimulatedBackend.evaluate`)."""
        fixed = {str(plan): FixedPlan(plan) for plan in self._plans}
        known = self._known(fixed)
        cycle_rounds = sum(phase.rounds + 1 for phase in self._phases)
        scores: dict[str, list[Score]] = {name: [] for name in choosers}
        bounds: dict[str, list[float]] = {"best table": [], "best plan": []}
        cycles: list[CycleSpeedups] = []
        for seed in seeds:
            arms: dict[str, PlanChooser] = {**fixed, **{name: make_chooser(name, known, seed) for name in choosers}}
            runs = self.run(arms, self._cycles, seed=seed, on_cycle=lambda: advance(len(choosers) / self._cycles))
            plain = runs[PLAIN]
            cycles.append(cycle_speedups(runs, choosers, self._plans, self._sizes, cycle_rounds))
            size = np.searchsorted(self._sizes, plain.batch_sizes)
            expected = plan_seconds(runs, self._plans, self._sizes)[size]  # [R, plans]
            bounds["best table"].append(expected.speedup(expected.best_table()))
            bounds["best plan"].append(expected.speedup(expected.best_plan()))
            for name in choosers:
                speedups = runs[name].block_speedups(plain, cycle_rounds)
                scores[name].append(score(speedups, expected, runs[name].choices))
        means = {name: float(np.exp(np.mean(np.log(speedups)))) for name, speedups in bounds.items()}
        return Evaluation(self.name, scores, means, concatenate_cycles(cycles))

    def run(
        self,
        choosers: Mapping[str, PlanChooser],
        cycles: int,
        *,
        seed: int = 0,
        on_cycle: Callable[[], None] | None = None,
    ) -> dict[str, Trajectory]:
        """Return the trajectory of every chooser, and of plain decoding under the name 'plain', on the same prompts.

        In each phase the choosers decode one after the other, and in the reverse order in the next phase, so that a
        drift of the machine affects all equally. The first round of a turn finds the caches in the state that another
        session left, and is not counted. `on_cycle` is called after each cycle.
        """
        engine, phases, sizes = self._engine, self._phases, self._sizes
        pool = SessionPool(self._workload, batch_size=phases[0].batch_size, max_batch_size=sizes[-1], seed=seed)
        baseline = PlainSeconds()
        plain_session = pool.open(engine, plain=True)
        for size in sizes:  # choosers see t0 from their first round on
            plain_session.resize(size)
            baseline.add(plain_session.round(Plan(0)))

        def play(chooser: PlanChooser, plans: Sequence[Plan], session: Session) -> Iterator[Step]:
            rounds = batch_sizes([Phase(phase.batch_size, phase.rounds + 1) for phase in phases])
            rollout = Rollout(session, plans, baseline, batch_sizes=rounds, result_delay=engine.result_delay)
            return rollout.play(chooser, engine.clock)

        rollouts = {PLAIN: play(FixedPlan(Plan(0)), (Plan(0),), plain_session)}
        for name, chooser in choosers.items():
            rollouts[name] = play(chooser, self._plans, pool.open(engine, plain=False))
        steps: dict[str, list[Step]] = {name: [] for name in rollouts}
        order = list(rollouts)
        for cycle in range(cycles):
            for number, phase in enumerate(phases):
                for name in order if (cycle + number) % 2 == 0 else reversed(order):
                    for step in islice(rollouts[name], phase.rounds + 1):
                        steps[name].append(step)
                        if name == PLAIN:
                            baseline.add(step.round)
            if on_cycle is not None:
                on_cycle()
        pool.close()
        counted = [turn > 0 for _ in range(cycles) for phase in phases for turn in range(phase.rounds + 1)]
        return {name: Trajectory.of(done, self._plans, counted) for name, done in steps.items()}

    def close(self) -> None:
        """Close the engine, and the servers that were launched for it."""
        self._engine.close()

    def _known(self, fixed: Mapping[str, PlanChooser]) -> Known:
        """Measure costs and accept lengths of the plans in two cycles, as a server does when it starts."""
        measured, plans = plan_seconds(self.run(fixed, 2), self._plans, self._sizes), self._plans
        costs = {b: dict(zip(plans, measured.round_s[i].tolist(), strict=True)) for i, b in enumerate(self._sizes)}
        plain_s = measured.plain_s
        t0 = plain_s[:, plans.index(Plan(0))] if Plan(0) in plans else plain_s.min(1)
        lengths = (plain_s / t0[:, None]).mean(0)
        return Known(plans, costs, dict(zip(plans, lengths.tolist(), strict=True)))


def open_live(
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    plans: tuple[Plan, ...],
    phases: Sequence[Phase],
    cycles: int,
) -> LiveBackend:
    """Open a live backend on prompts held out from training."""
    prompts = workload.open(target.name, "held_out")
    opened = open_engine(engine, target, draft, workload, plans)
    name = "live" if engine.is_local else f"live-{engine.name}"
    return LiveBackend(opened, prompts, plans, phases, cycles, name=name)
