"""The text behind the embedded targets: what every Python installation carries."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

# Left out, so that they can serve as shifted traffic; or not the standard library's.
SKIPPED = frozenset({"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data", "encodings"})


def library_root() -> Path:
    """Where the running interpreter keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(root: Path) -> list[Path]:
    """Every source file under `root`, sorted, without the folders in `SKIPPED`.

    Raises:
        ValueError: there is none.
    """
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise ValueError(f"the standard library must be installed as .py files, but {root} has none; name a workload")
    return sorted(files)
