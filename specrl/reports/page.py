"""The HTML page of `specrl report`: one file that needs no network, with its figures as SVG files beside it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from specrl.core.version import __version__
from specrl.io.output import OutputDir
from specrl.reports.data import RunData
from specrl.reports.figures import COLOURS, inline_svg
from specrl.reports.sections import OF_ALL, OF_RUN, Drawing, Table


class Entry(NamedTuple):
    """The figures and tables of one run in a section."""

    name: str
    figures: list[Drawing]
    tables: list[Table]


def write_page(runs: Sequence[RunData], directory: OutputDir) -> Path:
    """Write report.html, and each figure as <number>-<section>-<run>.svg in the light theme."""
    count, content = 0, dict[str, list[Entry]]()
    for section, of_run in OF_RUN.items():
        content[section] = [Entry(run.name, [], []) for run in runs]
        for run, entry in zip(runs, content[section], strict=True):
            for item in of_run(run, runs):
                if isinstance(item, Drawing):
                    count += 1
                    name = re.sub(r"[^a-z0-9]+", "-", f"{section} {run.name}".lower()).strip("-")[:60]
                    directory.write_text(f"{count:02d}-{name}.svg", item.svg)
                    id_ = f"figure-{count}"
                    entry.figures.append(Drawing(inline_svg(item.svg, id_), item.caption, id_))
                else:
                    entry.tables.append(item)
    drafts = [run.path / "draft" for run in runs if (run.path / "draft").is_dir()]
    loader = FileSystemLoader(Path(__file__).parent)
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("page.html")
    html = template.render(
        title=f"{runs[0].name}: a specrl run" if len(runs) == 1 else f"{len(runs)} specrl runs side by side",
        content=content,
        comparisons={section: list(of_all(runs)) for section, of_all in OF_ALL.items()},
        draft=f" --draft.path {shlex.quote(str(drafts[0]))}" if drafts else "",
        colours=COLOURS,
        version=__version__,
    )
    return directory.write_text("report.html", html)
