"""Results: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from rich.console import Console, RenderableType
from rich.progress import Progress
from rich.table import Table

from specrl.core.plan import Plan

Row = Mapping[str, object]


class OutputDir:
    """A directory for one run's results, created if it is missing; every file is written atomically.

    Raises:
        ValueError: nothing can be written there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.path).close()
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"output_dir must be a writable directory, but {str(path)!r} is not: {why}") from error

    def write_text(self, name: str, text: str) -> Path:
        """Write a file."""
        path = self.path / name
        beside = path.with_name(f".{path.name}-{os.getpid()}")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    def discard_alone(self, name: str) -> None:
        """Remove the directory if it holds only this file, so that wrong input leaves nothing."""
        if [path.name for path in self.path.iterdir()] == [name]:
            (self.path / name).unlink()
            self.path.rmdir()

    def write_json(self, name: str, value: object) -> Path:
        """Write JSON (see `to_json`)."""
        return self.write_text(name, to_json(value, indent=2) + "\n")

    def write_csv(self, name: str, rows: Sequence[Row]) -> Path:
        """Write rows under a header: every key that occurs, in order of appearance."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
        return self.write_text(name, text.getvalue())


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text of values, dataclasses and NumPy's included: plans and paths become text, infinities and NaN null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (Plan, Path)):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(part) for part in value]
    raise TypeError(f"results hold numbers, text, lists and mappings, but got {type(value).__name__}")


def table(rows: Sequence[Row], columns: Mapping[str, str] | Sequence[str] | None = None, *, title: str = "") -> Table:
    """Return a table for people: numbers to three significant digits and to the right, missing values as a dash.

    Args:
        rows: one mapping per line.
        columns: keys to show, or key -> heading; None: the keys of the first row.
        title: above the table.
    """
    keys = columns if columns is not None else list(rows[0]) if rows else []
    headings = columns if isinstance(columns, Mapping) else {key: key for key in keys}
    out = Table(title=title or None, title_justify="left", title_style="bold")
    for key, heading in headings.items():
        numbers = all(isinstance(row.get(key), (int, float, np.number, type(None))) for row in rows)
        out.add_column(heading, justify="right" if numbers else "left")
    for row in rows:
        out.add_row(*(_cell(row.get(key)) for key in headings))
    return out


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}" if math.isfinite(value) else "–"
    return str(value)


def show(*parts: RenderableType) -> None:
    """Print tables and text to standard output, in full width where it is not a terminal."""
    width = None if sys.stdout.isatty() else 160
    Console(width=width, markup=False, emoji=False, highlight=False).print(*parts, sep="\n")


def hint(directory: Path) -> str:
    """Return the last line that a command prints."""
    return f"to see it in a browser: specrl report {shlex.quote(str(directory))}"


@contextmanager
def progress(title: str, total: float) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; the value is called with how much of `total` is done, and an optional note.

    It is drawn in that call, and by no other thread, so call it outside timed windows.
    """
    bar = Progress(console=Console(stderr=True), auto_refresh=False, transient=True, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task(title, total=total)
        bar.refresh()
        yield lambda done, note="": bar.update(
            task, completed=min(done, total), description=f"{title} {note}".rstrip(), refresh=True
        )
