"""The pictures of a report, each in a light and a dark variant, as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from specrl.core.plan import Plan
from specrl.core.statistics import Interval
from specrl.reports.data import PARTS, Cell, batch_sizes
from specrl.reports.files import Row

DPI = 192  # two dots for a pixel of the page
_MARKS = "os^Dv<>p"
DECISIONS = ("passed a trial", "passed a held-out look", "refused", "harmful")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a variant; lines are told apart by their marks too."""

    paper: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    slower: str
    even: str
    faster: str


THEMES = {
    "light": Theme(
        "#ffffff", "#1b1f24", "#8a929c", ("#0072b2", "#c14e00", "#00805c", "#a8518a", "#8a6400", "#3b3b9e"),
        "#d98032", "#f4f4f2", "#3a87c4",
    ),
    "dark": Theme(
        "#14171c", "#e6e9ed", "#78818c", ("#6cb8f0", "#ff9d5c", "#45cfa5", "#e8a5d0", "#e5c158", "#a9a6ff"),
        "#b5611c", "#262b33", "#2f78b5",
    ),
}  # fmt: skip


def variants(draw: Callable[[Theme], Figure]) -> dict[str, bytes]:
    """A picture as PNG in every theme; names from files are text, never mathematics."""
    out = {}
    for name, theme in THEMES.items():
        colours: Any = {
            "figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
            "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
            "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint, "grid.alpha": 0.25,
            "legend.frameon": False, "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False,
            "text.parse_math": False, "figure.constrained_layout.use": True,
        }  # fmt: skip
        with matplotlib.rc_context(colours):
            figure = draw(theme)
            FigureCanvasAgg(figure)
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
        out[name] = file.getvalue()
    return out


def learning(
    log: Sequence[Row], quantity: str, gate: Sequence[Row], drift: Sequence[Row], span: tuple[float, float], what: str
) -> Callable[[Theme], Figure]:
    """A quantity of the log against requests served, a line per batch size with its interval, and what happened.

    Args:
        log: rows of log.csv.
        quantity: 'speedup' or 'accept_length'.
        gate: decisions to mark.
        drift: alarms to mark.
        span: of the vertical axis, so that runs can be laid side by side.
        what: name of the vertical axis.
    """

    def draw(theme: Theme) -> Figure:
        axes, figure = _axes(height=3.3)
        served = [row["requests"] for row in log]
        for n, batch in enumerate(batch_sizes(log)):
            colour, key = theme.lines[n % len(theme.lines)], f"{quantity}_{batch}"
            y, low, high = (_numbers(log, key + end) for end in ("", "_low", "_high"))
            axes.fill_between(served, low, high, color=colour, alpha=0.2, lw=0)
            axes.plot(served, y, color=colour, marker=_MARKS[n % len(_MARKS)], ms=3.5, lw=1.4, label=f"batch {batch}")
        axes.axhline(1.0, color=theme.faint, lw=1, ls="--")
        room = span[1] - span[0]
        axes.set(xlabel="requests served", ylabel=what, ylim=(span[0] - 0.12 * room, span[1] + 0.04 * room))
        floor = axes.get_xaxis_transform()
        versions = np.array([row["draft_version"] for row in log])
        swaps = np.array(served)[1:][np.diff(versions) != 0]
        axes.plot(swaps, [0.02] * len(swaps), "|", color=theme.ink, ms=7, transform=floor, label="new draft serves")
        looks = zip(DECISIONS, "^^vX", (2, 2, 0, 1), ("full", "none", "none", "full"), strict=True)
        for kind, mark, which, fill in looks:
            at = [row["requests"] for row in gate if decision(row) == kind]
            style: Any = {"color": theme.lines[which], "fillstyle": fill, "ms": 5, "label": f"gate: {kind}"}
            if at:
                axes.plot(at, [0.075] * len(at), mark, transform=floor, **style)
        for n, row in enumerate(drift):
            label = "alarm of drift" if n == 0 else None
            axes.axvline(row["requests"], color=theme.lines[3], lw=1.2, ls=":", label=label)
        axes.grid(True)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=7.5, borderaxespad=0.2)
        return figure

    return draw


def decision(row: Row) -> str:
    """What a gate said, one of `DECISIONS`."""
    if row["passed"] == "True":
        return DECISIONS[0] if row["look"] == "trial" else DECISIONS[1]
    return DECISIONS[3] if row["harmful"] == "True" else DECISIONS[2]


