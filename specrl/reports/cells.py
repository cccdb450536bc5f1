"""What plans are worth at each batch size: speedups, acceptance by position, seconds by part, costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from specrl.core.statistics import Interval
from specrl.reports import figures
from specrl.reports.data import PARTS, Cell, RunData
from specrl.reports.page import Album, Entry, Section, Table, columns, said
from specrl.reports.sections import section, with_draft

_ORIGINS = {
    "measured": "measured in turns with plain decoding",
    "simulated": "simulated in turns with plain decoding",
    "live": "live, in the second half of the run",
    "fitted": "fitted by specrl profile",
}


def speedups(runs: Sequence[RunData], album: Album) -> Section:
    """Heat maps with the chosen plans on them, and all runs in one table."""
    values = [c.speedup.value for run in runs for c in run.cells if c.drafts and c.speedup is not None]
    span = (min(values, default=0.9), max(values, default=1.1))

    def entry(run: RunData) -> Entry | None:
        pictures = []
        for cells in _groups(run):
            chosen, word = _chosen(run, cells, runs)
            stars = [c for c in cells if chosen.get(c.batch_size) == c.plan]
            key = "; ".join(f"batch {c.batch_size}: {c.plan}, {said(c.speedup, '×', 2)}" for c in stars)
            best = max(cells, key=lambda c: c.speedup.value if c.speedup else -math.inf)
            pictures.append(
                album.picture(
                    f"speedups {run.name}",
                    figures.heat(cells, chosen, span),
                    alt=f"Speedup by batch size and plan, {_titled(cells[0])}. ★ {word}: {key or 'none of these'}. "
                    f"Greatest: batch {best.batch_size}, {best.plan}, {said(best.speedup, '×', 2)}.",
                    caption=f"Speedup over plain decoding, {_titled(cells[0])}. ★ {word}.",
                )
            )
        return Entry(run.name, pictures) if pictures else None

    made = section(
        "speedups",
        "Speedup by batch size and plan",
        "A plan is num_steps/topk/num_draft_tokens; 0 drafts nothing. Blue is faster than plain decoding, orange is "
        "slower; ± is half a 95 % interval.",
        runs,
        entry,
        "speedups by plan",
        f"specrl bench{with_draft(runs)} --output_dir runs/bench",
    )
    rows: dict[tuple[str, float, int, str], list[str]] = {}
    for n, run in enumerate(runs):
        for cells in _groups(run):
            for cell in cells:
                at = (_titled(cell), cell.temperature or 0.0, cell.batch_size, cell.plan)
                rows.setdefault(at, ["–"] * len(runs))[n] = said(cell.speedup, "×")
    lines = [[str(batch), plan, how, *texts] for (how, _, batch, plan), texts in sorted(rows.items())]
    head = ["batch size", "plan", "how", *(run.name for run in runs)]
    caption = "Speedup over plain decoding [95 %]" + (", runs side by side" if len(runs) > 1 else "")
    return replace(made, folded=[columns(caption, head, lines)] if lines else [])


def _titled(cell: Cell) -> str:
    return _ORIGINS[cell.origin] + (f", temperature {cell.temperature:g}" if cell.temperature is not None else "")


def _groups(run: RunData, *, drafts: bool = True) -> list[list[Cell]]:
    """Cells of a run that belong on one picture."""
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in run.cells:
        if cell.drafts if drafts else True:
            groups.setdefault((cell.origin, cell.temperature), []).append(cell)
    return [cells for cells in groups.values() if not drafts or any(c.speedup is not None for c in cells)]


def _chosen(run: RunData, cells: Sequence[Cell], runs: Sequence[RunData]) -> tuple[Mapping[int, str], str]:
    """Plans to mark: this run's, those of the run whose draft it measured, or the fastest here."""
    if run.plans:
        return run.plans, "chosen by the run"
    draft = run.config.get("draft")
    for other in runs:
        if isinstance(draft, str) and other.plans and Path(draft).resolve() == other.path / "draft":
            return other.plans, f"chosen by {other.name}, whose draft this is"
    fastest: dict[int, Cell] = {}
    for cell in cells:
        best = fastest.get(cell.batch_size)
        if cell.speedup and (best is None or best.speedup is None or cell.speedup.value > best.speedup.value):
            fastest[cell.batch_size] = cell
    return {batch: cell.plan for batch, cell in fastest.items()}, "fastest here (picked after the fact)"


