"""Simulated evaluation of choosers: a profile under a changing load, with the same random numbers for all choosers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.table import ClairvoyantLength
from specrl.core.batch_schedule import Phase, batch_sizes, parse_traffic
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout
from specrl.evaluation.scores import Evaluation, Score, score, speedup_interval
from specrl.evaluation.trajectory import Floats, Ints, PlainSeconds, PlanSeconds, Trajectory
from specrl.simulation.acceptance_model import accept_length
from specrl.simulation.engine import Requests, SimulatedEngine, SimulatedSession
from specrl.simulation.profile import Profile
from specrl.simulation.shifts import Shift, cost_factor, log_odds_change, parse_shifts

LOAD = "1x20,8x20,2x20,32x20,4x20,16x20"  # batch size x rounds
MakeChooser = Callable[[SimulatedSession], PlanChooser]


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
        cycle = self.cycle_rounds
        require(self.rounds >= cycle, "schedule.rounds", f"at least one cycle of the batch sizes, {cycle}", self.rounds)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of one cycle."""
        return parse_traffic(self.batch_sizes)

    @property
    def cycle_rounds(self) -> int:
        """Rounds of one cycle."""
        return sum(phase.rounds for phase in self.phases)


class ReplayChooser(PlanChooser):
    """Repeats recorded choices.

    Args:
        plans: the plans.
        choices: [R] int64, indices into `plans`.
    """

    def __init__(self, plans: tuple[Plan, ...], choices: Ints) -> None:
        self.plans = plans
        self._choices = iter(choices.tolist())

    def choose(self, observation: Observation) -> Plan:
        """Return the next choice."""
        return self.plans[next(self._choices)]


class SimulatedBackend:
    """Runs choosers on a profile; the expected seconds of every plan in every round are known.

    Args:
        profile: costs and acceptance of rounds.
        phases: of the load, repeated.
        rounds: R, of a run.
        shifts: changes of costs and acceptance, by round.

    Attributes:
        name: of the profile.
        plans: the plans with costs at all batch sizes of the load.
        known: the plans, and their costs and accept lengths before any shift, which choosers may use.
        expected: [R, plans] expected seconds in each round.

    Raises:
        ValueError: the profile has costs of fewer than two plans at the load's batch sizes.
    """

    def __init__(self, profile: Profile, phases: Sequence[Phase], rounds: int, shifts: Sequence[Shift] = ()) -> None:
        self.name, self._profile, self._rounds, self._shifts = profile.name, profile, rounds, tuple(shifts)
        self._batch_sizes: Ints = np.array(list(islice(batch_sizes(phases), rounds)))
        self._sizes: list[int] = np.unique(self._batch_sizes).tolist()
        engine = self._engine()
        self.plans = tuple(plan for plan in profile.plans if engine.supports(plan))
        if len(self.plans) < 2:
            raise ValueError(
                f"profile {profile.name!r} must have costs of two plans at batch sizes {self._sizes[0]} to "
                f"{self._sizes[-1]}, but got {len(self.plans)}; use other batch sizes"
            )
        costs = {b: {plan: profile.cost(b, plan).seconds for plan in self.plans} for b in self._sizes}
        self.known = Known(self.plans, costs, {plan: profile.accept_length(plan) for plan in self.plans})
        self._step_s = {b: profile.cost(b, None).seconds for b in self._sizes}
        size = np.searchsorted(self._sizes, self._batch_sizes)
        self._t0: Floats = np.array(list(self._step_s.values()))[size]  # [R]
        starts = sorted({0, *(shift.at for shift in self._shifts if shift.at < rounds)})
        expected = [self._expected(start) for start in starts]
        period = np.searchsorted(starts, np.arange(rounds), side="right") - 1
        self.expected = PlanSeconds(
            np.array([each.plain_s for each in expected])[period, size],
            np.array([each.round_s for each in expected])[period, size],
        )

    def _engine(self) -> SimulatedEngine:
        return SimulatedEngine(self._profile, batch_sizes=(self._sizes[0], self._sizes[-1]), shifts=self._shifts)

    def _expected(self, rounds: int) -> PlanSeconds:
        """Return [sizes, plans] after so many rounds."""
        profile, change = self._profile, float(log_odds_change(self._shifts, rounds))
        lengths = []
        for plan in self.plans:
            odds = [b + change for b in profile.odds(plan)]
            lengths.append(accept_length(odds, profile.request_spread, profile.drift) if odds else 1.0)
        factor = cost_factor(self._shifts, rounds, np.array([plan.num_steps for plan in self.plans]))
        costs = np.array([[self.known.costs[size][plan] for plan in self.plans] for size in self._sizes])
        return PlanSeconds(np.outer(list(self._step_s.values()), lengths), costs * factor)

    def evaluate(self, choosers: Sequence[str], seeds: Sequence[int], advance: Callable[[float], None]) -> Evaluation:
        """Score choosers, each with every seed, and compute the bounds.

        `advance` is called with the number of runs that were done since the last call.
        """
        plans, expected = self.plans, self.expected
        longest = max(plan for plan in plans if plan.is_chain)
        makers: dict[str, MakeChooser] = {
            "best table": lambda session: ReplayChooser(plans, expected.best_table()),
            "best plan": lambda session: ReplayChooser(plans, expected.best_plan()),
            "clairvoyant": lambda session: ClairvoyantLength(
                plans, self.known.costs, lambda: session.foresee(longest).tolist()
            ),
        }
        scores: dict[str, list[Score]] = {name: [] for name in choosers}
        bounds: dict[str, list[float]] = {name: [] for name in makers}
        for seed in seeds:
            for name in choosers:
                scores[name].append(self.score(make_chooser(name, self.known, seed), seed))
                advance(1.0)
            for name, make in makers.items():
                bounds[name].append(self.speedup(self.run(make, seed)))
        means = {name: speedup_interval(np.array(speedups)).value for name, speedups in bounds.items()}
        return Evaluation(self.name, scores, means)

    def score(self, chooser: PlanChooser, seed: int) -> Score:
        """Score one run."""
        trajectory = self.run(lambda session: chooser, seed)
        return score(np.array([self.speedup(trajectory)]), self.expected, trajectory.choices)

    def speedup(self, trajectory: Trajectory) -> float:
        """Return the speedup Σ N · t0(B) / B ÷ Σ Δt of a run."""
        plain_s = (trajectory.tokens * self._t0 / self._batch_sizes).sum()
        return float(plain_s / trajectory.seconds.sum())

    def run(self, make: MakeChooser, seed: int) -> Trajectory:
        """Run the chooser that `make` returns for the session; a seed determines all random numbers."""
        engine, (first, *_) = self._engine(), self._batch_sizes.tolist()
        requests = Requests.of(self._profile)
        session = engine.start(requests, batch_size=first, max_batch_size=self._sizes[-1], seed=seed)
        rollout = Rollout(
            session,
            self.plans,
            PlainSeconds(self._step_s),
            batch_sizes=iter(self._batch_sizes.tolist()),
            result_delay=engine.result_delay,
        )
        steps = list(islice(rollout.play(make(session), engine.clock), self._rounds))
        session.close()
        return Trajectory.of(steps, self.plans)
