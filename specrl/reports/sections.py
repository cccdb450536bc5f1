"""The sections of the report: the figures and tables of each run, and the tables that compare runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from specrl.core.statistics import Interval
from specrl.reports import figures
from specrl.reports.data import PARTS, PlanResult, Row, RunData, batch_sizes, interval

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], object]]  # of a table: heading -> text of an item's field


class Table(NamedTuple):
    """A table of text; the first column names the rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Drawing(NamedTuple):
    """A figure as an SVG document."""

    svg: str
    caption: str


Content = Iterator[Drawing | Table]


def number(value: Interval | None, unit: str = "", digits: int = 3) -> str:
    """A number with its unit, and its interval in brackets if it has one; a dash for None and nan."""
    if value is None or not math.isfinite(value.value):
        return "–"
    bounds = f" [{value.low:,.{digits}f}, {value.high:,.{digits}f}]"
    known = math.isfinite(value.low) and math.isfinite(value.high)
    return f"{value.value:,.{digits}f}{unit}{bounds if known else ''}"


def _table(caption: str, items: Iterable[T], columns: Columns[T]) -> Iterator[Table]:
    """A table with a row for each item and without empty columns; none for no items."""
    rows = [[_text(field(item)) for field in columns.values()] for item in items]
    kept = [n for n in range(len(columns)) if n == 0 or any(row[n] != "–" for row in rows)]
    if rows:
        yield Table(caption, [list(columns)[n] for n in kept], [[row[n] for n in kept] for row in rows])


def _text(value: object) -> str:
    if value is None or value in ("", [], {}):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_text(part)}" for key, part in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _overview(runs: Sequence[RunData]) -> Iterator[Table]:
    columns: Columns[RunData] = {
        "run": lambda run: run.name,
        "made by": lambda run: [f"specrl {command}" for command in run.commands],
        "date, UTC": lambda run: run.environment.get("date_utc"),
        "requests served": lambda run: f"{run.log[-1]['requests']:,.0f}" if run.log else None,
        "chosen plan, measured speedup [95 %]": _chosen_plans,
        "processor": lambda run: run.environment.get("cpu"),
        "cores": lambda run: run.environment.get("cores"),
        "commit": lambda run: str(run.environment.get("commit") or "")[:12],
    }
    yield from _table("The runs on this page", runs, columns)


def _chosen_plans(run: RunData) -> str:
    speedups = {(r.batch_size, r.plan): f", {number(r.speedup, '×')}" for r in run.results if r.origin == "measured"}
    plans = sorted(run.plans.items())
    return "; ".join(f"batch size {batch}: {plan}{speedups.get((batch, plan), '')}" for batch, plan in plans)


def _learning(run: RunData, runs: Sequence[RunData]) -> Content:
    if not run.log:
        return
    for quantity, label in (("accept_length", "Accept length"), ("speedup", "Speedup")):
        logs = [other.log for other in runs]
        svg = figures.draw_svg(figures.paint_learning, run.log, quantity, logs, run.gate)
        yield Drawing(svg, f"{label} over the last 400 rounds at each batch size, by requests served.")
    columns: dict[str, Callable[[Row], object]] = {
        "requests": lambda row: f"{row['requests']:,.0f}",
        "seconds": lambda row: f"{row['seconds']:,.0f}",
        "draft version": lambda row: f"{row['draft_version']:.0f}",
    }
    for b in batch_sizes(run.log):
        columns[f"batch size {b}: plan"] = partial(_field, f"plan_{b}")
        columns[f"batch size {b}: speedup [95 %]"] = partial(_number, f"speedup_{b}", "×", 3)
        columns[f"batch size {b}: accept length [95 %]"] = partial(_number, f"accept_length_{b}", "", 2)
    yield from _table(f"Learning curve of {run.name}", figures.thin(run.log), columns)
    gate: Columns[Row] = {
        "requests": lambda row: f"{row['requests']:.0f}",
        "draft version": lambda row: f"{row['version']:.0f}",
        "look": partial(_field, "look"),
        "decision": figures.decision,
        "reason": partial(_field, "reason"),
    }
    yield from _table(f"Decisions of the gate of {run.name}", run.gate, gate)


def _field(key: str, row: Row) -> object:
    return row.get(key)


def _number(key: str, unit: str, digits: int, row: Row) -> str:
    return number(interval(row, key), unit, digits)


def _origin(result: PlanResult) -> str:
    origin = "live, second half of the run" if result.origin == "live" else result.origin
    return origin + ("" if result.temperature is None else f", temperature {result.temperature:g}")


_PLAN: Columns[PlanResult] = {
    "batch size": lambda result: result.batch_size,
    "plan": lambda result: result.plan,
    "how": _origin,
}


def _by_origin(results: Iterable[PlanResult]) -> Iterator[tuple[str, list[PlanResult]]]:
    """Results that belong in one figure, with a title."""
    groups: dict[str, list[PlanResult]] = {}
    for result in results:
        groups.setdefault(_origin(result), []).append(result)
    yield from groups.items()


def _speedups(run: RunData, runs: Sequence[RunData]) -> Content:
    for title, results in _by_origin(filter(_has_speedup, run.results)):
        chosen, why = _chosen(run, results, runs)
        svg = figures.draw_svg(figures.paint_heatmap, results, chosen)
        yield Drawing(svg, f"Speedup over plain decoding, {title}. ★ {why}.")


def _has_speedup(result: PlanResult) -> bool:
    return result.speculative and result.speedup is not None


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
    """Speedups of all runs, side by side."""
    rows: dict[tuple[str, float, int, str], dict[str, object]] = {}
    for run in runs:
        for r in filter(_has_speedup, run.results):
            row = rows.setdefault((r.origin, r.temperature or 0.0, r.batch_size, r.plan), {})
            row |= {head: field(r) for head, field in _PLAN.items()} | {run.name: number(r.speedup, "×")}
    columns = {head: partial(_field, head) for head in (*_PLAN, *(run.name for run in runs))}
    yield from _table("Speedup over plain decoding [95 %]", [row for _, row in sorted(rows.items())], columns)


