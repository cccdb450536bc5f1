"""`specrl import`: a published EAGLE3 draft in the layout that SGLang and we read, to start learning from."""

from __future__ import annotations

from pathlib import Path

from specrl.export.published import import_draft as read
from specrl.io.output import OutputDir, show


def import_draft(*, draft: Path, num_layers: int | None = None, output_dir: Path | None = None) -> Path:
    """Read a published EAGLE3 draft and write it in the layout that SGLang reads, saying what was odd about it.

    The directory `draft` in output_dir is what `specrl train --draft` starts from. Safetensors only; nothing is
    downloaded.

    Args:
        draft: directory with config.json and safetensors.
        num_layers: of its target; needed where the draft does not name its taps.
        output_dir: where draft/ goes; by default runs/import-<time>.

    Raises:
        ValueError: a variant that would compute something else, by name.

    Example:
        specrl import --draft downloads/EAGLE3-LLaMA3.1-Instruct-8B --num_layers 32 --output_dir warm
        specrl train --draft warm/draft --target downloads/Llama-3.1-8B-Instruct
    """
    learned, notes = read(draft, num_layers=num_layers)
    directory = OutputDir(output_dir or Path("runs/import")).path / "draft"
    learned.save(directory)
    show(*(f"note: {note}" for note in notes), f"written: {directory}")
    return directory
