"""The files of a run directory, read and checked."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

Row = dict[str, Any]  # numbers as floats, what is empty as None, else text
_NEEDED = {
    "log.csv": ("seconds",),
    "gate.csv": ("requests", "version", "look", "passed", "harmful", "reason"),
    "drift.csv": ("requests", "before", "after"),
    "windows.csv": ("requests", "batch_size", "plan", "rounds", "verified", "plain_s", "draft_s", "verify_s"),
    "measured.csv": ("batch_size", "plan", "speedup", "low", "high", "accept_length", "round_ms", "draft_ms"),
    "bench.csv": ("batch_size", "plan", "speedup", "low", "high", "accept_length", "round_ms", "draft_ms"),
    "blocks.csv": ("batch_size", "lane", "block", "tokens"),
    "evaluate.csv": ("source", "chooser", "seeds", "speedup", "speedup_low", "speedup_high", "share", "regret"),
    "regret.csv": ("source", "chooser", "round", "regret", "least", "greatest"),
}
_TEXT = ("plan", "lane", "look", "reason", "source", "chooser", "part", "passed", "harmful")


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that a run may have; none where it has not.

    Raises:
        ValueError: a column is missing, or a number is none.
    """
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, restkey="")
            lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be CSV in UTF-8, but is not: {error}") from error
    if missing := [name for name in _NEEDED.get(path.name, ()) if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path} must have the columns that specrl writes, but lacks {', '.join(missing)}")
    return [
        {key: _value(path, key, text) for key, text in line.items() if key and isinstance(text, str | None)}
        for line in lines
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a run may have; empty where it has not.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but is not: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, but is {type(value).__name__}")
    return value


def _value(path: Path, key: str, text: str | None) -> Any:
    if text is None or text == "":
        return None
    if key in _TEXT or key.startswith("plan_"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} must hold numbers under {key!r}, but has {text!r}; is it a run's?") from None


def read_config(path: Path) -> dict[str, Any]:
    """The configuration that a run may have; empty where it has not.

    Raises:
        ValueError: it is no YAML.
    """
    if not path.exists():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML, but is not: {' '.join(str(error).split())}") from error
    return value if isinstance(value, dict) else {}