def _acceptance(run: RunData, runs: Sequence[RunData]) -> Content:
    known = [result for result in run.results if result.speculative and result.acceptance]
    for title, results in _by_origin(known):
        ascending = sorted(results, key=lambda r: (math.isfinite(r.acceptance[0].low), len(r.acceptance)))
        longest = dict(sorted({result.batch_size: result for result in ascending}.items()))
        svg = figures.draw_svg(figures.paint_acceptance, list(longest.values()))
        yield Drawing(svg, f"Acceptance by position, {title}: the longest plan at each batch size.")
    positions = range(max((len(result.acceptance) for result in known), default=0))
    columns = {f"position {n + 1} [95 %]": partial(_at_position, n) for n in positions}
    yield from _table(f"Acceptance by position of {run.name}", known, {**_PLAN, **columns})


def _at_position(n: int, result: PlanResult) -> str:
    if n >= len(result.acceptance):
        return ""
    share = result.acceptance[n]
    return number(Interval(100 * share.value, 100 * share.low, 100 * share.high), " %", 1)


def _breakdown(run: RunData, runs: Sequence[RunData]) -> Content:
    known = [result for result in run.results if result.parts_ms]
    for title, results in _by_origin(known):
        yield Drawing(figures.draw_svg(figures.paint_breakdown, results), f"Time of a round by part, {title}.")
    columns: dict[str, Callable[[PlanResult], object]] = {
        **_PLAN,
        **{f"{part} [95 %]": partial(_part, part) for part in PARTS},
        "round [95 %]": lambda result: number(result.round_ms, " ms"),
    }
    yield from _table(f"Time of a round of {run.name}", known, columns)


def _part(part: str, result: PlanResult) -> str:
    return number((result.parts_ms or {}).get(part), " ms")


def _costs(run: RunData, runs: Sequence[RunData]) -> Content:
    columns: Columns[PlanResult] = {
        **_PLAN,
        "ms per round or plain step [95 %]": lambda result: number(result.round_ms, " ms"),
        "accept length [95 %]": lambda result: number(result.accept_length, digits=2),
        "tokens/s of a request, median (5th to 95th percentile)": lambda result: (
            "{:,.0f} ({:,.0f} to {:,.0f})".format(*result.request_tps) if result.request_tps else None
        ),
        "spread of a round (log SD)": lambda result: None if result.spread is None else f"{result.spread:.1%}",
    }
    yield from _table(f"Costs of {run.name}", (result for result in run.results if result.round_ms), columns)


def _regret(run: RunData, runs: Sequence[RunData]) -> Content:
    columns: Columns[Row] = {
        "chooser": partial(_field, "chooser"),
        "rounds": lambda row: f"{row['round']:,.0f}",
        "regret, mean of seeds": lambda row: f"{row['regret']:,.1f}",
        "least": lambda row: f"{row['least']:,.1f}",
        "greatest": lambda row: f"{row['greatest']:,.1f}",
    }
    for source in dict.fromkeys(row["source"] for row in run.regret):
        rows = [row for row in run.regret if row["source"] == source]
        yield Drawing(figures.draw_svg(figures.paint_regret, rows), f"Regret on {source}: mean and range over seeds.")
        yield from _table(f"Regret on {source} at the end", {row["chooser"]: row for row in rows}.values(), columns)


def _leaderboard(run: RunData, runs: Sequence[RunData]) -> Content:
    columns: Columns[Row] = {
        "chooser": partial(_field, "chooser"),
        "source": partial(_field, "source"),
        "seeds": lambda row: f"{row['seeds']:.0f}",
        "speedup [95 %]": partial(_number, "speedup", "×", 3),
        "share of the best table [95 %]": partial(_number, "share", "", 3),
        "at the end [95 %]": partial(_number, "end", "", 3),
        "P(better than the reference) [95 %]": partial(_number, "better", "", 2),
        "regret, rounds (mean of seeds)": lambda row: f"{row['regret']:,.1f}",
    }
    rows = sorted(run.leaderboard, key=lambda row: (row["source"], -(row["share"] or 0.0)))
    yield from _table(f"Choosers of {run.name}", rows, columns)


def _environment(runs: Sequence[RunData]) -> Iterator[Table]:
    for caption, records in (
        ("Hardware and software", {run.name: run.environment for run in runs}),
        ("Configuration", {run.name: run.config for run in runs}),
    ):
        rows: list[Row] = []
        for key in dict.fromkeys(key for record in records.values() for key in record):
            texts = {name: _text(record.get(key)) for name, record in records.items()}
            if set(texts.values()) != {"–"}:
                rows.append({"": key, **texts, "same?": "same" if len(set(texts.values())) == 1 else "differs"})
        heads = ["", *records, *(["same?"] if len(runs) > 1 else [])]
        yield from _table(caption, rows, {head: partial(_field, head) for head in heads})


OF_RUN: dict[
    str, Callable[[RunData, Sequence[RunData]], Content]
] = {  # id of a section: its content for one of the runs
    "learning": _learning,
    "speedups": _speedups,
    "acceptance": _acceptance,
    "breakdown": _breakdown,
    "costs": _costs,
    "regret": _regret,
    "leaderboard": _leaderboard,
}
OF_ALL: dict[str, Callable[[Sequence[RunData]], Iterator[Table]]] = {  # its tables that compare all runs
    "overview": _overview,
    "speedups": _speedup_table,
    "environment": _environment,
}
