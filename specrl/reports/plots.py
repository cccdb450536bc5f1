"""Plots of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from specrl.measure.paired import PLAIN, Measured

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's


def plot_learning(log: Sequence[Mapping[str, object]], batch_sizes: Sequence[int], path: Path) -> None:
    """Accept length and speedup against requests served, a line per batch size."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for batch, colour in zip(batch_sizes, _COLOURS, strict=False):
        served = [row["requests"] for row in log]
        for axes, name in ((left, f"accept_length_{batch}"), (right, f"speedup_{batch}")):
            axes.plot(served, [row.get(name) for row in log], "o-", ms=3, color=colour, label=f"batch {batch}")
    left.set(xlabel="requests served", ylabel="tokens per request and round", title="Accept length while learning")
    right.set(xlabel="requests served", ylabel="speedup over plain decoding", title="Measured speedup while learning")
    right.axhline(1.0, color="0.4", lw=1, ls="--")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    _save(figure, path)


def plot_speedups(results: Sequence[Measured], path: Path) -> None:
    """Measured speedups with their 95 % intervals, a bar per batch size and plan."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    shown = [m for m in results if m.speedup is not None and m.name != PLAIN]
    for x, m in enumerate(shown):
        s = m.speedup
        assert s is not None
        colour = _COLOURS[0] if m.name == m.plan else "0.65"
        axes.bar(x, s.value, 0.6, color=colour)
        axes.errorbar(x, s.value, [[s.value - s.low], [s.high - s.value]], color="black", capsize=4, lw=1.2)
        axes.annotate(f"{s.value:.2f}×", (x, s.high), (0, 4), textcoords="offset points", ha="center")
    axes.axhline(1.0, color="0.3", lw=1, ls="--")
    labels = [f"batch {m.batch_size}\nplan {m.plan}" + ("" if m.name == m.plan else f"\n{m.name}") for m in shown]
    axes.set_xticks(range(len(shown)), labels)
    axes.set(ylabel="speedup over plain decoding", title="Measured speedup, 95 % intervals")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_regret(lines: Sequence[Mapping[str, object]], path: Path) -> None:
    """Cumulative regret of choosers over rounds, a panel per source; the rows come from `evaluation.scores.curves`."""
    sources = list(dict.fromkeys(str(line["source"]) for line in lines))
    figure = Figure(figsize=(4.8 * len(sources), 3.6), layout="constrained")
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        here = [line for line in lines if line["source"] == source]
        for n, chooser in enumerate(dict.fromkeys(str(line["chooser"]) for line in here)):
            x, y, low, high = (
                [line[name] for line in here if line["chooser"] == chooser]
                for name in ("round", "regret", "least", "greatest")
            )
            colour = _COLOURS[n % len(_COLOURS)]
            axes.plot(x, y, color=colour, label=chooser)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel="round", ylabel="cumulative regret, rounds", title=source)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
