"""`specrl watch`: a run that serves and learns, in the terminal while it goes on."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from specrl.core.clock import Clock, WallClock
from specrl.io.output import table
from specrl.reports.data import batch_sizes, interval
from specrl.reports.figures import decision
from specrl.reports.files import Row, read_csv
from specrl.reports.page import said

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # lines of the log that a sparkline shows
_LOSSES = ("dropped", "skipped", "passed_over", "opted_out", "bad_updates", "rollbacks")


def watch(*, run: Path, once: bool = False, every_s: float = 2.0, give_up_s: float = 900.0) -> None:
    """Show a run of specrl train or quickstart while it goes on, until it ends.

    Shows requests served, the draft that serves, accept length, speedup and plan at each batch size, what the gate
    decided, and what the learner does with the traffic. Reads log.csv, gate.csv and drift.csv; the run notices nothing.

    Args:
        run: output directory.
        once: print one frame and end.
        every_s: seconds between two looks.
        give_up_s: end when nothing new came for this long.

    Raises:
        ValueError: a directory that is no such run, or a duration that is not positive.

    Example:
        specrl watch runs/day0
        specrl watch runs/day0 --once
    """
    if not (every_s > 0 and give_up_s > 0):
        raise ValueError(f"every_s and give_up_s must be above 0 s, but got {every_s} and {give_up_s}")
    if not any((run / name).exists() for name in ("config.yaml", "log.csv")):
        raise ValueError(f"run must be a directory of specrl train or quickstart, but got {str(run)!r}")
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False)
    if once:
        console.print(frame(run))
        return
    follow(run, console, WallClock(), every_s=every_s, give_up_s=give_up_s)


def follow(run: Path, console: Console, clock: Clock, *, every_s: float, give_up_s: float) -> None:
    """Draw frames until the run has ended, or nothing new came for `give_up_s`."""
    pause, news, last = Event(), clock.now(), None
    with Live(console=console, auto_refresh=False) as live:
        while True:
            over, written = ended(run), _written(run)
            if written != last:
                news, last = clock.now(), written
            silent = clock.now() - news
            live.update(frame(run, silent_s=silent), refresh=True)
            if over or silent > give_up_s:
                return
            pause.wait(every_s)


def ended(run: Path) -> bool:
    """Whether the run has written its results since its log."""
    results, log = run / "plans.json", run / "log.csv"
    return results.exists() and log.exists() and results.stat().st_mtime_ns >= log.stat().st_mtime_ns


def frame(run: Path, *, silent_s: float = 0.0) -> RenderableType:
    """What is known now.

    Raises:
        ValueError: a file of the run is damaged.
    """
    log = [row for row in read_csv(run / "log.csv") if row.get("requests") is not None]
    state = "ended" if ended(run) else "running" if silent_s < 60.0 else f"nothing new for {silent_s:.0f} s"
    if not log:
        return Text(f"{run}: {state}; no line of its log yet")
    last = log[-1]
    head = (
        f"{run}: {state}; {last['requests']:,.0f} requests in {last['seconds']:,.0f} s "
        f"({last['requests'] / max(last['seconds'], 1e-9):.1f} a second), draft {last['draft_version']:.0f}"
    )
    lines = [
        {
            "batch size": str(batch),
            "plan": last.get(f"plan_{batch}"),
            "accept length [95 %]": said(interval(last, f"accept_length_{batch}"), "", 2),
            "accept length so far": sparkline([row.get(f"accept_length_{batch}") for row in log]),
            "speedup [95 %]": said(interval(last, f"speedup_{batch}"), "×", 2),
            "speedup so far": sparkline([row.get(f"speedup_{batch}") for row in log]),
        }
        for batch in batch_sizes(log)
    ]
    parts: list[RenderableType] = [Text(head, style="bold"), table(lines), *map(Text, _learner(last))]
    for row in read_csv(run / "gate.csv")[-3:]:
        parts.append(Text(f"gate, {row['requests']:.0f} requests: draft {row['version']:.0f} {decision(row)}"))
    for row in read_csv(run / "drift.csv")[-1:]:
        parts.append(
            Text(
                f"drift, {row['requests']:.0f} requests: first drafts stood {row['before']:.0%}, now {row['after']:.0%}"
            )
        )
    return Group(*parts)


def sparkline(values: Sequence[float | None]) -> str:
    """The last values as bars between the least and the greatest of them; a gap where there is none."""
    shown = [math.nan if value is None else value for value in values[-_WIDTH:]]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    bars = [
        _BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 0] if math.isfinite(value) else " "
        for value in shown
    ]
    return f"{''.join(bars)} {low:.2f} to {low + span:.2f}"


def _learner(last: Row) -> list[str]:
    """What the learner does, and what it could not use."""
    if last.get("tokens_per_s") is None:
        return ["the draft has not learnt yet, or does not learn"]
    share = last["learn_s"] / max(last["learn_s"] + last["serve_s"], 1e-9) if "learn_s" in last else math.nan
    known = {"loss": last.get("loss"), "alpha": last.get("alpha")}
    numbers = "".join(f", {name} {value:.2f}" for name, value in known.items() if value is not None)
    lost = ", ".join(f"{name.replace('_', ' ')} {last[name]:.0f}" for name in _LOSSES if last.get(name))
    return [
        f"learner: {last['tokens_per_s']:,.0f} tokens/s, {share:.0%} of the time{numbers}",
        f"sequences held {last.get('held') or 0:.0f}; {lost or 'none dropped'}",
    ]


def _written(run: Path) -> list[int]:
    return [(run / name).stat().st_mtime_ns for name in ("log.csv", "gate.csv", "plans.json") if (run / name).exists()]
