"""Figures of runs: SVG for the HTML page, PNG for `specrl quickstart` and `specrl evaluate`.

Matplotlib draws each figure once, in the light colours of `COLOURS`. `inline_svg` replaces them by CSS variables, so
that the page shows the same drawing in its light and in its dark theme.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from specrl.core.plan import Plan
from specrl.core.statistics import Interval
from specrl.reports.data import PARTS, PlanResult, Row, batch_sizes

COLOURS = {  # CSS variable: (in the light theme, in the dark theme)
    "--paper": ("#ffffff", "#14171c"),
    "--ink": ("#1b1f24", "#e6e9ed"),
    "--faint": ("#8a929c", "#78818c"),
    "--slower": ("#d98032", "#94500f"),
    "--faster": ("#4f97d0", "#24639b"),
    "--line-1": ("#0072b2", "#6cb8f0"),
    "--line-2": ("#c14e00", "#ff9d5c"),
    "--line-3": ("#00805c", "#45cfa5"),
    "--line-4": ("#a8518a", "#e8a5d0"),
    "--line-5": ("#8a6400", "#e5c158"),
    "--line-6": ("#3b3b9e", "#a9a6ff"),
}
_LIGHT = {name: light for name, (light, _) in COLOURS.items()}
_PAPER, _INK, _FAINT = _LIGHT["--paper"], _LIGHT["--ink"], _LIGHT["--faint"]
_LINES = [colour for name, colour in _LIGHT.items() if name.startswith("--line")]
_MAX_POINTS = 200  # of a curve
_WIDTH = 4.2  # inches
_STYLE: Any = {
    "axes.axisbelow": True, "axes.edgecolor": _FAINT, "axes.facecolor": _PAPER, "axes.labelcolor": _INK,
    "axes.prop_cycle": cycler(color=_LINES, marker=list("os^Dv<")), "axes.spines.right": False,
    "axes.spines.top": False, "figure.constrained_layout.use": True, "figure.facecolor": _PAPER, "font.size": 9.0,
    "grid.alpha": 0.25, "grid.color": _FAINT, "hatch.linewidth": 0.8, "legend.columnspacing": 1.2,
    "legend.fontsize": 8.0, "legend.frameon": False, "legend.handlelength": 1.6, "svg.fonttype": "none",
    "svg.hashsalt": "specrl", "text.color": _INK, "text.parse_math": False, "xtick.color": _INK, "ytick.color": _INK,
}  # fmt: skip
_DECISIONS = {"passed a trial": "^", "passed held-out": "2", "refused": "v", "harmful": "X"}  # of the gate: marker


def draw_svg(paint: Callable[[Axes], None]) -> str:
    """Return the SVG document of a figure, in the light theme, that a `paint_...` function of this module draws."""
    with matplotlib.rc_context(_STYLE):
        file = io.StringIO()
        _figure([paint], _WIDTH, 3.0).savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def inline_svg(svg: str, name: str) -> str:
    """An `<svg>` element for an HTML page: colours are CSS variables, and `name` makes its ids unique on the page.

    Its accessible name is the element with the id `name`, such as the figure's caption.
    """
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-labelledby="{name}"', 1)
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\b(fill|stroke)="(#\w{6})"', r'style="\1: \2"', svg)  # a CSS variable needs a style
    variables = {light: f"var({variable})" for variable, light in _LIGHT.items()}
    return re.sub(r"(?<=: )#\w{6}\b", lambda colour: variables.get(colour[0], colour[0]), svg)


def plot_learning(log: Sequence[Row], path: Path) -> None:
    """Save a PNG of accept length and speedup over the requests of a run, with a line for each batch size."""
    paints = [
        partial(paint_learning, log=log, quantity=quantity, logs=[log]) for quantity in ("accept_length", "speedup")
    ]
    _save_png(path, paints, width=9.2, height=3.6)


def plot_speedups(rows: Sequence[Row], path: Path) -> None:
    """Save a PNG of the speedups of measured.csv with their 95 % intervals: a bar for each plan and batch size."""
    _save_png(path, [partial(_paint_bars, rows=rows)], width=max(6.4, float(len(rows))), height=3.6)


def plot_regret(rows: Sequence[Row], path: Path) -> None:
    """Save a PNG of the cumulative regret of choosers, with a panel for each source (rows of regret.csv)."""
    sources = dict.fromkeys(row["source"] for row in rows)
    paints = [partial(paint_regret, rows=[row for row in rows if row["source"] == source]) for source in sources]
    _save_png(path, paints, width=4.8 * len(sources), height=3.6)


def save_plot(draw: Callable[[], Any], path: Path) -> None:
    """Save what one of Optuna's matplotlib functions draws, unless the study has too few trials for it.

    Args:
        draw: draws a figure of its own and returns its axes, one or an array of them.
        path: of the PNG file.
    """
    plt.switch_backend("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's notes on experimental functions and on parameters with one value
        try:
            axes = np.ravel(draw())
        except (ValueError, RuntimeError):
            return
        figure = axes[0].figure
        figure.set_size_inches(max(7.0, 3.2 * len(axes)), 4.2)
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


def thin(rows: Sequence[Row]) -> Sequence[Row]:
    """Return about 200 evenly spaced rows; the last one is always among them."""
    step = max(1, -(-len(rows) // _MAX_POINTS))
    return rows[::-1][::step][::-1]


def decision(row: Row) -> str:
    """Return the decision in a row of gate.csv, in words."""
    if row["passed"] == "True":
        return "passed a trial" if row["check"] == "trial" else "passed held-out"
    return "harmful" if row["harmful"] == "True" else "refused"


def paint_learning(
    axes: Axes,
    log: Sequence[Row],
    quantity: str,
    logs: Sequence[Sequence[Row]],
    gate: Sequence[Row] = (),
) -> None:
    """Draw a quantity over the requests of a run, with a line for each batch size and marks for events.

    Args:
        axes: to draw on.
        log: rows of log.csv.
        quantity: 'speedup' or 'accept_length'.
        logs: of all runs that are shown side by side; the vertical axis has room for their values.
        gate: rows of gate.csv.
    """
    for batch in batch_sizes(log):
        keys = (f"{quantity}_{batch}{end}" for end in ("", "_low", "_high"))
        _line_with_band(axes, log, "requests", *keys, label=f"batch size {batch}")
    axes.axhline(1.0, color=_FAINT, lw=1, ls="--")
    unit = "speedup over plain decoding" if quantity == "speedup" else "tokens per request and round"
    shown = [row.get(f"{quantity}_{batch}") for other in logs for batch in batch_sizes(other) for row in other]
    values = np.array([1.0, *(value for value in shown if value is not None)])
    low, room = np.nanmin(values), max(0.05, np.ptp(values[~np.isnan(values)]))
    axes.set(xlabel="requests served", ylabel=unit, ylim=(low - 0.25 * room, low + 1.15 * room))  # wide bands are cut
    new = [b["requests"] for a, b in zip(log, log[1:], strict=False) if a["draft_version"] != b["draft_version"]]
    decided = {kind: [row["requests"] for row in gate if decision(row) == kind] for kind in _DECISIONS}
    for kind, marker, at in (("new draft", "|", new), *((kind, _DECISIONS[kind], at) for kind, at in decided.items())):
        style: Any = {"marker": marker, "ls": "", "ms": 5, "transform": axes.get_xaxis_transform()}
        if at:
            axes.plot(at, [0.03 if at is new else 0.09] * len(at), color=_INK, label=kind, **style)
    axes.grid(True)
    _legend_above(axes, 3)


def paint_regret(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw the cumulative regret of choosers over rounds: the mean over seeds, and the range (rows of one source)."""
    for chooser in dict.fromkeys(row["chooser"] for row in rows):
        curve = [row for row in rows if row["chooser"] == chooser]
        _line_with_band(axes, curve, "round", "regret", "least", "greatest", label=chooser)
    axes.set(xlabel="round", ylabel="cumulative regret, rounds", title=", ".join({row["source"] for row in rows}))
    axes.grid(True)
    _legend_above(axes, 2)


