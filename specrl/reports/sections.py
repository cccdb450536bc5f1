"""A section of the page: what each run has for it, and what the others lack."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from specrl.reports.data import RunData
from specrl.reports.page import Entry, Section


def section(
    name: str,
    title: str,
    about: str,
    runs: Sequence[RunData],
    entry: Callable[[RunData], Entry | None],
    lacking: str,
    command: str,
) -> Section:
    """A section of the runs for which `entry` finds something; of the others it says what is lacking."""
    entries = {run.name: entry(run) for run in runs}
    without = [run_name for run_name, found in entries.items() if found is None]
    missing = f"Not recorded by {', '.join(without)}: {lacking}." if without else ""
    if len(without) == len(runs):
        missing = f"{'This run has not' if len(runs) == 1 else 'None of these runs has'} recorded {lacking}."
    return Section(name, title, about, [e for e in entries.values() if e], (), missing, command if missing else "")


def with_draft(runs: Sequence[RunData]) -> str:
    """The option --draft with the first draft that these runs learnt."""
    drafts = [run.path / "draft" for run in runs if (run.path / "draft").is_dir()]
    return f" --draft {shlex.quote(str(drafts[0]))}" if drafts else ""


def evaluation(runs: Sequence[RunData]) -> str:
    """The command that compares choosers."""
    draft = with_draft(runs)
    return f"specrl evaluate{f' --profiles live{draft}' if draft else ''} --output_dir runs/evaluation"
