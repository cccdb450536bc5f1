"""Simulated evaluation of choosers: a profile under a load that moves, the same random numbers for every chooser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from specrl.agents.choosers.registry import Known
from specrl.agents.choosers.table import ClairvoyantLength
from specrl.core.batch_schedule import Phase, batch_sizes, parse_traffic
from specrl.core.interfaces import PlanChooser, Session
from specrl.core.observation import Observation
from specrl.core.plain_cost import PlainEstimate
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout
from specrl.core.round import Round
from specrl.evaluation.trajectory import Floats, Ints, PlanSeconds, Trajectory
from specrl.simulation.acceptance_model import accept_length
from specrl.simulation.engine import Requests, SimulatedEngine, SimulatedSession
from specrl.simulation.profile import Profile
from specrl.simulation.shifts import Shift

LOAD = "1x20,8x20,2x20,32x20,4x20,16x20"  # batch size x rounds


@dataclass(frozen=True)
class Schedule:
    """The load of a run: its batch sizes over the rounds.

    Args:
        batch_sizes: batch size x rounds, repeated.
        rounds: of a run; live, whole cycles of the batch sizes.
        shifts: in simulation, changes of costs and acceptance, as 'at=1200,cost=1.3,from_steps=3,log_odds=0;at=...'.

    Raises:
        ValueError: another form, or fewer rounds than one cycle of the batch sizes.
    """

    batch_sizes: str = LOAD
    rounds: int = 2400
    shifts: str = ""

    def __post_init__(self) -> None:
        parse_shifts(self.shifts)
        if self.rounds < self.cycle_rounds:
            raise ValueError(
                f"schedule.rounds must be at least one cycle of the batch sizes, {self.cycle_rounds}, "
                f"but got {self.rounds}"
            )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The stretches of the load, repeated."""
        return parse_traffic(self.batch_sizes)

    @property
    def cycle_rounds(self) -> int:
        """Rounds of one cycle of the phases."""
        return sum(phase.rounds for phase in self.phases)


def parse_shifts(text: str) -> tuple[Shift, ...]:
    """Read 'at=1200,cost=1.3,from_steps=3;at=1800,log_odds=-0.5'.

    Raises:
        ValueError: another form, or a number out of range.
    """
    out = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        found = dict(re.findall(r"([a-z_]+)=(-?[0-9.]+)", part))
        if set(found) - {"at", "cost", "from_steps", "log_odds"} or "at" not in found or len(found) != part.count("="):
            raise ValueError(f"a shift is written 'at=1200,cost=1.3,from_steps=3,log_odds=-0.5', but got {part!r}")
        at, steps = int(found["at"]), int(found.get("from_steps", 1))
        out.append(Shift(at, float(found.get("cost", 1.0)), steps, float(found.get("log_odds", 0.0))))
    return tuple(out)


class ReplayChooser(PlanChooser):
    """Repeats given choices.

    Args:
        plans: that are offered.
        choices: [R] int64, indices into `plans`.
    """

    def __init__(self, plans: tuple[Plan, ...], choices: Ints) -> None:
        self.plans = plans
        self._choices = iter(choices.tolist())

    def choose(self, observation: Observation) -> Plan:
        """The next of the choices."""
        return self.plans[next(self._choices)]

    def learn(self, done: Round) -> None:
        """Nothing is learnt."""


class ProfileBaseline:
    """The cost of plain decoding from a profile (`specrl.core.rollout.Baseline`)."""

    def __init__(self, step_s: dict[int, float]) -> None:
        self._estimates = {size: PlainEstimate(seconds, 0.0, 0) for size, seconds in step_s.items()}

    def update(self, session: Session, context: float) -> None:
        """Nothing is measured."""

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """Seconds of a plain step at this batch size."""
        return self._estimates[batch_size]


