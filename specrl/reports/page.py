"""A page of sections with pictures and tables, as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

import specrl
from specrl.core.statistics import Interval
from specrl.io.output import OutputDir
from specrl.reports.figures import DPI, Theme, variants


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows, the first cell of each its heading."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure in two variants, base64 PNG; width and height are those of the page, in CSS pixels."""

    alt: str
    caption: str
    light: str
    dark: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What a section has of one run."""

    name: str
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, and what each run has under it; `missing` says which have nothing, `command` what would make it."""

    id: str
    title: str
    about: str
    entries: Sequence[Entry] = ()
    tables: Sequence[Table] = ()
    missing: str = ""
    command: str = ""
    folded: Sequence[Table] = ()  # after the entries, to be opened


@dataclass(slots=True)
class Album:
    """Draws pictures and keeps their PNG files in a directory, as `<n>-<name>-light.png` and `-dark.png`."""

    directory: OutputDir
    _count: int = field(default=0)

    def picture(self, name: str, draw: Callable[[Theme], Figure], *, alt: str, caption: str) -> Picture:
        """Draw both variants and write them."""
        self._count += 1
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
        png = variants(draw)
        for theme, data in png.items():
            (self.directory.path / f"{self._count:02d}-{slug}-{theme}.png").write_bytes(data)
        width, height = (int.from_bytes(png["light"][at : at + 4], "big") * 96 // DPI for at in (16, 20))  # IHDR
        light, dark = (base64.b64encode(png[theme]).decode() for theme in ("light", "dark"))
        return Picture(alt, caption, light, dark, width, height)


def render(title: str, sections: Sequence[Section]) -> str:
    """The page; whatever comes from files is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return made.get_template("page.html").render(title=title, sections=sections, version=specrl.__version__)


def said(value: Interval | None, unit: str = "", digits: int = 3) -> str:
    """A number with its interval and unit; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value.value):
        return "–"
    number = f"{value.value:,.{digits}f}{unit}"
    if not (math.isfinite(value.low) and math.isfinite(value.high)):
        return f"{number} (no interval)"
    return f"{number} [{value.low:,.{digits}f}, {value.high:,.{digits}f}]"


def columns(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that would hold dashes only."""
    kept = [n for n in range(len(head)) if n == 0 or any(row[n] not in ("–", "") for row in rows)]
    return Table(caption, [head[n] for n in kept], [[row[n] for n in kept] for row in rows])
