"""`specrl report`: what runs learned and measured, side by side on one page that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from specrl.io.output import OutputDir, show
from specrl.reports.cells import breakdown, costs, speedups, standing
from specrl.reports.choosers import leaderboard, regret
from specrl.reports.data import RunData, read_runs
from specrl.reports.learning import learning
from specrl.reports.page import Album, Section, Table, columns, render, said


def report(*, runs: tuple[Path, ...], output_dir: Path | None = None) -> Path:
    """Make one HTML page of runs, and its pictures as PNG files, light and dark.

    Shows what the runs contain, side by side: learning curves, speedup by batch size and plan with the chosen plans,
    regret, acceptance by position, costs, the time of a round by part, the leaderboard, and where it was measured. What
    is missing is said, with the command that makes it. The page is self-contained: nothing is loaded from anywhere.

    Args:
        runs: output directories of specrl train, quickstart, bench, evaluate and profile.
        output_dir: where report.html and the pictures go; by default runs/report-<time>.

    Raises:
        ValueError: a directory that is no run, or a damaged file in it.

    Example:
        specrl report runs/quickstart-20261121-104250-15218
        specrl report runs/day0 runs/day1 runs/bench --output_dir runs/days
    """
    found = read_runs(runs)
    directory = OutputDir(output_dir or Path("runs/report"))
    album = Album(directory)
    sections = [
        _overview(found),
        learning(found, album),
        speedups(found, album),
        standing(found, album),
        breakdown(found, album),
        costs(found),
        regret(found, album),
        leaderboard(found),
        _environment(found),
    ]
    title = f"{found[0].name}: a specrl run" if len(found) == 1 else f"{len(found)} specrl runs side by side"
    path = directory.write_text("report.html", render(title, sections))
    show(f"written: {path}")
    return path


def _overview(runs: Sequence[RunData]) -> Section:
    rows = []
    for run in runs:
        served = f"{run.log[-1]['requests']:,.0f}" if run.log else "–"
        chosen = [
            f"batch {cell.batch_size}: {cell.plan}, {said(cell.speedup, '×')}"
            for cell in run.of("measured")
            if run.plans.get(cell.batch_size) == cell.plan
        ] or [f"batch {batch}: {plan}" for batch, plan in sorted(run.plans.items())]
        where = run.environment
        rows.append(
            [
                run.name,
                ", ".join(f"specrl {kind}" for kind in run.kinds),
                str(where.get("date_utc") or "–"),
                served,
                "; ".join(chosen) or "–",
                f"{where['cpu']}, {where.get('cores', '?')} cores" if where.get("cpu") else "–",
                str(where.get("commit") or "–")[:12],
            ]
        )
    head = [
        "run",
        "made by",
        "date, UTC",
        "requests served",
        "chosen plan, measured speedup [95 %]",
        "machine",
        "commit",
    ]
    about = "Speedup is the time plain decoding takes for a token over the time speculative decoding takes."
    return Section("overview", "Runs", about, tables=[columns("The runs of this page", head, rows)])


def _environment(runs: Sequence[RunData]) -> Section:
    tables = []
    for caption, records in (
        ("Hardware and software", [run.environment for run in runs]),
        ("Configuration", [run.config for run in runs]),
    ):
        rows = []
        for key in dict.fromkeys(key for record in records for key in record):
            texts = [_plain(record.get(key)) for record in records]
            rows.append([str(key), *texts, *(["differs" if len(set(texts)) > 1 else "same"] if len(runs) > 1 else [])])
        head = ["", *(run.name for run in runs), *([""] if len(runs) > 1 else [])]
        if rows:
            tables.append(Table(caption, head, rows))
    without = [run.name for run in runs if not run.environment]
    about = "Numbers of different machines, versions or commits are not comparable without more ado."
    missing = f"Where they were measured is not recorded by {', '.join(without)}: did they end?" if without else ""
    return Section("environment", "Environment", about, (), tables, missing)


def _plain(value: object) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)
