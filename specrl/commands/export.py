"""`specrl export` and `specrl import`: drafts to and from the layout that SGLang reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from specrl.export.bundle import Bundle
from specrl.export.bundle import push_to_hub as push
from specrl.export.learned_run import LearnedRun
from specrl.export.published import import_draft as read_published
from specrl.export.serving_flags import Lookahead, plan_serving
from specrl.io.output import OutputDir, show
from specrl.models.embedded import target_directory
from specrl.models.hub import hub_id
from specrl.models.target import as_dtype


def export(
    *,
    run: Path,
    dtype: Literal["float32", "bfloat16"] = "float32",
    target: str | None = None,
    lookahead: Lookahead = "auto",
    candidates: int = 1,
    push_to_hub: str | None = None,
    dry_run: bool = False,
    output_dir: Path | None = None,
) -> Path:
    """Write the result of a run as one directory that SGLang serves.

    The directory `bundle` in output_dir holds the draft, the plans in SGLang's format, the chooser for the plugin,
    launch.sh and a model card. It is read back and compared before it replaces an earlier one.

    SGLang changes num_steps while it serves, but not the shape of a tree. If a tree was learned for some batch size,
    one plan serves all of them, and the card states what that costs.

    Args:
        run: output directory of `specrl train` or `specrl quickstart`.
        dtype: of the exported weights.
        target: checkpoint directory or Hugging Face id that SGLang will serve; by default the run's.
        lookahead: 'adaptive' for the best chain per batch size, 'single' for one plan; 'auto': 'single' only if needed.
        candidates: values of num_steps per batch size that SGLang's own rule may choose from; 1: the learned one.
        push_to_hub: 'owner/name' of a private repository on the Hugging Face Hub to upload the bundle to.
        dry_run: only print what would be uploaded.
        output_dir: where bundle/ goes; by default runs/export-<time>.

    Example:
        specrl export --run runs/day0 --output_dir exported
        specrl export --run runs/day0 --lookahead adaptive --candidates 2
        specrl export --run runs/day0 --push_to_hub me/my-draft --dry_run
    """
    learned = LearnedRun.read(run, target=target)
    name = learned.source.target
    bundle = Bundle(
        learned.draft,
        learned.policy(),
        plan_serving(learned.table, learned.speeds(), lookahead=lookahead, candidates=candidates),
        learned.source,
        name if hub_id(name) else str(target_directory(name).resolve()),
        as_dtype(dtype),
    )
    directory = OutputDir(output_dir or Path("runs/export")).path / "bundle"
    bundle.write(directory)
    plans = ", ".join(f"batch {size}: {plan}" for size, plan in sorted(learned.table.items()))
    show(f"written: {directory} (plans: {plans})")
    if push_to_hub is not None:
        files = push(directory, push_to_hub, dry_run=dry_run)
        show(f"{'would upload' if dry_run else 'uploaded'} to {push_to_hub}: {', '.join(files)}")
    return directory


def import_draft(*, draft: Path, num_layers: int | None = None, output_dir: Path | None = None) -> Path:
    """Convert a published EAGLE3 draft to the layout that SGLang reads, and print what was changed.

    `specrl train --draft` starts from the directory `draft` in output_dir. Only safetensors are read, and nothing is
    downloaded.

    Args:
        draft: directory with config.json and safetensors.
        num_layers: layers of its target; needed if the draft does not name the layers that it reads.
        output_dir: where draft/ goes; by default runs/import-<time>.

    Example:
        specrl import --draft downloads/EAGLE3-LLaMA3.1-Instruct-8B --num_layers 32 --output_dir warm
        specrl train --draft warm/draft --target downloads/Llama-3.1-8B-Instruct
    """
    learned, notes = read_published(draft, num_layers=num_layers)
    directory = OutputDir(output_dir or Path("runs/import")).path / "draft"
    learned.save(directory)
    show(*(f"note: {note}" for note in notes), f"written: {directory}")
    return directory
