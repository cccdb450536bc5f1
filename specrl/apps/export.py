"""`specrl export`: what a run learned, in the form in which it serves."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from specrl.apps.output import OutputDir, show
from specrl.export.bundle import PLANS, read_plans, write_bundle
from specrl.models.draft import load_draft
from specrl.models.target import as_dtype


def export(*, run: Path, dtype: Literal["float32", "bfloat16"] = "float32", output_dir: Path | None = None) -> Path:
    """Write the draft that a run learned, and its plan per batch size.

    The directory `bundle` in output_dir holds draft/ (an EAGLE3 checkpoint with SGLang's names: config.json,
    model.safetensors; nothing of the target's is in it), plans.json (the plan per batch size) and manifest.json
    (SHA-256 of every file). It is read back and compared before it appears, and appears whole or not at all.

    Args:
        run: output directory of `specrl train` or `specrl quickstart`.
        dtype: of the exported weights.
        output_dir: where bundle/ goes; by default runs/export-<time>.

    Raises:
        ValueError: the run holds no draft or no plans, or what was written does not read back.

    Example:
        specrl export --run runs/day0 --output_dir exported
    """
    plans, draft = read_plans(run / PLANS), load_draft(run / "draft")
    directory = OutputDir(output_dir or Path("runs/export")).path / "bundle"
    write_bundle(draft, plans, directory, as_dtype(dtype))
    show(f"written: {directory} (plans: " + ", ".join(f"batch {b}: {p}" for b, p in sorted(plans.items())) + ")")
    return directory
