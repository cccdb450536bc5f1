"""The panel that `render` shows, as text or live in the terminal."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table


def panel(info: Mapping[str, Any] | None, rounds: int, title: str = "SpecDecode") -> Panel:
    """The last round and the episode so far; `info` is None before the first round."""
    grid = Table.grid(padding=(0, 3))
    if info is None:
        return Panel("no round yet", title=title, title_align="left", expand=False)
    split = "  ".join(f"{name} {info[f'{name}_s'] * 1e3:.2f}" for name in ("draft", "verify", "other", "thinking"))
    histogram = " ".join(str(count) for count in info["histogram"])
    rows = {
        "round": f"{rounds}, {info['batch_size']} requests, plan {info['plan']}, draft version {info['draft_version']}",
        "tokens": f"{info['tokens']}, accept length {info['accept_length']:.2f}, correct drafts {histogram}",
        "milliseconds": f"{info['seconds'] * 1e3:.2f} ({split})",
        "plain round": f"{info['t0_s'] * 1e3:.2f} ± {info['t0_error_s'] * 1e3:.2f} ms",
        "speedup": f"{info['episode_speedup']:.3f} over this episode",
    }
    for name, value in rows.items():
        grid.add_row(name, value)
    return Panel(grid, title=title, title_align="left", expand=False)


def as_text(view: Panel) -> str:
    """The panel as plain text."""
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(view)
    return out.getvalue()
