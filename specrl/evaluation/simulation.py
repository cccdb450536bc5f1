"""Choosers at play: many rounds of a moving load each, simulated on common random numbers or live in turns."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.registry import Known
from specrl.agents.choosers.table import ClairvoyantLength
from specrl.core.batch_schedule import Phase, batch_sizes
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation, Observer
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.simulation.acceptance_model import accept_length
from specrl.simulation.engine import Requests, SimulatedEngine, SimulatedSession
from specrl.simulation.profile import Profile, Shift

LOAD = "1x20,8x20,2x20,32x20,4x20,16x20"  # batch size x rounds
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True)
class Play:
    """What a chooser chose in R rounds, and what came of it.

    Attributes:
        batches: [R], batch sizes.
        choices: [R], plans as indices into the plans on offer; -1: plain decoding.
        tokens: [R], committed and kept, of all requests.
        seconds: [R].
        counted: [R], 0 where a round only warms the caches up after another session's turn.
    """

    batches: list[int] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)

    def add(self, done: Round, choice: int, counted: bool = True) -> None:
        """Take a finished round."""
        self.batches.append(done.batch_size)
        self.choices.append(choice)
        self.tokens.append(int(done.tokens.sum()))
        self.seconds.append(done.seconds)
        self.counted.append(counted)


class Replayed:
    """A chooser that repeats recorded choices [R], as indices into `plans`."""

    def __init__(self, plans: tuple[Plan, ...], choices: Sequence[int]) -> None:
        self.plans, self._choices, self._round = plans, choices, 0

    def choose(self, observation: Observation) -> Plan:
        """The next recorded plan."""
        plan = self.plans[self._choices[self._round]]
        self._round += 1
        return plan

    def learn(self, done: Round) -> None:
        """Nothing."""


class World:
    """A profile under a moving load: what is on offer, what the truth is at each round, and plays in it.

    Args:
        profile: what rounds cost and accept.
        phases: of the load, repeated for ever.
        rounds: of a play.
        shifts: of costs and acceptance, by round.

    Raises:
        ValueError: the profile does not know enough plans at the load's batch sizes.
    """

    def __init__(self, profile: Profile, phases: Sequence[Phase], rounds: int, shifts: Sequence[Shift] = ()) -> None:
        self.profile, self.rounds, self.shifts = profile, rounds, tuple(shifts)
        self.batches: Ints = np.array(list(islice(batch_sizes(phases), rounds)))
        self.sizes = sorted(set(self.batches.tolist()))
        engine = SimulatedEngine(profile, batch_sizes=(self.sizes[0], self.sizes[-1]))
        self.plans = tuple(plan for plan in profile.plans if engine.supports(plan))
        if len(self.plans) < 2:
            raise ValueError(
                f"a choice needs two plans with costs at batch sizes {self.sizes[0]} to {self.sizes[-1]}, "
                f"but profile {profile.name!r} has {len(self.plans)}; narrow the traffic"
            )
        costs = {b: {plan: profile.cost(b, plan).seconds for plan in self.plans} for b in self.sizes}
        self.known = Known(self.plans, costs, {plan: profile.accept_length(plan) for plan in self.plans})
        self.plain = np.array([profile.cost(b, None).seconds for b in self.sizes])
        self.load: Ints = np.searchsorted(self.sizes, self.batches)
        self._times = sorted({0, *(s.at for s in self.shifts if s.at < rounds)})
        tables = np.array([self._truth(at) for at in self._times])  # [times, 2, sizes, plans]
        era = np.searchsorted(self._times, np.arange(rounds), side="right") - 1
        self.earned, self.spent = tables[era, 0, self.load], tables[era, 1, self.load]  # [R, plans], seconds

    def _truth(self, at: int) -> Floats:
        """Once the shifts up to round `at` are in force: [2, sizes, plans] expected seconds.

        First those that plain decoding would take for a round's tokens, E[τ] · t0(B), then those of the round, T.
        """
        active = [s for s in self.shifts if s.at <= at]
        moved = sum(s.log_odds for s in active)
        out = np.empty((2, len(self.sizes), len(self.plans)))
        for j, plan in enumerate(self.plans):
            odds = tuple(b + moved for b in self.profile.odds(plan))
            length = accept_length(odds, self.profile.skill, self.profile.drift) if odds else 1.0
            dear = np.prod([s.cost for s in active if plan.num_steps >= s.from_steps])
            out[0, :, j] = length * self.plain
            out[1, :, j] = [self.known.costs[b][plan] * dear for b in self.sizes]
        return out

    def play(self, chooser: PlanChooser, seed: int, *, watch: Callable[[Round], None] | None = None) -> Play:
        """Let a chooser choose; the same seed is the same luck for every chooser."""
        engine = SimulatedEngine(self.profile, batch_sizes=(self.sizes[0], self.sizes[-1]), shifts=self.shifts)
        profile, index = self.profile, {plan: i for i, plan in enumerate(self.plans)}
        lengths = Requests((profile.prompt_tokens,) * 2, (profile.max_new_tokens,) * 2)
        most = self.sizes[-1]
        session = engine.start(lengths, batch_size=int(self.batches[0]), max_batch_size=most, seed=seed)
        if isinstance(chooser, Foreseeing):
            chooser.attach(session)
        observer, late, out = Observer(self.plans), deque[tuple[Round, float]](), Play()
        for batch, at in zip(self.batches.tolist(), self.load.tolist(), strict=True):
            session.resize(batch)
            context = sum(session.context_lengths) / batch
            plan = chooser.choose(observer.observe(batch, context))
            done = session.round(plan)
            out.add(done, index[plan])
            if watch is not None:
                watch(done)
            late.append((done, float(self.plain[at])))
            if len(late) > engine.result_delay:
                seen, plain_s = late.popleft()
                chooser.learn(seen)
                observer.record(seen, plain_s)
        engine.close()
        return out

    def best(self) -> Replayed:
        """The bound that takes the best plan per batch size, shifts known."""
        return Replayed(self.plans, (self.earned / self.spent).argmax(1).tolist())

    def single(self) -> Replayed:
        """The bound that takes the best single plan over the whole load, shifts known."""
        best = int((self.earned.sum(0) / self.spent.sum(0)).argmax())
        return Replayed(self.plans, [best] * self.rounds)

    def clairvoyant(self) -> PlanChooser:
        """The bound that is told how many drafts will stand; it knows costs before any shift."""
        return Foreseeing(self.plans, self.known)


class Foreseeing(ClairvoyantLength):
    """Clairvoyance over a simulated session."""

    def __init__(self, plans: tuple[Plan, ...], known: Known) -> None:
        longest = max(plan for plan in plans if plan.is_chain)
        super().__init__(plans, known.costs, lambda: self._session.foresee(longest).tolist())

    def attach(self, session: SimulatedSession) -> None:
        """The session to foresee."""
        self._session = session


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
