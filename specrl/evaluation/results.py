"""Results of an evaluation as tables and files, and the leaderboard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from specrl.core.statistics import Interval
from specrl.evaluation.scores import Comparison, Evaluation, regret_curves, speedup_interval
from specrl.io.output import OutputDir
from specrl.measure.machine import environment

_LEADERBOARD = ("date_utc", "source", "chooser", "seeds", "rounds", "speedup", "low", "high", "share", "end", "record")


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """Return rows for CSV and JSON."""
    rows = []
    for c in comparisons:
        row: dict[str, object] = {"source": c.source, "chooser": c.chooser, "seeds": c.seeds, "regret": c.regret}
        for name in ("speedup", "share", "end", "better"):
            interval: Interval | None = getattr(c, name)
            for part in ("value", "low", "high"):
                key = name if part == "value" else f"{name}_{part}"
                row[key] = None if interval is None else getattr(interval, part)
        rows.append(row | {f"closed to {bound}": share for bound, share in c.closed.items()})
    return rows


def shown_rows(comparisons: Sequence[Comparison], reference: str) -> list[dict[str, object]]:
    """Return rows for people."""
    return [
        {
            "source": c.source,
            "chooser": c.chooser,
            "speedup [95 %]": _text(c.speedup),
            "share of best [95 %]": str(c.share),
            "at end": f"{c.end.value:.3f}",
            "regret": c.regret,
            f"P(> {reference})": "–" if c.better is None else f"{c.better.value:.2f}",
            "gap closed": "–" if c.closed.get("best table") is None else f"{c.closed['best table']:.2f}",
        }
        for c in comparisons
    ]


def _text(interval: Interval) -> str:
    """The interval, unless it is useless because there are only two or three samples."""
    return str(interval) if interval.high < 10.0 * interval.value else f"{interval.value:.3f} [too few seeds]"


def write_evaluation(
    directory: OutputDir,
    evaluations: Sequence[Evaluation],
    rows: Sequence[Mapping[str, object]],
    *,
    settings: Mapping[str, object],
    leaderboard: Path,
) -> None:
    """Write evaluate.json and .csv, regret.csv and .png, headroom.json, and append to a leaderboard (.csv).

    `rows` are those of `comparison_rows`; `settings` must hold 'rounds'.

    Raises:
        ValueError: the leaderboard has another header.
    """
    from specrl.reports.figures import plot_regret

    where, bounds = environment(), {each.source: each.bounds for each in evaluations}
    results = {"environment": where, "settings": settings, "bounds": bounds, "rows": rows}
    record = directory.write_json("evaluate.json", results)
    directory.write_csv("evaluate.csv", rows)
    curves = regret_curves(evaluations)
    directory.write_csv("regret.csv", curves)
    plot_regret(curves, directory.path / "regret.png")
    lines = []
    for evaluation in evaluations:
        if evaluation.cycles is not None:
            directory.write_json("headroom.json", evaluation.cycles)
        for chooser, runs in evaluation.scores.items():
            speedup = speedup_interval(evaluation.speedups(chooser))
            share, end = np.mean([run.share for run in runs]), np.mean([run.end for run in runs])
            numbers = [f"{x:.6g}" for x in (speedup.value, speedup.low, speedup.high, share, end)]
            source = [where["date_utc"], evaluation.source, chooser, len(runs), settings["rounds"]]
            lines.append([*source, *numbers, record.resolve()])
    _append(leaderboard, lines)


def _append(leaderboard: Path, lines: Sequence[Sequence[object]]) -> None:
    leaderboard.parent.mkdir(parents=True, exist_ok=True)
    with leaderboard.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        head = file.readline().rstrip("\n")
        if head not in ("", ",".join(_LEADERBOARD)):
            raise ValueError(f"leaderboard must have the header {','.join(_LEADERBOARD)}, but {leaderboard} has {head}")
        csv.writer(file, lineterminator="\n").writerows([*([] if head else [_LEADERBOARD]), *lines])
