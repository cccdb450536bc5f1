"""The online loop: serve a workload, choose each round's plan, learn the draft from the traffic, measure.

One round after the other on one device: requests are served at a moving batch size; after every `sync_every`
finished requests the learner takes the traces, outside every timed window, and its new weights serve from the next
round on. Plain decoding is re-measured between rounds at the batch size and context that the session has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specrl.agents.base import DraftLearner, PlanChooser
from specrl.baseline import PlainCost
from specrl.engines.base import Engine, Workload
from specrl.observation import Observer
from specrl.rounds import Round
from specrl.traffic import Phase, batch_sizes


@dataclass(slots=True)
class Tally:
    """What recent rounds at one batch size came to: speedup as a ratio of sums, ΣN·t0/B ÷ ΣΔt."""

    saved: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=400))

    def add(self, done: Round, plain_s: float, thinking_s: float) -> None:
        """Take a round, its baseline and the chooser's time."""
        per_request = float(done.tokens.sum()) / done.batch_size
        self.saved.append((per_request * plain_s, done.seconds + thinking_s, per_request))

    @property
    def speedup(self) -> float:
        """Over the last 400 rounds; nan before the first."""
        plain, spent, _ = np.array(self.saved).sum(0) if self.saved else (np.nan, 1.0, 0.0)
        return float(plain / spent)

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and round over the last 400 rounds."""
        return float(np.array(self.saved)[:, 2].mean()) if self.saved else float("nan")


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
    ) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1 request, but got {sync_every}")
        self.engine, self.chooser, self.learner = engine, chooser, learner
        self.baseline = baseline or PlainCost()
        self.tallies: dict[int, Tally] = {}
        self.metrics: dict[str, float] = {}
        self.rounds = self.requests = 0
        self.learn_s = self.serve_s = 0.0
        self.on_round: Callable[[Round, float], None] | None = None
        self._sync_every, self._unlearned = sync_every, 0
        self._observer = Observer(chooser.plans)
        self._schedule = batch_sizes(traffic)
        most = max(phase.batch_size for phase in traffic)
        self._session = engine.start(
            workload, batch_size=traffic[0].batch_size, max_batch_size=most, seed=seed, trace=learner is not None
        )

    def step(self) -> Round:
        """One round, and what is due after it."""
        session, clock = self._session, self.engine.clock
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
        began = clock.now()
        plan = self.chooser.choose(self._observer.observe(batch, context))
        thinking_s = clock.now() - began
        done = session.round(plan)
        plain_s = self.baseline.estimate(batch, context).seconds
        self.chooser.learn(done)
        self._observer.record(done, plain_s)
        self.tallies.setdefault(batch, Tally()).add(done, plain_s, thinking_s)
        self.rounds += 1
        self.requests += len(done.finished)
        self.serve_s += done.seconds + done.prefill_s + thinking_s
        self._unlearned += len(done.finished)
        if self.on_round is not None:
            self.on_round(done, plain_s)
        if self.learner is not None and self._unlearned >= self._sync_every:
            self._learn()
        return done

    def _learn(self) -> None:
        """Hand the traces to the learner and serve what it learnt."""
        assert self.learner is not None
        began = self.engine.clock.now()
        self._unlearned = 0
        self.metrics = dict(self.learner.learn(self._session.drain()))
        version, weights = self.learner.weights()
        if version != self.engine.draft_version:
            self.engine.load_draft(weights, version=version)
        self.learn_s += self.engine.clock.now() - began

    def close(self) -> None:
        """End the session; the engine stays."""
        self._session.close()
