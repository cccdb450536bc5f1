"""`specrl train server`: train a draft from the traffic of a running SGLang server."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.draft.config import LearnerConfig
from specrl.config import TargetConfig
from specrl.io.output import OutputDir
from specrl.models.draft import load_draft
from specrl.training.server_learner import ServerLearner, learn_from_server


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
        learner: how the draft learns.
        requests: number of finished requests to learn from, including those before a resumption.
        weight_sync_interval: finished requests between two updates of the server's draft.
        checkpoint_interval: requests between two checkpoints.
        resume: continue from the checkpoint in output_dir.
        seed: of the learner.
        output_dir: where results go; by default runs/train-server-<time>.

    Raises:
        ValueError: an argument out of range, a draft that is not the server's, or nothing to resume.
        OSError: the server does not answer.

    Example:
        specrl train server http://127.0.0.1:30000 /tmp/traces exported/bundle/draft --target Qwen/Qwen3-8B
    """
    counts = {"weight_sync_interval": weight_sync_interval, "checkpoint_interval": checkpoint_interval}
    for name, value in {"requests": requests, **counts}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    directory = OutputDir(output_dir or Path("runs/train-server"))
    following = ServerLearner(
        target.load(device="cpu"),
        load_draft(draft),
        learner,
        server,
        traces,
        sync_every=weight_sync_interval,
        seed=seed,
        resume=directory.path / "checkpoint" if resume else None,
    )
    learn_from_server(following, directory, requests=requests, checkpoint_every=checkpoint_interval)
