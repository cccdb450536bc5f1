"""The sections of the report: the figures and tables of each run, and the tables that compare runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from specrl.core.statistics import Interval
from specrl.reports import figures
from specrl.reports.data import PARTS, PlanResult, Row, RunData, batch_sizes, interval


class Table(NamedTuple):
    """A table of text; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawing(NamedTuple):
    """A figure as SVG, and the id of its caption on the page."""

    svg: str
    caption: str
    id: str = ""


Content = Iterator[Drawing | Table]


def number(value: Interval | None, unit: str = "", digits: int = 3) -> str:
    """Return a number with its unit, and its interval in brackets if it has one; a dash for None and nan."""
    if value is None or not math.isfinite(value.value):
        return "–"
    bounds = f" [{value.low:,.{digits}f}, {value.high:,.{digits}f}]"
    known = math.isfinite(value.low) and math.isfinite(value.high)
    return f"{value.value:,.{digits}f}{unit}{bounds if known else ''}"


def _table(caption: str, rows: Sequence[Row]) -> Iterator[Table]:
    """Yield a table of rows by heading, without empty columns; nothing if there are no rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    texts = [{name: _text(row.get(name)) for name in names} for row in rows]
    head = [name for name in names if name == names[0] or any(row[name] != "–" for row in texts)]
    if rows:
        yield Table(caption, head, [[row[name] for name in head] for row in texts])


def _text(value: object) -> str:
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(part)}" for key, part in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _drawing(caption: str, paint: Callable[..., None], **data: object) -> Drawing:
    """Return a figure that one of the `paint_...` functions draws from its data."""
    return Drawing(figures.draw_svg(partial(paint, **data)), caption)


def _overview(runs: Sequence[RunData]) -> Iterator[Table]:
    rows = [
        {
            "run": run.name,
            "made by": [f"specrl {command}" for command in run.commands],
            "date, UTC": run.environment.get("date_utc"),
            "requests served": f"{run.log[-1]['requests']:,.0f}" if run.log else None,
            "chosen plan, measured speedup [95 %]": _chosen_plans(run),
            "processor": run.environment.get("cpu"),
            "cores": run.environment.get("cores"),
            "commit": str(run.environment.get("commit") or "")[:12],
        }
        for run in runs
    ]
    yield from _table("The runs on this page", rows)


def _chosen_plans(run: RunData) -> str:
    speedups = {(r.batch_size, r.plan): f", {number(r.speedup, '×')}" for r in run.results if r.origin == "measured"}
    plans = sorted(run.plans.items())
    return "; ".join(f"batch size {batch}: {plan}{speedups.get((batch, plan), '')}" for batch, plan in plans)


def _learning(run: RunData, runs: Sequence[RunData]) -> Content:
    if not run.log:
        return
    logs = [other.log for other in runs]
    for quantity, label in (("accept_length", "Accept length"), ("speedup", "Speedup")):
        caption = f"{label} over the last 400 rounds at each batch size, by requests served."
        yield _drawing(caption, figures.paint_learning, log=run.log, quantity=quantity, logs=logs, gate=run.gate)
    rows: list[Row] = []
    for logged in figures.thin(run.log):
        row: dict[str, object] = {
            "requests": f"{logged['requests']:,.0f}",
            "seconds": f"{logged['seconds']:,.0f}",
            "draft version": f"{logged['draft_version']:.0f}",
        }
        for b in batch_sizes(run.log):
            row[f"batch size {b}: plan"] = logged.get(f"plan_{b}")
            row[f"batch size {b}: speedup [95 %]"] = number(interval(logged, f"speedup_{b}"), "×")
            row[f"batch size {b}: accept length [95 %]"] = number(interval(logged, f"accept_length_{b}"), digits=2)
        rows.append(row)
    yield from _table(f"Learning curve of {run.name}", rows)
    rows = [
        {
            "requests": f"{decision['requests']:.0f}",
            "draft version": f"{decision['version']:.0f}",
            "check": decision["check"],
            "decision": figures.decision(decision),
            "reason": decision["reason"],
        }
        for decision in run.gate
    ]
    yield from _table(f"Decisions of the gate of {run.name}", rows)


def _origin(result: PlanResult) -> str:
    origin = "live, second half of the run" if result.origin == "live" else result.origin
    return origin + ("" if result.temperature is None else f", temperature {result.temperature:g}")


def _plan(result: PlanResult) -> dict[str, object]:
    """Return the columns that identify a result."""
    return {"batch size": result.batch_size, "plan": result.plan, "how": _origin(result)}


def _by_origin(results: Sequence[PlanResult]) -> Iterator[tuple[str, list[PlanResult]]]:
    """Yield results that belong in one figure, with a title."""
    for origin in dict.fromkeys(map(_origin, results)):
        yield origin, [result for result in results if _origin(result) == origin]


def _speedups(run: RunData, runs: Sequence[RunData]) -> Content:
    for title, results in _by_origin(run.speedups):
        chosen, why = _chosen(run, results, runs)
        caption = f"Speedup over plain decoding, {title}. ★ {why}."
        yield _drawing(caption, figures.paint_heatmap, results=results, chosen=chosen)


def _chosen(run: RunData, results: Sequence[PlanResult], runs: Sequence[RunData]) -> tuple[Mapping[int, str], str]:
    """The plans to mark by batch size, and why: of this run, of the run that trained its draft, or the fastest."""
    if run.plans:
        return run.plans, "chosen by the run"
    draft = run.config.get("draft.path")
    for other in runs:
        if other.plans and isinstance(draft, str) and Path(draft).resolve() == other.path / "draft":
            return other.plans, f"chosen by {other.name}, which trained this draft"
    ascending = sorted(results, key=lambda result: result.speedup.value if result.speedup else 0.0)
    return {result.batch_size: result.plan for result in ascending}, "fastest here (selected after measuring)"


def _speedup_table(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield speedups of all runs, side by side."""
    rows: dict[tuple[str, float, int, str], dict[str, object]] = {}
    for run in runs:
        for r in run.speedups:
            row = rows.setdefault((r.origin, r.temperature or 0.0, r.batch_size, r.plan), _plan(r))
            row[run.name] = number(r.speedup, "×")
    yield from _table("Speedup over plain decoding [95 %]", [row for _, row in sorted(rows.items())])


