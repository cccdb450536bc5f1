"""An engine as a Ray actor: it serves its own requests, chooses its own plans, and sends traces to the one learner."""

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
    """Settings of every engine."""

    target: TargetConfig  # on the CPU if it names no device
    workload: Callable[[], Workload]  # opens the requests on the engine's node
    serving: ServingConfig
    learner: LearnerConfig
    max_context: int  # most tokens of a request
    max_pending_calls: int = 2  # calls that the learner has not answered
    seed: int = 0  # of requests and sampling; every engine adds its own offset


@dataclass(frozen=True)
class BatchReport:
    """Rounds of an engine at one batch size."""

    plan: str  # chosen now
    speedup: float  # over plain decoding, of recent rounds
    accept_length: float  # tokens per request and round, of recent rounds
    rounds: int  # so far


@dataclass(frozen=True)
class EngineReport:
    """The work of an engine since it started."""

    engine: int  # its number
    node: str  # Ray's id of the node that it runs on
    requests: int  # finished
    rounds: int
    draft_version: int  # of the weights that serve
    batches: dict[int, BatchReport]  # by batch size
    counts: dict[str, float]  # `RemoteLearner.counts`


class EngineActor:
    """A `LocalEngine` that serves, for `ray.remote`.

    Args:
        number: of the engine, from 0 on.
        settings: of every engine.
        architecture: of the draft.
        learner: name of the `LearnerActor`; its newest weights serve first.
    """

    def __init__(self, number: int, settings: EngineSettings, architecture: DraftArchitecture, learner: str) -> None:
        import ray

        self._number = number
        handle, seed = ray.get_actor(learner), settings.seed + _SEED_STEP * number
        (published, weights), config, serving = newest_weights(handle), settings.learner, settings.serving
        self._chooser = serving.make_chooser(seed)
        assembler = Assembler(
            sample_rate=config.request_sample_rate, seed=seed, keep_rejected=config.rejected_weight > 0
        )
        newest = published.version, weights
        self._learner = RemoteLearner(handle, number, newest, assembler, settings.max_pending_calls)
        model = settings.target.load(device="cpu")
        self._loop = OnlineLoop(
            LocalEngine(model, Draft(architecture, weights), max_context=settings.max_context),
            settings.workload(),
            self._chooser,
            self._learner,
            parse_traffic(serving.batch_schedule),
            weight_sync_interval=serving.weight_sync_interval,
            seed=seed,
        )

    def serve(self, requests: int) -> EngineReport:
        """Serve until this number of further requests have finished."""
        until = self._loop.requests + requests
        while self._loop.requests < until:
            self._loop.step()
        return self.report()

    def report(self) -> EngineReport:
        """Return a report of the work so far."""
        import ray

        loop = self._loop
        batches = {
            batch: BatchReport(
                str(self._chooser.best(batch)), stats.total.speedup, stats.total.accept_length, stats.rounds
            )
            for batch, stats in sorted(loop.recent.items())
        }
        node, version = ray.get_runtime_context().get_node_id(), loop.engine.draft_version
        return EngineReport(self._number, node, loop.requests, loop.rounds, version, batches, self._learner.counts())

    def finish(self) -> EngineReport:
        """End the session and wait for the learner's last answers."""
        self._loop.close()
        self._learner.end_session()
        self._learner.poll(timeout_s=60.0)
        return self.report()
