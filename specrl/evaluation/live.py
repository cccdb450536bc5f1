"""Live evaluation of choosers: plain decoding, every chooser and every single plan in turns under one load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from specrl.agents.choosers.table import FixedPlan
from specrl.core.batch_schedule import Phase, batch_sizes
from specrl.core.interfaces import Engine, PlanChooser, Session, Workload
from specrl.core.plain_cost import PlainEstimate
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Round
from specrl.evaluation.trajectory import PLAIN, Trajectory
from specrl.measure.paired import SessionPool

_NEWEST = 0.1  # weight of the newest plain round in t0


class PlainRounds:
    """The cost of plain decoding from rounds of a plain session (`specrl.core.rollout.Baseline`)."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def add(self, done: Round) -> None:
        """Take a round of plain decoding into the moving average of its batch size."""
        before = self._seconds.get(done.batch_size, done.seconds)
        self._seconds[done.batch_size] = before + _NEWEST * (done.seconds - before)

    def update(self, session: Session, context: float) -> None:
        """Nothing is measured between the rounds of choosers."""

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """Seconds of a plain step at this batch size, at any context."""
        return PlainEstimate(self._seconds[batch_size], 0.0, 1)


@dataclass
class _Arm:
    """The rollout of one chooser, and its rounds so far."""

    rollout: Iterator[Step]
    steps: list[Step] = field(default_factory=list)


def run_live(
    engine: Engine,
    workload: Workload,
    choosers: Mapping[str, PlanChooser],
    plans: Sequence[Plan],
    phases: Sequence[Phase],
    cycles: int,
    *,
    seed: int = 0,
    on_cycle: Callable[[int], None] | None = None,
) -> dict[str, Trajectory]:
    """The trajectory of every chooser, and of plain decoding under the name 'plain', on the same prompts.

    A cycle is one repetition of the phases. In each phase the choosers decode one after the other, there and back, so
    that a drift of the machine affects all equally. The first round of a turn finds the caches as another session left
    them and is not counted.

    Args:
        engine: decodes; one with `single_session` continues the same requests for all choosers.
        workload: prompts.
        choosers: by name.
        plans: that are offered.
        phases: of the load.
        cycles: number of cycles.
        seed: of prompts and sampling.
        on_cycle: called after each cycle with its number.
    """
    sizes = [phase.batch_size for phase in phases]
    pool = SessionPool(workload, batch_size=sizes[0], max_batch_size=max(sizes), seed=seed)
    baseline = PlainRounds()
    plain_session = pool.open(engine, plain=True)
    for size in sorted(set(sizes)):  # choosers see t0 from their first round on
        plain_session.resize(size)
        baseline.add(plain_session.round(Plan(0)))

    def arm(chooser: PlanChooser, offered: Sequence[Plan], session: Session) -> _Arm:
        rounds = batch_sizes([Phase(phase.batch_size, phase.rounds + 1) for phase in phases])
        rollout = Rollout(session, offered, baseline, batch_sizes=rounds, result_delay=engine.result_delay)
        return _Arm(rollout.play(chooser, engine.clock))

    arms = {PLAIN: arm(FixedPlan(Plan(0)), (Plan(0),), plain_session)}
    arms |= {name: arm(chooser, plans, pool.open(engine, plain=False)) for name, chooser in choosers.items()}
    order = list(arms.items())
    for cycle in range(cycles):
        for number, phase in enumerate(phases):
            for name, turn in order if (cycle + number) % 2 == 0 else reversed(order):
                for step in islice(turn.rollout, phase.rounds + 1):
                    turn.steps.append(step)
                    if name == PLAIN:
                        baseline.add(step.round)
        if on_cycle is not None:
            on_cycle(cycle + 1)
    pool.close()
    counted = [turn > 0 for _ in range(cycles) for phase in phases for turn in range(phase.rounds + 1)]
    return {name: Trajectory.of(turn.steps, plans, counted) for name, turn in arms.items()}
