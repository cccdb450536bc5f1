"""The online loop: serve a workload, choose each round's plan, learn the draft from the traffic, measure.

Plain decoding is measured between rounds. The learner gets the traces outside all timed windows.

A session ends at a checkpoint (`end_session`), and the next one starts after it (`start_session`). Requests in flight
at a checkpoint are dropped, so a resumed run is identical to one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from specrl.core.batch_schedule import Phase, batch_sizes
from specrl.core.interfaces import DraftLearner, Engine, PlanChooser, PlanCost, Request, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Trace
from specrl.core.round_stats import RecentStats, RoundStats
from specrl.training.deploy import DeployIfBetter, Trial

_COUNTERS = ("rounds", "requests", "serve_s", "learn_s", "metrics")


@dataclass(slots=True)
class ResumableRequests:
    """The requests of a workload in one order that continues from session to session (a `Workload`)."""

    workload: Workload
    seed: int
    position: int = 0  # requests that sessions have started
    opted_out: list[int] = field(default_factory=list)  # ids of this session's requests that must not be learned from
    _rest: Iterator[Request] | None = None

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield the next requests, for any seed. A session numbers its requests from 0."""
        self.opted_out.clear()
        if self._rest is None:
            self._rest = islice(self.workload.requests(self.seed), self.position, None)
        for number, request in enumerate(self._rest):
            self.position += 1
            if not request.learn:
                self.opted_out.append(number)
            yield request