class ChooserSimulation:
    """Runs choosers on a profile, and knows the expected value of every plan in every round.

    Args:
        profile: costs and acceptance of rounds.
        phases: of the load, repeated.
        rounds: R, of a run.
        shifts: changes of costs and acceptance, by round.

    Attributes:
        plans: with costs at all batch sizes of the load.
        known: what a chooser is given: the plans, and their costs and accept lengths before any shift.
        t0: [R] float64, seconds of a plain step.
        expected: [R, plans], expected seconds in each round.

    Raises:
        ValueError: the profile has costs of fewer than two plans at the load's batch sizes.
    """

    def __init__(self, profile: Profile, phases: Sequence[Phase], rounds: int, shifts: Sequence[Shift] = ()) -> None:
        self.profile, self.rounds, self.shifts = profile, rounds, tuple(shifts)
        self.batch_sizes: Ints = np.array(list(islice(batch_sizes(phases), rounds)))
        self.sizes: list[int] = sorted(set(self.batch_sizes.tolist()))
        engine = self._engine()
        self.plans = tuple(plan for plan in profile.plans if engine.supports(plan))
        if len(self.plans) < 2:
            raise ValueError(
                f"a choice needs two plans with costs at batch sizes {self.sizes[0]} to {self.sizes[-1]}, "
                f"but profile {profile.name!r} has {len(self.plans)}; use batch sizes that it has costs for"
            )
        costs = {b: {plan: profile.cost(b, plan).seconds for plan in self.plans} for b in self.sizes}
        self.known = Known(self.plans, costs, {plan: profile.accept_length(plan) for plan in self.plans})
        self._step_s = {b: profile.cost(b, None).seconds for b in self.sizes}
        size = np.searchsorted(self.sizes, self.batch_sizes)
        self.t0: Floats = np.array(list(self._step_s.values()))[size]
        times = sorted({0, *(s.at for s in self.shifts if s.at < rounds)})
        by_time = [self._expected(at) for at in times]
        era = np.searchsorted(times, np.arange(rounds), side="right") - 1
        self.expected = PlanSeconds(*(np.array(seconds)[era, size] for seconds in zip(*by_time, strict=True)))

    def _engine(self) -> SimulatedEngine:
        return SimulatedEngine(self.profile, batch_sizes=(self.sizes[0], self.sizes[-1]), shifts=self.shifts)

    def _expected(self, at: int) -> PlanSeconds:
        """[sizes, plans] with the shifts up to round `at`."""
        active = [s for s in self.shifts if s.at <= at]
        log_odds = sum(s.log_odds for s in active)
        t0 = np.array(list(self._step_s.values()))
        out = PlanSeconds(np.empty((len(self.sizes), len(self.plans))), np.empty((len(self.sizes), len(self.plans))))
        for j, plan in enumerate(self.plans):
            odds = tuple(b + log_odds for b in self.profile.odds(plan))
            length = accept_length(odds, self.profile.request_spread, self.profile.drift) if odds else 1.0
            factor = np.prod([s.cost for s in active if plan.num_steps >= s.from_steps])
            out.plain_s[:, j] = length * t0
            out.round_s[:, j] = [self.known.costs[b][plan] * factor for b in self.sizes]
        return out

    def run(self, chooser: PlanChooser, seed: int) -> Trajectory:
        """Run a chooser; the same seed gives every chooser the same random numbers."""
        engine = self._engine()
        return self._rollout(chooser, engine, self._session(engine, seed))

    def run_oracle(self, seed: int) -> Trajectory:
        """Run the bound that knows how many drafts each round will accept, and costs before any shift."""
        engine = self._engine()
        session = self._session(engine, seed)
        longest = max(plan for plan in self.plans if plan.is_chain)
        oracle = ClairvoyantLength(self.plans, self.known.costs, lambda: session.foresee(longest).tolist())
        return self._rollout(oracle, engine, session)

    def best_table(self) -> ReplayChooser:
        """The bound that takes the best plan per batch size, shifts known."""
        return ReplayChooser(self.plans, (self.expected.plain_s / self.expected.round_s).argmax(1))

    def best_plan(self) -> ReplayChooser:
        """The bound that takes the best single plan over all rounds, shifts known."""
        best = int((self.expected.plain_s.sum(0) / self.expected.round_s.sum(0)).argmax())
        return ReplayChooser(self.plans, np.full(self.rounds, best))

    def speedup(self, trajectory: Trajectory) -> float:
        """Speedup Σ N · t0(B) / B ÷ Σ Δt of a run."""
        plain_s = (trajectory.tokens * self.t0 / self.batch_sizes).sum()
        return float(plain_s / trajectory.seconds.sum())

    def _session(self, engine: SimulatedEngine, seed: int) -> SimulatedSession:
        requests = Requests((self.profile.prompt_tokens,) * 2, (self.profile.max_new_tokens,) * 2)
        first, most = int(self.batch_sizes[0]), self.sizes[-1]
        return engine.start(requests, batch_size=first, max_batch_size=most, seed=seed)

    def _rollout(self, chooser: PlanChooser, engine: SimulatedEngine, session: SimulatedSession) -> Trajectory:
        rollout = Rollout(
            session,
            self.plans,
            ProfileBaseline(self._step_s),
            batch_sizes=iter(self.batch_sizes.tolist()),
            result_delay=engine.result_delay,
        )
        steps = list(islice(rollout.play(chooser, engine.clock), self.rounds))
        session.close()
        return Trajectory.of(steps, self.plans)
