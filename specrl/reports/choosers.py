"""Choosers of plans against each other: regret and leaderboard."""

from __future__ import annotations

from collections.abc import Sequence

from specrl.reports import figures
from specrl.reports.data import RunData, interval
from specrl.reports.page import Album, Entry, Section, columns, said
from specrl.reports.sections import evaluation, section


def regret(runs: Sequence[RunData], album: Album) -> Section:
    """What choosers lost against the best plans."""

    def entry(run: RunData) -> Entry | None:
        pictures = []
        for source in dict.fromkeys(row["source"] for row in run.regret):
            rows = [row for row in run.regret if row["source"] == source]
            last = {row["chooser"]: row for row in rows}
            ends = [
                f"{c}: {r['regret']:.1f} rounds (from {r['least']:.1f} to {r['greatest']:.1f})" for c, r in last.items()
            ]
            end = f"after {max(r['round'] for r in last.values()):.0f} rounds"
            pictures.append(
                album.picture(
                    f"regret {run.name} {source}",
                    figures.regret(rows),
                    alt=f"Cumulative regret of choosers on {source}; {end}: {'; '.join(ends)}.",
                    caption=f"{source}: mean over seeds, least and greatest. {end.capitalize()}: {'; '.join(ends)}.",
                )
            )
        return Entry(run.name, pictures) if pictures else None

    about = (
        "Rounds' worth of time lost against always playing the best plan of the batch size, added up; less is better."
    )
    return section("regret", "Regret", about, runs, entry, "choosers at play", evaluation(runs))


def leaderboard(runs: Sequence[RunData]) -> Section:
    """Choosers by what they reached."""
    rows = [
        [
            f"{row['chooser']}", f"{row['source']}", run.name, f"{row['seeds']:.0f}",
            said(interval(row, "speedup"), "×"),
            said(interval(row, "share")), said(interval(row, "end")), said(interval(row, "better"), "", 2),
            f"{row['regret']:,.1f}",
        ]
        for run in runs
        for row in sorted(run.board, key=lambda row: (row["source"], -(row["share"] or 0.0)))
    ]  # fmt: skip
    head = [
        "chooser", "source", "run", "seeds", "speedup [95 %]", "share of the best table [95 %]", "at the end [95 %]",
        "P(better than the reference) [95 %]", "regret, rounds (mean of seeds)",
    ]  # fmt: skip
    about = "Choosers of plans, the best of each source first. 'specrl validate' checks the records behind a line."
    tables = [columns("Choosers of plans", head, rows)] if rows else []
    lacking = "" if rows else "Nothing here compares choosers."
    return Section("leaderboard", "Leaderboard", about, (), tables, lacking, "" if rows else evaluation(runs))
