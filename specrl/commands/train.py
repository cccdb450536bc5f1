"""`specrl train`: train a draft online, from recorded traces, beside a running server, or on a Ray cluster."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

from specrl.agents.draft.config import LearnerConfig
from specrl.cluster.connect import RayConfig
from specrl.cluster.engine import EngineSettings
from specrl.cluster.online import train_on_ray
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.checks import require
from specrl.io.output import OutputDir, hint, show
from specrl.models.draft import load_draft
from specrl.training.config import CheckpointConfig, LogConfig, ServingConfig
from specrl.training.logger import MetricsWriter, TrainingLogger
from specrl.training.offline import learn_from
from specrl.training.run import Run, serve
from specrl.training.server_learner import ServerLearner, learn_from_server
from specrl.training.trace_files import Traces
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
        target: the model; beside 'sglang' it is on the CPU by default.
        learn: whether the draft learns.
        resume: continue from the checkpoint in output_dir. Repeat the options by --config OUTPUT_DIR/config.yaml.
        seed: of everything random.
        output_dir: where results go; by default runs/train-<time>.

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
        report = TrainingLogger(run, directory, metrics=MetricsWriter(log, directory.path))
        serve(report, serving, checkpoint)
    run.write_results(directory)
    show(f"written: {directory.path}", hint(directory.path))


def train_offline(
    *,
    traces: Path,
    epochs: int = 1,
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    learner: LearnerConfig = LearnerConfig(),
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Train a draft from traces that `specrl record` wrote, without serving.

    Writes draft/, log.csv (a row per epoch, with the accept length on held-out sequences) and checkpoint/.

    Args:
        traces: directory of `specrl record`.
        epochs: passes over the traces, including those before a resumption.
        target: the model that the traces were recorded with.
        draft: to start from; a new one has the target's vocabulary.
        resume: continue after the last epoch in output_dir.
        seed: of everything random.
        output_dir: where results go; by default runs/train-offline-<time>.

    Example:
        specrl record --requests 2000 --output_dir runs/traces
        specrl train offline runs/traces --epochs 5
    """
    require(draft.vocab_size is None, "draft.vocab_size", "left out with traces", draft.vocab_size)
    directory = OutputDir(output_dir or Path("runs/train-offline"))
    model = target.load()
    first = draft.load(model, seed=seed)
    learn_from(
        Traces(traces), model, first, learner, directory, target=target.name, epochs=epochs, seed=seed, resume=resume
    )
    show(f"written: {directory.path}")


def train_server(
    *,
    server: str,
    traces: Path,
    draft: Path,
    target: TargetConfig = TargetConfig(),
    learner: LearnerConfig = LearnerConfig(),
    requests: int = 2000,
    weight_sync_interval: int = 16,
    checkpoint_interval: int = 256,
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Train a draft on the requests that a running SGLang server gets from others, and update the server's draft.

    No request is interrupted. The server is started with launch.sh of a `specrl export` and SPECRL_TRACES=unix:PATH.
    Its API key is read from the environment variable SPECRL_API_KEY. Writes draft/, log.csv and checkpoint/.

    Args:
        server: URL of the server.
        traces: socket of the server's plugin, PATH above.
        draft: directory of the draft that the server was started with.
        target: the model that the server serves; on the CPU by default.
        requests: number of finished requests to learn from, including those before a resumption.
        weight_sync_interval: finished requests between two updates of the server's draft.
        checkpoint_interval: requests between two checkpoints.
        resume: continue from the checkpoint in output_dir.
        seed: of the learner.
        output_dir: where results go; by default runs/train-server-<time>.

    Example:
        specrl train server http://127.0.0.1:30000 /tmp/traces exported/bundle/draft --target Qwen/Qwen3-8B
    """
    counts = {"weight_sync_interval": weight_sync_interval, "checkpoint_interval": checkpoint_interval}
    for name, value in {"requests": requests, **counts}.items():
        require(value >= 1, name, "at least 1", value)
    directory = OutputDir(output_dir or Path("runs/train-server"))
    server_learner = ServerLearner(
        target.load(device="cpu"),
        load_draft(draft),
        learner,
        server,
        traces,
        weight_sync_interval=weight_sync_interval,
        seed=seed,
        resume=directory.path / "checkpoint" if resume else None,
    )
    learn_from_server(server_learner, directory, requests=requests, checkpoint_every=checkpoint_interval)


def train_ray(
    *,
    ray: RayConfig = RayConfig(),
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    serving: ServingConfig = ServingConfig(),
    learner: LearnerConfig = LearnerConfig(),
    resume: bool = False,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve requests with several engines on a Ray cluster, and train the draft in a process of its own.

    Serving never waits for the learner. A learner that was killed restarts from its checkpoint, so output_dir must be
    on a file system that every node has. log.csv has a row per engine and report. Requests are counted from 0 when a
    run is resumed.

    Args:
        target: the model; on the CPU.
        serving: how requests are served; deploy must be 'always', and max_seconds is not supported.
        resume: continue from the learner's checkpoint in output_dir.
        seed: of everything random.
        output_dir: where results go; by default runs/train-ray-<time>.

    Example:
        specrl train ray --ray 10.0.0.1:6379 --ray.engines 7 --serving.requests 20000 --output_dir /shared/run
    """
    require(serving.deploy == "always", "serving.deploy", "'always' (leave it out) on Ray", serving.deploy)
    seconds = serving.max_seconds
    require(seconds is None, "serving.max_seconds", "left out on Ray (set serving.requests)", seconds)
    model, requests = target.load(device="cpu"), workload.open(target.name, "train", ignore_eos=False)
    settings = EngineSettings(
        target,
        partial(workload.open, target.name, "train", ignore_eos=False),
        serving,
        learner,
        max_context=workload.max_context,
        max_pending_calls=ray.max_pending_calls,
        seed=seed,
    )
    first = make_draft(draft, model, requests, max_context=workload.max_context, seed=seed)
    train_on_ray(ray, settings, first, OutputDir(output_dir or Path("runs/train-ray")), resume=resume)
