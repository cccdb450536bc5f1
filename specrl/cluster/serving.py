"""Engines as actors: each serves a stream of its own, chooses its own plans, and feeds the one learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.learner import LearnerConfig
from specrl.agents.draft.sequences import Assembler
from specrl.cluster.learner import LIVES, Published
from specrl.cluster.outlet import Outlet
from specrl.cluster.weights import from_bytes
from specrl.core.batch_schedule import parse_traffic
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.models.config import DraftConfig
from specrl.models.draft import Draft
from specrl.models.target import load_target
from specrl.training.deploy import Always
from specrl.training.loop import OnlineLoop

_STREAM = 1_000_003  # between the seeds of two engines' streams
_FAREWELL_S = 60.0  # for the learner's last answers


@dataclass(frozen=True)
class Serving:
    """What every engine does.

    Args:
        target: as `load_target` takes it.
        workload: opens it, where the engine runs.
        plans: that a chooser may choose.
        chooser: 'adaptive', or one plan.
        traffic: batch sizes over rounds.
        max_context: tokens a request may reach.
        sync_every: finished requests between two calls of the learner.
        in_flight: calls that may wait for their answers.
        learner: how the learner learns: what of the traces it needs.
        seed: of requests and sampling, another one for every engine.
    """

    target: str
    workload: Callable[[], Workload]
    plans: str
    chooser: str
    traffic: str
    max_context: int
    sync_every: int
    in_flight: int
    learner: LearnerConfig
    seed: int


class Served(NamedTuple):
    """What an engine has done since it began.

    Attributes:
        engine: its number.
        node: Ray's name of the node that it runs on.
        requests: finished.
        rounds: run.
        draft_version: that serves.
        sums: by batch size, of recent rounds: seconds of plain decoding for their tokens, seconds spent, tokens per
            request, how many rounds these are of, and rounds ever.
        plans: by batch size, those chosen now.
        counts: of the outlet, and the learner's metrics as it heard them last.
    """

    engine: int
    node: str
    requests: int
    rounds: int
    draft_version: int
    sums: dict[int, tuple[float, float, float, int, int]]
    plans: dict[int, str]
    counts: dict[str, float]


class EngineActor:
    """A `LocalEngine` that serves, for `ray.remote`.

    Args:
        number: of the engine, from 0 on.
        doing: what it does.
        shape: of the draft.
        learner: name of the `LearnerActor`, whose newest weights serve first; it may be on its way back.
    """

    def __init__(self, number: int, doing: Serving, shape: DraftConfig, learner: str) -> None:
        import ray

        self.number = number
        handle = ray.get_actor(learner)
        (published, weights), config = newest(handle), doing.learner
        draft = Draft(shape, weights)
        engine = LocalEngine(load_target(doing.target), draft, max_context=doing.max_context)
        seed = doing.seed + _STREAM * number
        plans = parse_plans(doing.plans)
        self.chooser = (
            AdaptiveChooser(plans, seed=seed) if doing.chooser == "adaptive" else FixedPlan(Plan.parse(doing.chooser))
        )
        assembler = Assembler(sample=config.sample, seed=seed, rejected=config.rejected > 0)
        self.outlet = Outlet(handle, number, (published.version, weights), assembler, in_flight=doing.in_flight)
        updates = Always(engine, self.outlet)
        updates.offer()
        self.loop = OnlineLoop(
            engine,
            doing.workload(),
            self.chooser,
            self.outlet,
            parse_traffic(doing.traffic),
            sync_every=doing.sync_every,
            seed=seed,
            updates=updates,
        )
        self.outlet.refusing = self.loop.stream.refusing

    def serve(self, requests: int) -> Served:
        """Serve until so many more requests have finished."""
        until = self.loop.requests + requests
        while self.loop.requests < until:
            self.loop.step()
        return self.told()

    def told(self) -> Served:
        """What it has done so far."""
        import ray

        loop = self.loop
        sums = {batch: (*tally.sums(), len(tally.saved), tally.rounds) for batch, tally in sorted(loop.tallies.items())}
        return Served(
            self.number,
            ray.get_runtime_context().get_node_id(),
            loop.requests,
            loop.rounds,
            loop.engine.draft_version,
            sums,
            {batch: str(self.chooser.best(batch)) for batch in sums},
            {**self.outlet.metrics, **self.outlet.counts()},
        )

    def finish(self) -> Served:
        """End the session and hear the learner's last answers."""
        self.loop.close()
        self.outlet.end_session()
        self.outlet.look(_FAREWELL_S)
        return self.told()


def newest(learner: Any) -> tuple[Published, dict[str, Tensor]]:
    """What the learner published last, and the weights; waits for a learner that comes back."""
    import ray

    for _ in range(LIVES):
        found = Published(*ray.get(learner.newest.options(max_task_retries=LIVES).remote()))
        try:
            return found, from_bytes(ray.get(found.weights[0]))
        except ray.exceptions.ObjectLostError:  # it went in between
            continue
    raise RuntimeError(f"the learner's weights were lost {LIVES} times before they arrived")
