"""Online training over a Ray cluster: engines that serve, and a learner on a device of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from specrl.cluster.connect import need_resource, one_of
from specrl.cluster.learner import LIVES, LearnerActor
from specrl.cluster.serving import EngineActor, Served, Serving, newest
from specrl.core.clock import WallClock
from specrl.io.output import OutputDir, environment, show
from specrl.models.draft import Draft


class Fleet:
    """Engines and their learner on the cluster that this process is connected to.

    Args:
        doing: what every engine does.
        first: the draft to start from.
        out: where the learner keeps its checkpoint and results go.
        engines: how many.
        engine_device: a Ray resource that each engine owns one of: 'CPU', 'GPU' or a custom one.
        learner_device: the learner's.

    Raises:
        ValueError: fewer than one engine, or more than the cluster can place.
    """

    def __init__(
        self,
        doing: Serving,
        first: Draft,
        out: OutputDir,
        *,
        engines: int,
        engine_device: str = "CPU",
        learner_device: str = "CPU",
    ) -> None:
        if engines < 1:
            raise ValueError(f"engines must be at least 1, but got {engines}")
        same = engine_device == learner_device
        need_resource(engine_device, engines + same, "engines and their learner" if same else "engines")
        need_resource(learner_device, 1, "a learner")
        need_resource("CPU", engines + 1, "engines and their learner")
        import ray

        self.doing, self.out, self.first = doing, out, first
        start = out.path.resolve() / "first"
        first.save(start)
        self.rows: list[dict[str, object]] = []
        self._seen: dict[int, Served] = {}
        spread: dict[str, Any] = {"max_restarts": LIVES, "scheduling_strategy": "SPREAD"}
        name = f"specrl-learner-{uuid4()}"
        self.learner = (
            ray.remote(LearnerActor)
            .options(name=name, **one_of(learner_device), **spread)
            .remote(
                doing.target,
                str(start),
                doing.learner,
                str(out.path.resolve()),
                publish_every=doing.sync_every,
                seed=doing.seed,
            )
        )
        retried = {**spread, "max_task_retries": LIVES}  # an engine that was killed begins its share anew
        make = ray.remote(EngineActor).options(**one_of(engine_device), **retried)
        self.engines = [make.remote(number, doing, first.config, name) for number in range(engines)]
        self._clock = WallClock()
        self._began = self._clock.now()

    def serve(self, requests: int, *, say: Callable[[str], object] = show) -> None:
        """Serve so many requests, as fast as each engine can; a row of log.csv for every share that one has served."""
        import ray

        share = max(1, min(4 * self.doing.sync_every, requests // len(self.engines)))
        left, busy = requests, dict[Any, Any]()
        idle = list(self.engines)
        while left > 0 or busy:
            while idle and left > 0:
                engine, now = idle.pop(), min(share, left)
                left -= now
                busy[engine.serve.remote(now)] = engine
            (done, *_), _ = ray.wait(list(busy), num_returns=1)
            idle.append(busy.pop(done))
            say(self._took(Served(*ray.get(done))))

    def finish(self) -> dict[str, object]:
        """End, and write draft/, plans.json, engines.json and environment.json; what engines.json holds is returned."""
        import ray

        for told in ray.get([engine.finish.remote() for engine in self.engines]):
            self._took(Served(*told))
        ray.get(self.learner.publish.options(max_task_retries=LIVES).remote())
        last, weights = newest(self.learner)
        taken = ray.get(self.learner.taken.options(max_task_retries=LIVES).remote())
        Draft(self.first.config, weights).save(self.out.path / "draft")
        found: dict[str, object] = {
            "engines": [served._asdict() for _, served in sorted(self._seen.items())],
            "taken": taken,
            "draft_version": last.version,
            "learner": last.metrics,
        }
        self.out.write_json("engines.json", found)
        plans = {str(batch): plan for batch, plan in self.plans().items()}
        self.out.write_json("plans.json", {"plans": plans, "requests": sum(s.requests for s in self._seen.values())})
        self.out.write_json("learner.json", asdict(self.doing.learner))
        self.out.write_json("environment.json", environment())
        return found

    def plans(self) -> dict[int, str]:
        """For every batch size the plan of the engine that ran most rounds at it."""
        best: dict[int, tuple[int, str]] = {}
        for served in self._seen.values():
            for batch, (*_, rounds) in served.sums.items():
                best[batch] = max(best.get(batch, (0, "")), (rounds, served.plans[batch]))
        return {batch: plan for batch, (_, plan) in sorted(best.items())}

    def _took(self, served: Served) -> str:
        """Keep what an engine told, as a row and a line."""
        self._seen[served.engine] = served
        row: dict[str, object] = {
            "seconds": round(self._clock.now() - self._began, 1),
            "requests": sum(s.requests for s in self._seen.values()),
            "engine": served.engine,
            "node": served.node[:8],
            "engine_requests": served.requests,
            "draft_version": served.draft_version,
            **served.counts,
        }
        parts = []
        for batch, (plain, spent, tokens, rounds, _) in served.sums.items():
            row |= {f"plan_{batch}": served.plans[batch], f"speedup_{batch}": plain / spent}
            row |= {f"accept_length_{batch}": tokens / rounds}
            parts.append(f"batch {batch}: {served.plans[batch]} {plain / spent:.2f}x, {tokens / rounds:.2f} tokens")
        self.rows.append(row)
        self.out.write_csv("log.csv", self.rows)
        lost = {name: int(served.counts[name]) for name in ("dropped", "lost") if served.counts[name]}
        said = "".join(f"  {count} {name}" for name, count in lost.items())
        head = f"{row['seconds']:5} s  {row['requests']:5} requests  engine {served.engine}"
        return f"{head}, draft {served.draft_version}{said}  |  " + "  |  ".join(parts)
