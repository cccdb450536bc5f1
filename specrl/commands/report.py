"""`specrl report`: one HTML page that shows runs side by side."""

from __future__ import annotations

from pathlib import Path

from specrl.io.output import OutputDir, show
from specrl.reports.data import read_runs
from specrl.reports.page import write_page


def report(*, runs: tuple[Path, ...], output_dir: Path | None = None) -> Path:
    """Write an HTML page that shows runs side by side, and its figures as SVG files.

    The page has learning curves, speedups by batch size and plan, acceptance by position, the time of a round by part,
    costs, regret, a leaderboard, and the environment and configuration of each run. Where a run has no data for a
    section, the page names the command that records it. The page is one file that needs no network.

    Args:
        runs: output directories of specrl train, quickstart, bench, evaluate and profile.
        output_dir: directory of report.html and the figures; default: runs/report-<time>.

    Example:
        specrl report runs/quickstart-20261121-104250-15218
        specrl report runs/day0 runs/day1 runs/bench --output_dir runs/days
    """
    path = write_page(read_runs(runs), OutputDir(output_dir or Path("runs/report")))
    show(f"written: {path}")
    return path