def paint_heatmap(axes: Axes, results: Sequence[PlanResult], chosen: Mapping[int, str]) -> None:
    """Draw speedups by batch size and plan; a frame and a star mark the `chosen` plan of each batch size."""
    plans, batches = _plan_order(results), sorted({result.batch_size for result in results})
    _figure_of(axes).set_size_inches(max(_WIDTH, 0.8 + 0.72 * len(plans)), 0.9 + 0.46 * len(batches))
    for result in results:
        if result.speedup is None:
            continue
        x, y = plans.index(result.plan), batches.index(result.batch_size)
        star = chosen.get(result.batch_size) == result.plan
        value, half = result.speedup.value, result.speedup.half_width
        colour, strength = _LIGHT["--faster" if value > 1.0 else "--slower"], min(1.0, 2.0 * abs(np.log(value)))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour, alpha=strength, lw=0))
        if star:
            axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, lw=1.8, ec=_INK))
        text = f"{value:.2f}{' ★' if star else ''}" + (f"\n±{half:.2f}" if np.isfinite(half) else "")
        axes.text(x, y, text, ha="center", va="center", fontsize=8, weight="bold" if star else "normal")
    axes.set_xticks(range(len(plans)), [plan.replace(" (", "\n(") for plan in plans], fontsize=8)
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="plan", ylabel="batch size", xlim=(-0.5, len(plans) - 0.5), ylim=(len(batches) - 0.5, -0.5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def paint_acceptance(axes: Axes, results: Sequence[PlanResult]) -> None:
    """Draw acceptance by position, with a line for each result."""
    for n, result in enumerate(results):
        positions = np.arange(len(result.acceptance)) + 1 + 0.05 * (n - (len(results) - 1) / 2)
        percent, bars = [100 * share.value for share in result.acceptance], 100 * _error_bars(result.acceptance)
        label = f"batch size {result.batch_size}, plan {result.plan}"
        axes.errorbar(positions, percent, bars, ms=4, capsize=2.5, label=label)
    axes.set(xlabel="position of the draft token", ylabel="accepted, %", ylim=(0, 100))
    axes.set_xticks(range(1, max(len(result.acceptance) for result in results) + 1))
    axes.grid(True)
    _legend_above(axes, 2)


def paint_breakdown(axes: Axes, results: Sequence[PlanResult]) -> None:
    """Draw the milliseconds of a round by part, with a bar for each result."""
    _figure_of(axes).set_size_inches(_WIDTH, 1.1 + 0.24 * len(results))
    left, rows = np.zeros(len(results)), range(len(results))
    for n, part in enumerate(PARTS):
        intervals = [(result.parts_ms or {}).get(part) for result in results]
        ms = [value.value if value else 0.0 for value in intervals]
        hatch = ("", "//", "\\\\")[n]
        axes.barh(rows, ms, 0.72, left, color=_LINES[n], label=part, hatch=hatch, edgecolor=_PAPER, lw=0)
        left += ms
    whole = [result.round_ms or Interval(np.nan, np.nan, np.nan) for result in results]
    axes.errorbar(left, rows, xerr=_error_bars(whole), fmt="none", color=_INK, capsize=2, lw=1)
    axes.set_yticks(rows, [f"batch size {r.batch_size}, {r.plan}" for r in results], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="ms per round")
    axes.grid(True, axis="x")
    _legend_above(axes, 3)


def _plan_order(results: Sequence[PlanResult]) -> list[str]:
    """Return the plans of results, ascending, then those with a name."""

    def rank(text: str) -> tuple[bool, Plan, str]:
        plan, _, name = text.partition(" ")
        try:
            return bool(name), Plan.parse(plan), name
        except ValueError:
            return True, Plan(0), text

    return sorted({result.plan for result in results}, key=rank)


def _paint_bars(axes: Axes, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row["speedup"] is not None and not row["plan"].startswith("plain")]
    for x, row in enumerate(shown):
        speedup = Interval(row["speedup"], row["low"], row["high"])
        axes.bar(x, speedup.value, 0.6, color=_FAINT if " " in row["plan"] else _LINES[0])
        axes.errorbar(x, speedup.value, _error_bars([speedup]), fmt="none", color=_INK, capsize=4, lw=1.2)
        axes.annotate(f"{speedup.value:.2f}×", (x, speedup.high), (0, 4), textcoords="offset points", ha="center")
    axes.axhline(1.0, color=_INK, lw=1, ls="--")
    plans = [row["plan"].replace(" (", "\n(") for row in shown]
    labels = [f"batch {row['batch_size']:.0f}\nplan {plan}" for row, plan in zip(shown, plans, strict=True)]
    axes.set_xticks(range(len(shown)), labels)
    axes.set(ylabel="speedup over plain decoding")
    axes.margins(y=0.15)


def _save_png(path: Path, paints: Sequence[Callable[[Axes], None]], *, width: float, height: float) -> None:
    with matplotlib.rc_context(_STYLE):
        _figure(paints, width, height).savefig(path, dpi=150)


def _figure(paints: Sequence[Callable[[Axes], None]], width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height))
    for axes, paint in zip(figure.subplots(1, len(paints), squeeze=False)[0], paints, strict=True):
        paint(axes)
    return figure


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _legend_above(axes: Axes, ncols: int) -> None:
    """Put a legend above all panels; the panels of a figure have the same lines."""
    figure = _figure_of(axes)
    if not figure.legends:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=ncols)


def _line_with_band(axes: Axes, rows: Sequence[Row], x: str, y: str, low: str, high: str, *, label: str) -> None:
    """Draw the columns with these names."""
    shown = thin(rows)
    at, line, bottom, top = (
        [np.nan if row.get(key) is None else row[key] for row in shown] for key in (x, y, low, high)
    )
    axes.fill_between(at, bottom, top, alpha=0.18, lw=0)
    axes.plot(at, line, lw=1.4, ms=3.5, markevery=max(1, len(shown) // 10), label=label)


def _error_bars(intervals: Sequence[Interval]) -> np.ndarray:
    """[2, n] lengths of error bars below and above; nan draws none."""
    return np.array([[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]])
