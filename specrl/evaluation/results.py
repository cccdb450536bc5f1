"""Results of an evaluation as tables and files, and the leaderboard."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from specrl.core.statistics import Interval
from specrl.evaluation.backends import Evaluation
from specrl.evaluation.scores import Comparison, compare_choosers, regret_curves, speedup_interval
from specrl.io.output import OutputDir
from specrl.measure.machine import environment

_LEADERBOARD = ("date_utc", "source", "chooser", "seeds", "rounds", "speedup", "low", "high", "share", "end", "record")


def compare_sources(evaluations: Sequence[Evaluation], reference: str) -> list[Comparison]:
    """Every chooser against the reference, on each source and on all of them."""
    return compare_choosers(
        {found.source: found.scores for found in evaluations},
        {found.source: found.bounds for found in evaluations},
        reference,
    )


def comparison_rows(compared: Sequence[Comparison]) -> list[dict[str, object]]:
    """Comparisons as rows of CSV and JSON."""
    out = []
    for c in compared:
        row: dict[str, object] = {"source": c.source, "chooser": c.chooser, "seeds": c.seeds, "regret": c.regret}
        for name in ("speedup", "share", "end", "better"):
            interval: Interval | None = getattr(c, name)
            for part in ("value", "low", "high"):
                key = name if part == "value" else f"{name}_{part}"
                row[key] = None if interval is None else getattr(interval, part)
        out.append({**row, **{f"closed to {bound}": share for bound, share in c.closed.items()}})
    return out


def shown_rows(compared: Sequence[Comparison], reference: str) -> list[dict[str, object]]:
    """Comparisons as rows for people."""
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
        for c in compared
    ]


def _text(interval: Interval) -> str:
    """The interval of two or three samples may be so wide that it is useless."""
    return str(interval) if interval.high < 10.0 * interval.value else f"{interval.value:.3f} [too few seeds]"


def write_evaluation(
    directory: OutputDir,
    evaluations: Sequence[Evaluation],
    rows: Sequence[Mapping[str, object]],
    *,
    settings: Mapping[str, object],
    leaderboard: Path,
) -> None:
    """Write evaluate.json and .csv, regret.csv and .png, headroom.json, and append to a leaderboard.

    A simulated evaluation with the same settings writes the same rows.

    Args:
        directory: of the results.
        evaluations: one for each source.
        rows: from `comparison_rows`.
        settings: of the evaluation, with 'rounds'.
        leaderboard: a .csv file.

    Raises:
        ValueError: the leaderboard has another header.
    """
    from specrl.reports.figures import plot_regret

    where, bounds = environment(), {found.source: found.bounds for found in evaluations}
    record = directory.write_json(
        "evaluate.json", {"environment": where, "settings": settings, "bounds": bounds, "rows": rows}
    )
    directory.write_csv("evaluate.csv", rows)
    curves = regret_curves({found.source: found.scores for found in evaluations})
    directory.write_csv("regret.csv", curves)
    plot_regret(curves, directory.path / "regret.png")
    lines = []
    for found in evaluations:
        if found.cycles is not None:
            directory.write_json("headroom.json", found.cycles.to_json())
        for chooser, scores in found.scores.items():
            speedup = speedup_interval(np.concatenate([s.speedups for s in scores]))
            lines.append(
                {
                    "date_utc": where["date_utc"],
                    "source": found.source,
                    "chooser": chooser,
                    "seeds": len(scores),
                    "rounds": settings["rounds"],
                    "speedup": f"{speedup.value:.6g}",
                    "low": f"{speedup.low:.6g}",
                    "high": f"{speedup.high:.6g}",
                    "share": f"{np.mean([s.share for s in scores]):.6g}",
                    "end": f"{np.mean([s.end for s in scores]):.6g}",
                    "record": record.resolve(),
                }
            )
    append_rows(leaderboard, lines)


def append_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a leaderboard, with a header if it is new.

    Raises:
        ValueError: the file has another header.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        head = file.readline().rstrip("\n")
        if head not in ("", ",".join(_LEADERBOARD)):
            raise ValueError(f"a leaderboard must have the header {','.join(_LEADERBOARD)}, but {path} has {head!r}")
        writer = csv.DictWriter(file, _LEADERBOARD, lineterminator="\n")
        if not head:
            writer.writeheader()
        writer.writerows(rows)
