"""Online training: serve requests, learn the draft from them, and choose each round's plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.interfaces import Workload
from specrl.io.output import OutputDir
from specrl.training.config import CheckpointConfig, LogConfig, ServingConfig
from specrl.training.logger import Reporter, sinks
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
    with ExitStack() as stack:
        launched = None
        if not engine.is_local:
            launched = engine.open(
                target, first, plans=serving.all_plans(), max_context=workload.max_context, trace=learner is not None
            )
            stack.callback(getattr(launched, "close", lambda: None))
        run = Run.start(
            model,
            first,
            requests,
            serving,
            target=target.name,
            learner=learner,
            max_context=workload.max_context,
            seed=seed,
            resume=resumed,
            engine=launched,
        )
        outputs = sinks(directory, tensorboard=log.tensorboard, wandb=log.wandb)
        report = Reporter(run, directory, sinks=outputs, part=_part_names(requests, workload.name))
        serve(
            run,
            report,
            directory,
            requests=serving.requests,
            checkpoint=checkpoint,
            max_seconds=serving.max_seconds,
        )
    run.write_results(directory)


def serve(
    run: Run,
    report: Reporter,
    directory: OutputDir,
    *,
    requests: int,
    checkpoint: CheckpointConfig,
    max_seconds: float | None = None,
) -> None:
    """Serve until `requests` have finished or `max_seconds` have passed, and write a checkpoint at the end.

    Args:
        run: the training run.
        report: writes its log.
        directory: where checkpoints are written.
        requests: finished requests, including those before a resumption.
        checkpoint: when to write checkpoints.
        max_seconds: of this call, checked after each round; None: no limit.
    """
    clock = run.engine.clock
    deadline = None if max_seconds is None else clock.now() + max_seconds
    saved, done = run.served, run.served >= requests
    while not done:
        run.loop.step()
        done = run.served >= requests or (deadline is not None and clock.now() >= deadline)
        if done or run.served - saved >= checkpoint.interval:
            saved = run.served
            run.loop.end_session()
            report.line()
            run.save(directory.path, seconds=report.seconds, replay=checkpoint.keep_replay_buffer)
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