def _acceptance(run: RunData, runs: Sequence[RunData]) -> Content:
    known = [result for result in run.results if result.speculative and result.acceptance]
    for title, results in _by_origin(known):
        ascending = sorted(results, key=lambda r: (math.isfinite(r.acceptance[0].low), len(r.acceptance)))
        longest = dict(sorted({result.batch_size: result for result in ascending}.items()))
        caption = f"Acceptance by position, {title}: the longest plan at each batch size."
        yield _drawing(caption, figures.paint_acceptance, results=list(longest.values()))
    rows = []
    for result in known:
        row = _plan(result)
        for position, share in enumerate(result.acceptance, 1):
            percent = Interval(100 * share.value, 100 * share.low, 100 * share.high)
            row[f"position {position} [95 %]"] = number(percent, " %", 1)
        rows.append(row)
    yield from _table(f"Acceptance by position of {run.name}", rows)


def _breakdown(run: RunData, runs: Sequence[RunData]) -> Content:
    known = [result for result in run.results if result.parts_ms]
    for title, results in _by_origin(known):
        yield _drawing(f"Time of a round by part, {title}.", figures.paint_breakdown, results=results)
    rows = []
    for result in known:
        parts = {f"{part} [95 %]": number((result.parts_ms or {}).get(part), " ms") for part in PARTS}
        rows.append({**_plan(result), **parts, "round [95 %]": number(result.round_ms, " ms")})
    yield from _table(f"Time of a round of {run.name}", rows)


def _costs(run: RunData, runs: Sequence[RunData]) -> Content:
    rows = []
    for result in run.results:
        tps, spread = result.request_tps, result.spread
        row = {
            **_plan(result),
            "ms per round or plain step [95 %]": number(result.round_ms, " ms"),
            "accept length [95 %]": number(result.accept_length, digits=2),
            "tokens/s of a request, median (5th to 95th percentile)": (
                f"{tps[0]:,.0f} ({tps[1]:,.0f} to {tps[2]:,.0f})" if tps else None
            ),
            "spread of a round (log SD)": None if spread is None else f"{spread:.1%}",
        }
        if result.round_ms:
            rows.append(row)
    yield from _table(f"Costs of {run.name}", rows)


def _regret(run: RunData, runs: Sequence[RunData]) -> Content:
    for source in dict.fromkeys(row["source"] for row in run.regret):
        curves = [row for row in run.regret if row["source"] == source]
        yield _drawing(f"Regret on {source}: mean and range over seeds.", figures.paint_regret, rows=curves)
        rows = [
            {
                "chooser": chooser,
                "rounds": f"{row['round']:,.0f}",
                "regret, mean of seeds": f"{row['regret']:,.1f}",
                "least": f"{row['least']:,.1f}",
                "greatest": f"{row['greatest']:,.1f}",
            }
            for chooser, row in {row["chooser"]: row for row in curves}.items()
        ]
        yield from _table(f"Regret on {source} at the end", rows)


def _leaderboard(run: RunData, runs: Sequence[RunData]) -> Content:
    rows = [
        {
            "chooser": row["chooser"],
            "source": row["source"],
            "seeds": f"{row['seeds']:.0f}",
            "speedup [95 %]": number(interval(row, "speedup"), "×"),
            "share of the best table [95 %]": number(interval(row, "share")),
            "at the end [95 %]": number(interval(row, "end")),
            "P(better than the reference) [95 %]": number(interval(row, "better"), digits=2),
            "regret, rounds (mean of seeds)": f"{row['regret']:,.1f}",
        }
        for row in sorted(run.leaderboard, key=lambda row: (row["source"], -(row["share"] or 0.0)))
    ]
    yield from _table(f"Choosers of {run.name}", rows)


def _environment(runs: Sequence[RunData]) -> Iterator[Table]:
    for caption, records in (
        ("Hardware and software", {run.name: run.environment for run in runs}),
        ("Configuration", {run.name: run.config for run in runs}),
    ):
        rows: list[Row] = []
        for key in dict.fromkeys(key for record in records.values() for key in record):
            texts = {name: _text(record.get(key)) for name, record in records.items()}
            same = {"same?": "same" if len(set(texts.values())) == 1 else "differs"} if len(runs) > 1 else {}
            if set(texts.values()) != {"–"}:
                rows.append({"": key, **texts, **same})
        yield from _table(caption, rows)


# for each section, by id: its content for one of the runs, and its tables that compare all runs
OF_RUN: dict[str, Callable[[RunData, Sequence[RunData]], Content]] = {
    "learning": _learning,
    "speedups": _speedups,
    "acceptance": _acceptance,
    "breakdown": _breakdown,
    "costs": _costs,
    "regret": _regret,
    "leaderboard": _leaderboard,
}
OF_ALL: dict[str, Callable[[Sequence[RunData]], Iterator[Table]]] = {
    "overview": _overview,
    "speedups": _speedup_table,
    "environment": _environment,
}