def heat(cells: Sequence[Cell], chosen: Mapping[int, str], span: tuple[float, float]) -> Callable[[Theme], Figure]:
    """Speedup by batch size and plan; white is plain decoding's speed, what was chosen has a frame and a star."""
    plans, batches = plan_order(cells), sorted({cell.batch_size for cell in cells})
    known = {(cell.batch_size, cell.plan): cell.speedup for cell in cells if cell.speedup is not None}

    def draw(theme: Theme) -> Figure:
        axes, figure = _axes(height=1.15 + 0.46 * len(batches), width=max(4.6, 1.3 + 0.78 * len(plans)))
        shades = LinearSegmentedColormap.from_list("speedup", (theme.slower, theme.even, theme.faster))
        colours = shades.with_extremes(bad=theme.paper)
        values = np.full((len(batches), len(plans)), np.nan)
        for (batch, plan), speedup in known.items():
            values[batches.index(batch), plans.index(plan)] = speedup.value
        norm = TwoSlopeNorm(1.0, min(0.9, span[0]), max(1.1, span[1]))
        image = axes.imshow(values, colours, norm, aspect="auto")
        for (batch, plan), speedup in known.items():
            x, y = plans.index(plan), batches.index(batch)
            star = " ★" if chosen.get(batch) == plan else ""
            text = f"{speedup.value:.2f}{star}"
            if math.isfinite(speedup.half_width):
                text += f"\n±{speedup.half_width:.2f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, weight="bold" if star else "normal")
            if star:
                frame = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, lw=1.8, ec=theme.ink)
                axes.add_patch(frame)
        axes.set_xticks(range(len(plans)), [plan.replace(" (", "\n(") for plan in plans], fontsize=8)
        axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set(xlabel="plan", ylabel="batch size")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.set_yscale("linear")
        bar.ax.tick_params(labelsize=7.5)
        return figure

    return draw


def standing(cells: Sequence[Cell]) -> Callable[[Theme], Figure]:
    """Share of drafts that stood, with all before them, by position: a line for each cell."""

    def draw(theme: Theme) -> Figure:
        axes, figure = _axes()
        most = max(len(cell.standing) for cell in cells)
        for n, cell in enumerate(cells):
            x = np.arange(1, len(cell.standing) + 1) + 0.05 * (n - (len(cells) - 1) / 2)
            axes.errorbar(
                x, [100 * s.value for s in cell.standing], 100 * _bars(cell.standing),
                color=theme.lines[n % len(theme.lines)], marker=_MARKS[n % len(_MARKS)], ms=4, lw=1.3, capsize=2.5,
                label=f"batch {cell.batch_size}, plan {cell.plan}",
            )  # fmt: skip
        axes.set(xlabel="position of the draft", ylabel="requests and rounds, %", ylim=(0, 100))
        axes.set_xticks(range(1, most + 1))
        axes.grid(True)
        axes.legend(fontsize=8)
        return figure

    return draw


def breakdown(cells: Sequence[Cell], longest_ms: float) -> Callable[[Theme], Figure]:
    """Milliseconds of a round by part, a bar for each cell."""

    def draw(theme: Theme) -> Figure:
        axes, figure = _axes(height=1.0 + 0.24 * len(cells))
        left = np.zeros(len(cells))
        for n, part in enumerate(PARTS):
            if not any(part in cell.parts_ms for cell in cells):
                continue
            ms = np.array([cell.parts_ms[part].value if part in cell.parts_ms else 0.0 for cell in cells])
            hatch = ("", "//", "..")[n]
            axes.barh(range(len(cells)), ms, left=left, height=0.72, color=theme.lines[n], label=part, hatch=hatch,
                      edgecolor=theme.paper, lw=0)  # fmt: skip
            left += ms
        whole = [cell.round_ms or Interval(0.0, math.nan, math.nan) for cell in cells]
        axes.errorbar(left, range(len(cells)), xerr=_bars(whole), fmt="none", ecolor=theme.ink, capsize=2, lw=1)
        axes.set_yticks(range(len(cells)), [f"batch {c.batch_size}, {c.plan}" for c in cells], fontsize=7.5)
        axes.invert_yaxis()
        axes.set(xlabel="ms per round", xlim=(0, 1.06 * longest_ms))
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8, borderaxespad=0.2)
        return figure

    return draw


def regret(rows: Sequence[Row]) -> Callable[[Theme], Figure]:
    """Cumulative regret of choosers over rounds, of rows of one source."""

    def draw(theme: Theme) -> Figure:
        axes, figure = _axes()
        for n, chooser in enumerate(dict.fromkeys(row["chooser"] for row in rows)):
            mine = [row for row in rows if row["chooser"] == chooser]
            x, y, low, high = (_numbers(mine, key) for key in ("round", "regret", "least", "greatest"))
            colour = theme.lines[n % len(theme.lines)]
            every = max(1, len(mine) // 8)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(x, y, color=colour, lw=1.4, marker=_MARKS[n % len(_MARKS)], ms=4, markevery=every, label=chooser)
        axes.set(xlabel="round", ylabel="cumulative regret, rounds")
        axes.grid(True)
        axes.legend(fontsize=8)
        return figure

    return draw


def plan_order(cells: Sequence[Cell]) -> list[str]:
    """Plans ascending, then what has a name beside its plan."""

    def rank(plan: str) -> tuple[bool, Plan, str]:
        first, _, name = plan.partition(" ")
        try:
            return bool(name), Plan.parse(first), name
        except ValueError:
            return True, Plan(0), plan

    return sorted({cell.plan for cell in cells}, key=rank)


def _axes(height: float = 3.1, width: float = 4.6) -> tuple[Axes, Figure]:
    figure = Figure(figsize=(width, height))
    return figure.subplots(), figure


def _numbers(rows: Sequence[Row], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else row[key] for row in rows]


def _bars(intervals: Sequence[Interval]) -> np.ndarray:
    """[2, n] lengths of error bars below and above; nan draws none."""
    return np.array([[i.value - i.low for i in intervals], [i.high - i.value for i in intervals]])
