"""The texts of the Python standard library, which the embedded targets were trained on in part."""

from __future__ import annotations

import ast
import os
import sysconfig
from pathlib import Path

SHIFTED = ("pydoc_data", "encodings", "tests")  # parts that no embedded target was trained on
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIPPED = _TEST_FOLDERS | {"site-packages", "__pycache__", "pydoc_data", "encodings"}  # folders not trained on


def library_root() -> Path:
    """Return the directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files(root: Path) -> list[Path]:
    """Return every source file under `root`, sorted, without the folders in `SKIPPED`.

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


def shifted_texts(name: str) -> list[str]:
    """Return the texts of one of the parts in `SHIFTED`.

    Raises:
        ValueError: this part is not installed.
    """
    root = library_root()
    if name == "pydoc_data":
        texts = [text for path in root.glob("pydoc_data/topics.py") for text in _string_values(path)]
    elif name == "encodings":
        texts = [_read(path) for path in sorted((root / "encodings").glob("*.py"))]
    else:
        files = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
        texts = [_read(path) for path in files if _TEST_FOLDERS & set(path.relative_to(root).parts[:-1])]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"workload {name!r} must be installed with the standard library, but {root} has none of it")
    return texts


def _string_values(path: Path) -> list[str]:
    """The strings that a module assigns or holds in dictionaries: topics = {'name': '...'}, topics['name'] = '...'."""
    values: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(_read(path))):
        if isinstance(node, ast.Dict):
            values += node.values
        elif isinstance(node, ast.Assign):
            values.append(node.value)
    return [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