def standing(runs: Sequence[RunData], album: Album) -> Section:
    """How many drafts stood, by position."""

    def entry(run: RunData) -> Entry | None:
        pictures, rows = [], []
        for cells in _groups(run):
            seen = [cell for cell in cells if cell.standing]
            rows += [
                [f"{c.batch_size}", c.plan, _titled(c), *(said(_percent(s), " %", 1) for s in c.standing)] for c in seen
            ]
            longest = [  # one line per batch size: of the plan that drafts furthest
                max(
                    (c for c in seen if c.batch_size == batch),
                    key=lambda c: (math.isfinite(c.standing[0].low), len(c.standing)),
                )
                for batch in sorted({c.batch_size for c in seen})
            ]
            if not longest:
                continue
            key = " ".join(
                f"Batch {c.batch_size}, plan {c.plan}: {said(_percent(c.standing[0]), ' %', 0)} at position 1, "
                f"{said(_percent(c.standing[-1]), ' %', 0)} at {len(c.standing)}."
                for c in longest
            )
            pictures.append(
                album.picture(
                    f"acceptance {run.name}",
                    figures.standing(longest),
                    alt=f"Share of drafts that stood by position, {_titled(longest[0])}. {key}",
                    caption=f"{_titled(longest[0]).capitalize()}; at each batch size the plan that drafts furthest.",
                )
            )
        if not rows:
            return None
        most = max(len(row) for row in rows)
        head = ["batch size", "plan", "how", *(f"position {n} [95 %]" for n in range(1, most - 2))]
        table = Table(f"Acceptance by position of {run.name}", head, [row + ["–"] * (most - len(row)) for row in rows])
        return Entry(run.name, pictures, [table])

    about = (
        "The share of requests and rounds in which the draft at a position stood, and all before it. Their sum and 1, "
        "the target's own token, is the accept length. Intervals are over blocks of rounds."
    )
    command = f"specrl bench{with_draft(runs)} --output_dir runs/bench"
    return section("acceptance", "Acceptance by position", about, runs, entry, "drafts by position", command)


def _percent(share: Interval) -> Interval:
    return Interval(100 * share.value, 100 * share.low, 100 * share.high)


def breakdown(runs: Sequence[RunData], album: Album) -> Section:
    """Where the time of a round goes."""
    most = _longest_ms([cell for run in runs for cell in run.cells])

    def entry(run: RunData) -> Entry | None:
        pictures, rows = [], []
        for group in _groups(run, drafts=False):
            cells = [cell for cell in group if cell.parts_ms]
            own = _longest_ms(cells)
            if not cells:
                continue
            rows += [
                [
                    f"{c.batch_size}",
                    c.plan,
                    _titled(c),
                    *(said(c.parts_ms.get(p), " ms") for p in PARTS),
                    said(c.round_ms, " ms"),
                ]
                for c in cells
            ]
            longest = max(cells, key=lambda c: c.round_ms.value if c.round_ms else 0.0)
            scale = "on the scale of the longest of all runs" if 3 * own > most else "on a scale of its own"
            parts = ", ".join(f"{part} {said(ms, ' ms', 2)}" for part, ms in longest.parts_ms.items())
            pictures.append(
                album.picture(
                    f"breakdown {run.name}",
                    figures.breakdown(cells, most if 3 * own > most else own),
                    alt=f"Time of a round by part, {_titled(cells[0])}. Longest: batch {longest.batch_size}, "
                    f"plan {longest.plan}: {parts}.",
                    caption=f"Time of a round by part, {_titled(cells[0])}; {scale}.",
                )
            )
        head = ["batch size", "plan", "how", *(f"{part} [95 %]" for part in PARTS), "round [95 %]"]
        return Entry(run.name, pictures, [columns(f"Time of a round of {run.name}", head, rows)]) if rows else None

    about = (
        "Draft is proposing, verify the target's pass and the acceptance, other commit and bookkeeping. Prefill is "
        "timed apart and is not in it. A profile knows the draft's share only: there verify is all the rest."
    )
    command = f"specrl bench{with_draft(runs)} --output_dir runs/bench"
    return section("breakdown", "Time of a round", about, runs, entry, "seconds by part", command)


def _longest_ms(cells: Sequence[Cell]) -> float:
    ends = [(c.round_ms.value, c.round_ms.high) for c in cells if c.parts_ms and c.round_ms is not None]
    return max((high if math.isfinite(high) else value for value, high in ends), default=0.0)


def costs(runs: Sequence[RunData]) -> Section:
    """What a round costs and yields."""

    def entry(run: RunData) -> Entry | None:
        rows = [
            [
                f"{c.batch_size}",
                c.plan,
                _titled(c),
                said(c.round_ms, " ms"),
                said(c.accept_length, "", 2),
                f"{c.tps[0]:,.0f} ({c.tps[1]:,.0f} to {c.tps[2]:,.0f})" if c.tps else "–",
                f"{c.scatter:.1%}" if c.scatter is not None else "–",
            ]
            for c in run.cells
            if c.round_ms is not None
        ]
        head = [
            "batch size", "plan", "how", "ms per round or plain step [95 %]", "accept length [95 %]",
            "tokens/s of a request, median (5th to 95th percentile)", "scatter of a round (log SD)",
        ]  # fmt: skip
        return Entry(run.name, tables=[columns(f"Costs of {run.name}", head, rows)]) if rows else None

    about = (
        "What a round costs and yields. A plan pays where it yields more tokens for its time than plain decoding's "
        "one a step. A profile's costs are fits, whose error it does not record; scatter is what single rounds vary by."
    )
    command = f"specrl profile{with_draft(runs)} --output_dir runs/profile"
    return section("costs", "Costs", about, runs, entry, "costs", command)