class OnlineLoop:
    """Serves a workload with an engine, a plan chooser and a draft learner.

    Args:
        learner: learns the draft; None: the draft does not change.
        traffic: batch sizes over rounds, repeated.
        weight_sync_interval: finished requests between two calls of the learner.
        seed: of requests and sampling.
        baseline: measured plain costs to continue with.
        deploy: decides when learned weights serve; None: the newest always serve.
        state: `state_dict` of a loop to continue.

    Attributes:
        recent: statistics of recent rounds by batch size.
        metrics: of the learner's last call.
        rounds, requests: rounds decoded and requests finished.
        serve_s, learn_s: seconds of serving, prefill and choosing plans included, and of learning.
        on_step: functions that are called after each round.
    """

    def __init__(
        self,
        engine: Engine,
        workload: Workload,
        chooser: PlanChooser,
        learner: DraftLearner | None,
        traffic: Sequence[Phase],
        *,
        weight_sync_interval: int = 16,
        seed: int = 0,
        baseline: PlainCost | None = None,
        deploy: DeployIfBetter | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.chooser, self.learner, self.deploy = engine, chooser, learner, deploy
        self.baseline = baseline or PlainCost()
        self.recent: dict[int, RecentStats] = {}
        self.metrics: dict[str, float] = {}
        self.rounds = self.requests = 0
        self.learn_s = self.serve_s = 0.0
        self.on_step: list[Callable[[Step], None]] = []
        self.stream = ResumableRequests(workload, seed)
        self._weight_sync_interval, self._unlearned = weight_sync_interval, 0
        self._traffic, self._seed = tuple(traffic), seed
        if state is not None:
            self._load_state_dict(state)
        self._serve_newest()
        self.start_session()

    def start_session(self) -> None:
        """Start a session that continues where the last one ended."""
        period = sum(phase.rounds for phase in self._traffic)
        self._session = self.engine.start(
            self.stream,
            batch_size=self._traffic[0].batch_size,
            max_batch_size=max(phase.batch_size for phase in self._traffic),
            seed=self._seed + self.requests,
            trace=self.learner is not None,
        )
        schedule = islice(batch_sizes(self._traffic), self.rounds % period, None)
        self._rollout = Rollout(self._session, self.chooser.plans, self.baseline, batch_sizes=schedule)
        self._steps = self._serve()

    def end_session(self) -> None:
        """Learn from the finished requests and end the session; afterwards `state_dict` is complete."""
        self._steps.close()
        if self.learner is not None:
            if self._unlearned:
                self._learn()
            self.learner.end_session()
        self._session.close()
        self.baseline.load_state_dict(self.baseline.state_dict())  # as in a resumed run

    def close(self) -> None:
        """End the session without learning; the engine stays open."""
        self._steps.close()
        self._session.close()

    def step(self) -> Step:
        """Decode one round, and learn if enough requests have finished."""
        return next(self._steps)

    def _serve(self) -> Trial:
        """Yield the rounds of the session: the chooser's, and those of a trial if the deploy policy starts one."""
        for step in self._rollout.play(self.chooser, self.engine.clock):
            self._count(step)
            trial = self._learn() if self._is_learning_due() else None
            yield step
            if trial is not None:
                with closing(trial):
                    for trial_step in trial:
                        self._count(trial_step)
                        if self._is_learning_due():
                            self._collect()
                        yield trial_step

    def _count(self, step: Step) -> None:
        done = step.round
        self.recent.setdefault(done.batch_size, RecentStats()).add(done, step.plain.seconds, step.thinking_s)
        self.rounds += 1
        self.requests += len(done.finished)
        self.serve_s += step.seconds + done.prefill_s
        self._unlearned += len(done.finished)
        for listener in self.on_step:
            listener(step)

    def _is_learning_due(self) -> bool:
        return self.learner is not None and self._unlearned >= self._weight_sync_interval

    def _learn(self) -> Trial | None:
        """Let the learner learn, and let the policy deploy its weights, perhaps after a trial."""
        assert self.learner is not None
        began = self.engine.clock.now()
        traces = self._drain(self.learner)
        if self.learner.wants_plan_costs:
            self.learner.set_plan_costs(*plan_costs(self.chooser, self.recent))
        self.metrics = dict(self.learner.learn(traces))
        self._serve_newest()
        trial = None if self.deploy is None else self.deploy.after_learning(self._rollout, self.chooser)
        self.learn_s += self.engine.clock.now() - began
        return trial

    def _serve_newest(self) -> None:
        """Serve the learner's newest weights, unless a deploy policy decides about them."""
        if self.learner is not None and self.deploy is None:
            version, weights = self.learner.weights()
            if version != self.engine.draft_version:
                self.engine.load_draft(weights, version=version)

    def _collect(self) -> None:
        """Give the traces of a trial to the learner, for its next call."""
        assert self.learner is not None
        began = self.engine.clock.now()
        self.learner.take(self._drain(self.learner))
        self.learn_s += self.engine.clock.now() - began

    def _drain(self, learner: DraftLearner) -> list[Trace]:
        """Return the traces since the last call, and pass the requests that opted out to the learner."""
        self._unlearned = 0
        traces = self._session.drain()
        learner.opt_out(self.stream.opted_out)
        self.stream.opted_out.clear()
        return traces

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two sessions, JSON-able; chooser, learner and baseline have their own."""
        recent = {str(batch): stats.state_dict() for batch, stats in self.recent.items()}
        return {**{name: getattr(self, name) for name in _COUNTERS}, "position": self.stream.position, "recent": recent}

    def _load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.stream.position = state["position"]
        for batch, stats in state["recent"].items():
            self.recent[int(batch)] = RecentStats()
            self.recent[int(batch)].load_state_dict(stats)


def plan_costs(chooser: PlanChooser, recent: Mapping[int, RecentStats]) -> tuple[list[PlanCost], float]:
    """Return the costs of the chains that ran, weighted by the rounds at each batch size, and the recent speedup (λ).

    If a chooser has no estimates, its best plan counts at each batch size, with the mean seconds of recent rounds. If
    its best plan is unknown too, there are no costs.
    """
    costs: list[PlanCost] = []
    everything = RoundStats()
    for batch, stats in recent.items():
        total = stats.total
        everything.merge(total)
        seconds = {e.plan: e.seconds for e in chooser.estimates(batch) if e.tried and e.plan.is_chain}
        best = chooser.best(batch)
        if not seconds and best is not None and best.is_chain:
            seconds[best] = total.round_s
        plain_s, share = total.plain_s / total.tokens_per_request, stats.rounds / max(1, len(seconds))
        costs += [PlanCost(batch, plan.num_steps, plain_s, round_s, share) for plan, round_s in seconds.items()]
    return costs, everything.speedup if everything.rounds else 1.0
