"""Reads the files that commands write, and configurations. Each error is one line that names the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON file (.json) or YAML file; an empty one if the file is empty or does not exist.

    Raises:
        ValueError: the file is damaged, or holds no mapping.
    """
    if not path.exists():
        return {}
    import yaml  # type: ignore[import-untyped]

    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be {kind}, but is not: {' '.join(str(error).split())}") from error
    if value is None and kind == "YAML":
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a {kind} mapping, but is {type(value).__name__}")
    return value


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file as text by column; none if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be CSV in UTF-8, but is not: {error}") from error
