"""`specrl train offline`: train a draft from recorded traces."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.draft.config import LearnerConfig
from specrl.config import DraftConfig, TargetConfig
from specrl.io.output import OutputDir, show
from specrl.training.offline import learn_from
from specrl.training.trace_files import Traces


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
        learner: how the draft learns.
        resume: continue after the last epoch in output_dir.
        seed: of everything random.
        output_dir: where results go; by default runs/train-offline-<time>.

    Raises:
        ValueError: traces of another target, an argument out of range, or nothing to resume.

    Example:
        specrl record --requests 2000 --output_dir runs/traces
        specrl train offline runs/traces --epochs 5
    """
    if draft.vocab_size is not None:
        raise ValueError(
            f"draft.vocab_size needs requests to count tokens of, but got {draft.vocab_size} with traces; name a "
            "draft.path with that vocabulary"
        )
    directory = OutputDir(output_dir or Path("runs/train-offline"))
    model = target.load()
    first = draft.load(model, seed=seed)
    learn_from(
        Traces(traces), model, first, learner, directory, target=target.name, epochs=epochs, seed=seed, resume=resume
    )
    show(f"written: {directory.path}")
