"""Online training: serve requests, learn the draft from them, and choose each round's plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.interfaces import Workload
from specrl.io.output import OutputDir
from specrl.training.config import CheckpointConfig, LogConfig, ServingConfig
from specrl.training.logger import Reporter, open_sinks
from specrl.training.run import Run
from specrl.training.vocabulary import make_draft
from specrl.workloads.stream import Shifting


def train_online(
    directory: OutputDir,
    *,
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    serving: ServingConfig,
    learner: LearnerConfig | None,
    checkpoint: CheckpointConfig,
    log: LogConfig,
    resume: bool = False,
    seed: int = 0,
) -> None:
    """Serve and learn, and write the results of the run to `directory` (see `specrl train`).

    Raises:
        ValueError: an argument out of range, or nothing to resume.
    """
    model = target.load(device=None if engine.is_local else "cpu")
    requests = workload.open(target.name, "train", ignore_eos=False)
    resumed = directory.path / "checkpoint" if resume else None
    first = make_draft(draft, model, requests, max_context=workload.max_context, seed=seed, checkpoint=resumed)
    opened = engine.open(
        target,
        first,
        plans=serving.all_plans(),
        max_context=workload.max_context,
        model=model,
        trace=learner is not None,
    )
    with closing(opened):
        run = Run.start(
            opened, model, first, requests, serving, target=target.name, learner=learner, seed=seed, resume=resumed
        )
        report = Reporter(run, directory, sinks=open_sinks(directory, log), part=_part_names(requests, workload.name))
        serve(report, serving, checkpoint)
    run.write_results(directory)


def serve(report: Reporter, serving: ServingConfig, checkpoint: CheckpointConfig) -> None:
    """Serve until enough requests have finished or the time is over, with a checkpoint at the end.

    Args:
        report: the run, its directory, and its log.
        serving: `requests` to finish, including those before a resumption, or `max_seconds` of this call, which is
            checked after each round.
        checkpoint: when to write checkpoints.
    """
    run, clock = report.run, report.run.loop.engine.clock
    deadline = clock.now() + (math.inf if serving.max_seconds is None else serving.max_seconds)
    saved, done = run.served, run.served >= serving.requests
    while not done:
        run.loop.step()
        done = run.served >= serving.requests or clock.now() >= deadline
        if done or run.served - saved >= checkpoint.interval:
            saved = run.served
            run.loop.end_session()
            report.line()
            run.save(report.directory.path, seconds=report.seconds, replay=checkpoint.keep_replay_buffer)
            if not done:
                run.loop.start_session()
        else:
            report.maybe()
    report.last()


def _part_names(source: Workload, name: str) -> Callable[[int], str] | None:
    """The name of the part of a stream that a request is in, by the number of the request; None: it has no parts."""
    if not isinstance(source, Shifting):
        return None
    names = [part.strip() for part in name.split(",")]
    return lambda number: names[source.part_of(number)]
