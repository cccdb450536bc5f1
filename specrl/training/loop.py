"""The online loop: serve a workload, choose each round's plan, learn the draft from the traffic, measure.

One round after the other on one device: requests are served at a moving batch size; after every `sync_every`
finished requests the learner takes the traces, outside every timed window, and its new weights serve from the next
round on, where `updates` lets them. Plain decoding is re-measured between rounds at the batch size and context that
the session has.

A session ends at a checkpoint (`rest`) and the next one begins (`begin`): what is in flight then is thrown away, the
stream of requests goes on behind it, and sampling gets a seed of the requests served. So a run that was interrupted at
a checkpoint and one that was not do the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from specrl.agents.draft.learner import OnlineLearner
from specrl.core.batch_schedule import Phase, batch_sizes
from specrl.core.interfaces import DraftLearner, Engine, PlanChooser, Request, Session, Workload
from specrl.core.observation import Observer
from specrl.core.plain_cost import PlainCost
from specrl.core.round import Round
from specrl.core.statistics import Interval, ratio_of_sums
from specrl.training.deploy import Always, Better, Updates
from specrl.training.drift_watch import DriftWatch
from specrl.training.plan_costs import plan_costs

STRETCH = 16  # rounds that are resampled together for an interval


@dataclass(slots=True)
class Tally:
    """What recent rounds at one batch size came to: speedup as a ratio of sums, ΣN·t0/B ÷ ΣΔt."""

    saved: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=400))
    rounds: int = 0

    def add(self, done: Round, plain_s: float, thinking_s: float) -> None:
        """Take a round, its baseline and the chooser's time."""
        per_request = float(done.tokens.sum()) / done.batch_size
        self.saved.append((per_request * plain_s, done.seconds + thinking_s, per_request))
        self.rounds += 1

    def sums(self) -> tuple[float, float, float]:
        """Seconds of plain decoding for the tokens, seconds spent, tokens per request; over the last 400 rounds."""
        plain, spent, tokens = np.array(self.saved).sum(0).tolist() if self.saved else (0.0, 0.0, 0.0)
        return plain, spent, tokens

    @property
    def speedup(self) -> float:
        """Over the last 400 rounds; nan before the first."""
        plain, spent, _ = self.sums()
        return plain / spent if spent else float("nan")

    @property
    def round_s(self) -> float:
        """Mean seconds of a round over the last 400; nan before the first."""
        return self.sums()[1] / len(self.saved) if self.saved else float("nan")

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and round over the last 400 rounds."""
        return float(np.array(self.saved)[:, 2].mean()) if self.saved else float("nan")

    def intervals(self) -> tuple[Interval, Interval] | None:
        """Speedup and accept length with 95 % intervals, over stretches of 16 rounds; None: fewer than 8 of them.

        They say how much rounds vary; an error of the plain baseline, which all of them share, is not in them.
        """
        if len(self.saved) < 8 * STRETCH:
            return None
        plain, spent, tokens = np.array(self.saved).T
        stretch = np.arange(len(plain)) // STRETCH
        pairs = (plain, spent), (tokens, np.ones_like(tokens))
        speedup, accept_length = (
            ratio_of_sums(a, b, groups=stretch, resamples=1000, rng=np.random.default_rng(0)) for a, b in pairs
        )
        return speedup, accept_length


@dataclass(slots=True)
class Stream:
    """A workload's requests in one order, whatever sessions serve them (`specrl.core.interfaces.Workload`).

    Args:
        workload: where they come from.
        seed: of their order.
        taken: requests that are passed over, served earlier.
    """

    workload: Workload
    seed: int
    taken: int = 0
    refusing: list[int] = field(default_factory=list)  # requests of this session that nothing may be learnt from, by id
    _rest: Iterator[Request] | None = None

    def requests(self, seed: int) -> Iterator[Request]:
        """The requests from here on, whatever the seed; a session numbers its own from 0."""
        self.refusing.clear()
        if self._rest is None:
            self._rest = islice(self.workload.requests(self.seed), self.taken, None)
        for number, request in enumerate(self._rest):
            self.taken += 1
            if not request.learn:
                self.refusing.append(number)
            yield request


class OnlineLoop:
    """Composes an engine, a chooser and a learner over a workload.

    Args:
        engine: that decodes.
        workload: that is served, endlessly.
        chooser: of plans.
        learner: of the draft; None: the draft stays as it is.
        traffic: batch sizes over rounds, repeated.
        sync_every: finished requests between two calls of the learner.
        seed: of requests and sampling.
        baseline: plain costs to go on with.
        updates: when learnt weights serve; None: always.
        state: of a loop to go on from (`state_dict`).
    """

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        chooser: PlanChooser,
        learner: DraftLearner | None,
        traffic: Sequence[Phase],
        *,
        sync_every: int = 16,
        seed: int = 0,
        baseline: PlainCost | None = None,
        updates: Updates | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1 request, but got {sync_every}")
        self.engine, self.chooser, self.learner = engine, chooser, learner
        self.updates: Updates | None = updates
        if updates is None and learner is not None:
            self.updates = Always(engine, learner)
        self.baseline = baseline or PlainCost()
        self.tallies: dict[int, Tally] = {}
        self.metrics: dict[str, float] = {}
        self.rounds = self.requests = 0
        self.learn_s = self.serve_s = 0.0
        self.on_round: Callable[[Round, float], None] | None = None
        self.stream, self.drift = Stream(workload, seed), DriftWatch(seed)
        self._sync_every, self._unlearned = sync_every, 0
        self._traffic, self._seed = tuple(traffic), seed
        if state is not None:
            self._load_state_dict(state)
        self.begin()

    def begin(self) -> None:
        """Start a session where the last one rested."""
        phases = self._traffic
        self._schedule = islice(batch_sizes(phases), self.rounds % sum(phase.rounds for phase in phases), None)
        self._observer = Observer(self.chooser.plans)
        self._session: Session = self.engine.start(
            self.stream,
            batch_size=phases[0].batch_size,
            max_batch_size=max(phase.batch_size for phase in phases),
            seed=self._seed + self.requests,
            trace=self.learner is not None,
        )

    def rest(self) -> None:
        """Learn from what has finished, and end the session: between this and `begin` the state can be kept."""
        if self.learner is not None and self._unlearned:
            self._learn()
        if isinstance(self.updates, Better):
            self.updates.abandon()  # which may have begun just now
        self._session.close()
        self.drift.end_session()
        if isinstance(self.learner, OnlineLearner):
            self.learner.end_session()
        self.baseline.load_state_dict(self.baseline.state_dict())

    def step(self) -> Round:
        """One round, and what is due after it."""
        session, clock, updates = self._session, self.engine.clock, self.updates
        batch = next(self._schedule)
        if batch != session.batch_size:
            session.resize(batch)
        context = float(np.mean(session.context_lengths))
        self.baseline.tick(batch, context)
        if self.baseline.due(batch, context):
            sample = session.measure_plain()
            if sample is None:
                raise ValueError("the engine does not measure plain decoding between rounds; use one that does")
            self.baseline.add(sample)
        if updates is not None:
            updates.prepare()
        began = clock.now()
        plan = self.chooser.choose(self._observer.observe(batch, context))
        thinking_s = clock.now() - began
        done = session.round(plan if updates is None else updates.plan(batch, plan))
        plain_s = self.baseline.estimate(batch, context).seconds
        if updates is None or updates.took(done, plain_s):
            self.chooser.learn(done)
        self._observer.record(done, plain_s)
        self.tallies.setdefault(batch, Tally()).add(done, plain_s, thinking_s)
        self.rounds += 1
        self.requests += len(done.finished)
        self.serve_s += done.seconds + done.prefill_s + thinking_s
        self._unlearned += len(done.finished)
        self.drift.take(done)
        if self.on_round is not None:
            self.on_round(done, plain_s)
        if self.learner is not None and self._unlearned >= self._sync_every:
            self._learn()
        return done

    def _learn(self) -> None:
        """Hand the traces to the learner and serve what it learnt, if it may."""
        assert self.learner is not None and self.updates is not None
        began = self.engine.clock.now()
        self._unlearned = 0
        traces = self._session.drain()
        if isinstance(self.learner, OnlineLearner):
            if self.stream.refusing:
                self.learner.opt_out(self.stream.refusing)
                self.stream.refusing.clear()
            if self.learner.prices:
                self.learner.price(*plan_costs(self.chooser, self.tallies))
        if self.updates.trying and isinstance(self.learner, OnlineLearner):
            self.learner.take(traces)
        else:
            self.metrics = dict(self.learner.learn(traces))
            self.updates.offer()
        self.learn_s += self.engine.clock.now() - began

    def state_dict(self) -> dict[str, Any]:
        """What a loop that rests must know to go on, JSON-able; chooser, learner and baseline have their own."""
        return {
            "rounds": self.rounds,
            "requests": self.requests,
            "taken": self.stream.taken,
            "serve_s": self.serve_s,
            "learn_s": self.learn_s,
            "metrics": self.metrics,
            "drift": self.drift.state_dict(),
            "tallies": {str(batch): [tally.rounds, list(tally.saved)] for batch, tally in self.tallies.items()},
        }

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds, self.requests, self.stream.taken = state["rounds"], state["requests"], state["taken"]
        self.serve_s, self.learn_s, self.metrics = state["serve_s"], state["learn_s"], dict(state["metrics"])
        if "drift" in state:
            self.drift.load_state_dict(state["drift"])
        for batch, (rounds, saved) in state["tallies"].items():
            tally = self.tallies[int(batch)] = Tally(rounds=rounds)
            tally.saved.extend((plain, spent, tokens) for plain, spent, tokens in saved)

    def close(self) -> None:
        """End the session; the engine stays."""
        self._session.close()
