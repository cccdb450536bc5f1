"""An engine as a Ray actor: it serves requests of its own, chooses its own plans, and feeds the one learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from specrl.agents.draft.config import LearnerConfig
from specrl.agents.draft.sequences import Assembler
from specrl.cluster.learner import RemoteLearner, newest_weights
from specrl.config import TargetConfig
from specrl.core.batch_schedule import parse_traffic
from specrl.core.interfaces import Workload
from specrl.decoding.engine import LocalEngine
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft
from specrl.training.config import ServingConfig
from specrl.training.loop import OnlineLoop

_SEED_STEP = 1_000_003  # between the seeds of two engines


@dataclass(frozen=True)
class EngineSettings:
    """Settings of every engine.

    Args:
        target: the model; on the CPU if it names no device.
        workload: opens the requests on the engine's node.
        serving: how they are served.
        learner: settings of the learner, which decide what the traces must hold.
        max_context: most tokens of a request.
        max_pending_calls: calls that the learner has not answered.
        seed: of requests and sampling; every engine adds an offset of its own.
    """

    target: TargetConfig
    workload: Callable[[], Workload]
    serving: ServingConfig
    learner: LearnerConfig
    max_context: int
    max_pending_calls: int = 2
    seed: int = 0


@dataclass(frozen=True)
class BatchReport:
    """Rounds of an engine at one batch size; all but `rounds` are of recent rounds.

    Attributes:
        plan: the plan chosen now.
        speedup: over plain decoding.
        accept_length: tokens per request and round.
        rounds: number of rounds so far.
    """

    plan: str
    speedup: float
    accept_length: float
    rounds: int


@dataclass(frozen=True)
class EngineReport:
    """An engine's work since it started.

    Attributes:
        engine: its number.
        node: Ray's id of the node that it runs on.
        requests, rounds: numbers of finished requests and of rounds.
        draft_version: of the weights that serve.
        batches: by batch size.
        counts: `RemoteLearner.counts`.
    """

    engine: int
    node: str
    requests: int
    rounds: int
    draft_version: int
    batches: dict[int, BatchReport]
    counts: dict[str, float]


class EngineActor:
    """A `LocalEngine` that serves, for `ray.remote`.

    Args:
        number: of the engine, from 0 on.
        settings: of every engine.
        shape: of the draft.
        learner: name of the `LearnerActor`, whose newest weights serve first.
    """

    def __init__(self, number: int, settings: EngineSettings, shape: DraftArchitecture, learner: str) -> None:
        import ray

        self._number = number
        handle, seed = ray.get_actor(learner), settings.seed + _SEED_STEP * number
        (published, weights), config, serving = newest_weights(handle), settings.learner, settings.serving
        self._chooser = serving.make_chooser(seed)
        self._learner = RemoteLearner(
            handle,
            number,
            (published.version, weights),
            Assembler(sample_rate=config.request_sample_rate, seed=seed, keep_rejected=config.rejected_weight > 0),
            max_pending_calls=settings.max_pending_calls,
        )
        model = settings.target.load(device="cpu")
        self._loop = OnlineLoop(
            LocalEngine(model, Draft(shape, weights), max_context=settings.max_context),
            settings.workload(),
            self._chooser,
            self._learner,
            parse_traffic(serving.batch_schedule),
            sync_every=serving.weight_sync_interval,
            seed=seed,
        )

    def serve(self, requests: int) -> EngineReport:
        """Serve until this many more requests have finished."""
        until = self._loop.requests + requests
        while self._loop.requests < until:
            self._loop.step()
        return self.report()

    def report(self) -> EngineReport:
        """The engine's work so far."""
        import ray

        loop = self._loop
        batches = {}
        for batch, stats in sorted(loop.recent.items()):
            total = stats.total
            plan = str(self._chooser.best(batch))
            batches[batch] = BatchReport(plan, total.speedup, total.accept_length, stats.rounds)
        return EngineReport(
            engine=self._number,
            node=ray.get_runtime_context().get_node_id(),
            requests=loop.requests,
            rounds=loop.rounds,
            draft_version=loop.engine.draft_version,
            batches=batches,
            counts=self._learner.counts(),
        )

    def finish(self) -> EngineReport:
        """End the session and wait for the learner's last answers."""
        self._loop.close()
        self._learner.end_session()
        self._learner.poll(timeout_s=60.0)
        return self.report()
