"""`specrl import`: convert a published EAGLE3 draft to the layout that SGLang and this package read."""

from __future__ import annotations

from pathlib import Path

from specrl.export.published import import_draft as read_published
from specrl.io.output import OutputDir, show


def import_draft(*, draft: Path, num_layers: int | None = None, output_dir: Path | None = None) -> Path:
    """Convert a published EAGLE3 draft to the layout that SGLang reads, and print what was changed.

    `specrl train --draft` starts from the directory `draft` in output_dir. Only safetensors are read, and nothing is
    downloaded.

    Args:
        draft: directory with config.json and safetensors.
        num_layers: layers of its target; needed if the draft does not name the layers that it reads.
        output_dir: where draft/ goes; by default runs/import-<time>.

    Raises:
        ValueError: a variant that would compute something else, by name.

    Example:
        specrl import --draft downloads/EAGLE3-LLaMA3.1-Instruct-8B --num_layers 32 --output_dir warm
        specrl train --draft warm/draft --target downloads/Llama-3.1-8B-Instruct
    """
    learned, notes = read_published(draft, num_layers=num_layers)
    directory = OutputDir(output_dir or Path("runs/import")).path / "draft"
    learned.save(directory)
    show(*(f"note: {note}" for note in notes), f"written: {directory}")
    return directory
