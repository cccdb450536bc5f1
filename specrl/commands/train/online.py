"""`specrl train`: train a draft, and choose a plan per batch size, while serving."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.io.output import OutputDir, hint, show
from specrl.training.config import CheckpointConfig, LogConfig, ServingConfig
from specrl.training.logger import Metrics, Reporter
from specrl.training.run import Run, serve
from specrl.training.vocabulary import make_draft


def train(
    *,
    engine: EngineConfig = EngineConfig(),
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    serving: ServingConfig = ServingConfig(),
    learn: bool = True,
    learner: LearnerConfig = LearnerConfig(),
    checkpoint: CheckpointConfig = CheckpointConfig(),
    log: LogConfig = LogConfig(),
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve requests, train the draft on them, and choose the plan of each round.

    Writes draft/ (an EAGLE3 checkpoint), plans.json (the plan per batch size), log.csv, tensorboard/ and checkpoint/.
    A resumed run does the same as an uninterrupted one: requests in flight at a checkpoint are discarded.

    Args:
        engine: where it decodes.
        target: the model; beside 'sglang' it is on the CPU by default.
        draft: to start from.
        workload: the requests.
        serving: how they are served.
        learn: whether the draft learns.
        learner: how the draft learns.
        checkpoint: when to write checkpoints.
        log: where to log.
        resume: continue from the checkpoint in output_dir. --config OUTPUT_DIR/config.yaml repeats the options.
        seed: of everything random.
        output_dir: where results go; by default runs/train-<time>.

    Raises:
        ValueError: an argument out of range, or nothing to resume.

    Example:
        specrl train --serving.requests 500 --output_dir runs/day0
        specrl train --config runs/day0/config.yaml --resume --serving.requests 1000
        specrl train --learner.learning_rate 2e-3 --serving.chooser 4/1/5 --serving.batch_schedule 8
    """
    directory = OutputDir(output_dir or Path("runs/train"))
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
        trace=learn,
    )
    with closing(opened):
        run = Run.start(
            opened,
            model,
            first,
            requests,
            serving,
            target=target.name,
            learner=learner if learn else None,
            seed=seed,
            resume=resumed,
        )
        report = Reporter(run, directory, metrics=Metrics(log, directory.path))
        serve(report, serving, checkpoint)
    run.write_results(directory)
    show(f"written: {directory.path}", hint(directory.path))
