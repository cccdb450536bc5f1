"""Online training on a Ray cluster: engines that serve, and a learner in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from specrl.cluster.connect import RayConfig, connected, need_resource, take_one
from specrl.cluster.engine import EngineActor, EngineReport, EngineSettings
from specrl.cluster.learner import CHECKPOINT, RESTARTS, LearnerActor, newest_weights
from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.io.output import OutputDir, show
from specrl.models.draft import Draft
from specrl.training.run import write_results


def train_on_ray(config: RayConfig, settings: EngineSettings, initial: Draft, out: OutputDir, *, resume: bool) -> None:
    """Serve `settings.serving.requests` requests on a cluster while the draft learns, and write the results.

    Raises:
        ValueError: no such cluster, too few resources, nothing to resume, or a learner's checkpoint without `resume`.
    """
    exists = (out.path / CHECKPOINT).exists()
    if exists != resume:
        state = "holds a learner's checkpoint" if exists else "holds none"
        remedy = "add --resume, or take another output_dir" if exists else "leave --resume out"
        raise ValueError(f"--resume needs a learner's checkpoint, but {str(out.path)!r} {state}; {remedy}")
    with connected(config.address):
        trainer = RayOnlineTrainer(config, settings, initial, out)
        trainer.serve(settings.serving.requests)
        results = trainer.finish()
    show(f"draft {results['draft_version']} learned from {results['taken']} requests by engine", f"written: {out.path}")


class RayOnlineTrainer:
    """Engines and their learner on the cluster that this process is connected to.

    Args:
        config: number of engines, and the resources of engines and learner.
        settings: of every engine.
        initial: the draft to start from.
        out: directory for the results and the learner's checkpoint.

    Attributes:
        learner: handle of the `LearnerActor`.
        rows: of log.csv.

    Raises:
        ValueError: the cluster has too few resources.
    """

    def __init__(self, config: RayConfig, settings: EngineSettings, initial: Draft, out: OutputDir) -> None:
        same = config.engine_resource == config.learner_resource
        need_resource(config.engine_resource, config.engines + same, "engines and their learner" if same else "engines")
        need_resource(config.learner_resource, 1, "learners")
        need_resource("CPU", config.engines + 1, "engines and their learner")
        from ray import remote

        self.settings, self.out, self.architecture = settings, out, initial.config
        self.rows: list[dict[str, object]] = []
        self._reports: dict[int, EngineReport] = {}
        directory, name = out.path.resolve(), f"specrl-learner-{uuid4()}"
        initial.save(directory / "first")
        common: dict[str, Any] = {"max_restarts": RESTARTS, "scheduling_strategy": "SPREAD"}
        learner = remote(LearnerActor).options(name=name, **take_one(config.learner_resource), **common)
        self.learner = learner.remote(
            settings.target.name,
            str(directory / "first"),
            settings.learner,
            str(directory),
            publish_every=settings.serving.weight_sync_interval,
            seed=settings.seed,
        )
        # a killed engine restarts and serves its share of requests again
        engine = remote(EngineActor).options(**take_one(config.engine_resource), **common, max_task_retries=RESTARTS)
        self._engines = [engine.remote(number, settings, initial.config, name) for number in range(config.engines)]
        self._clock = WallClock()
        self._began = self._clock.now()

    def serve(self, requests: int, *, print_line: Callable[[str], object] = show) -> None:
        """Serve requests, as fast as each engine can. log.csv gets a row whenever an engine has served its share."""
        from ray import get, wait

        share = max(1, min(4 * self.settings.serving.weight_sync_interval, requests // len(self._engines)))
        left, idle, busy = requests, list(self._engines), dict[Any, Any]()
        while left > 0 or busy:
            while idle and left > 0:
                engine, count = idle.pop(), min(share, left)
                left -= count
                busy[engine.serve.remote(count)] = engine
            (done, *_), _ = wait(list(busy), num_returns=1)
            idle.append(busy.pop(done))
            print_line(self._add(get(done)))

    def finish(self) -> dict[str, object]:
        """End, write draft/, plans.json, engines.json, learner.json and environment.json; return engines.json."""
        from ray import get

        for report in get([engine.finish.remote() for engine in self._engines]):
            self._add(report)
        get(self.learner.publish.options(max_task_retries=RESTARTS).remote())
        last, weights = newest_weights(self.learner)
        reports = [report for _, report in sorted(self._reports.items())]
        results: dict[str, object] = {
            "engines": [asdict(report) for report in reports],
            "taken": get(self.learner.taken.options(max_task_retries=RESTARTS).remote()),
            "draft_version": last.version,
            "learner": last.metrics,
        }
        self.out.write_json("engines.json", results)
        requests = sum(report.requests for report in reports)
        write_results(self.out, Draft(self.architecture, weights), self.table(), requests, self.settings.learner)
        return results

    def table(self) -> dict[int, Plan]:
        """Return for each batch size the plan of the engine that ran most rounds at it."""
        batches = [batch for report in self._reports.values() for batch in report.batches.items()]
        ordered = sorted(batches, key=lambda item: (item[0], item[1].rounds, item[1].plan))
        return {batch: Plan.parse(report.plan) for batch, report in ordered}

    def _add(self, report: EngineReport) -> str:
        """Write a row of log.csv, and return it as a line of text."""
        self._reports[report.engine] = report
        row: dict[str, object] = {
            "seconds": round(self._clock.now() - self._began, 1),
            "requests": sum(known.requests for known in self._reports.values()),
            "engine": report.engine,
            "node": report.node[:8],
            "engine_requests": report.requests,
            "draft_version": report.draft_version,
            **report.counts,
        }
        text = f"{row['seconds']:5} s  {row['requests']:5} requests  engine {report.engine}"
        text += f", draft {report.draft_version}"
        text += "".join(f"  {report.counts[key]:.0f} {key}" for key in ("dropped", "lost") if report.counts[key])
        for batch, b in report.batches.items():
            row |= {f"plan_{batch}": b.plan, f"speedup_{batch}": b.speedup, f"accept_length_{batch}": b.accept_length}
            text += f"  |  batch {batch}: {b.plan} {b.speedup:.2f}x, {b.accept_length:.2f} tokens"
        self.rows.append(row)
        self.out.write_csv("log.csv", self.rows)
        return text
