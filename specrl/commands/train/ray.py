"""`specrl train ray`: train a draft while serving on a Ray cluster."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from specrl.agents.draft.config import LearnerConfig
from specrl.cluster.config import RayConfig
from specrl.cluster.engine import EngineSettings
from specrl.cluster.online import train_on_ray
from specrl.config import DraftConfig, TargetConfig, WorkloadConfig
from specrl.io.output import OutputDir
from specrl.training.config import ServingConfig
from specrl.training.vocabulary import make_draft


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
        ray: the cluster.
        target: the model; on the CPU.
        draft: to start from.
        workload: the requests.
        serving: how they are served; deploy must be 'always', and max_seconds is not supported.
        learner: how the draft learns.
        resume: continue from the learner's checkpoint in output_dir.
        seed: of everything random.
        output_dir: where results go; by default runs/train-ray-<time>.

    Raises:
        ValueError: an argument out of range, resources that the cluster does not have, or nothing to resume.

    Example:
        specrl train ray --ray 10.0.0.1:6379 --ray.engines 7 --serving.requests 20000 --output_dir /shared/run
    """
    if serving.deploy != "always":
        raise ValueError(f"serving.deploy must be 'always' on Ray, but got {serving.deploy!r}; leave it out")
    if serving.max_seconds is not None:
        raise ValueError(
            f"serving.max_seconds must be left out on Ray, but got {serving.max_seconds}; set serving.requests"
        )
    directory = OutputDir(output_dir or Path("runs/train-ray"))
    model, requests = target.load(device="cpu"), workload.open(target.name, "train", ignore_eos=False)
    first = make_draft(draft, model, requests, max_context=workload.max_context, seed=seed)
    settings = EngineSettings(
        target,
        partial(workload.open, target.name, "train", ignore_eos=False),
        serving,
        learner,
        max_context=workload.max_context,
        max_pending_calls=ray.max_pending_calls,
        seed=seed,
    )
    train_on_ray(ray, settings, first, directory, resume=resume)
