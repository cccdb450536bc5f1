"""What run directories hold, checked and brought into one form for a page that shows several of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.statistics import Interval, ratio_of_sums
from specrl.reports.files import Row, read_config, read_csv, read_json
from specrl.simulation.profile import load_profile

PARTS = ("draft", "verify", "other")
LEAST = 6  # stretches for an interval, as in a measurement
_WRITERS = {  # a file that makes a directory a run: the command that writes it
    "log.csv": "train",
    "measured.csv": "quickstart",
    "bench.csv": "bench",
    "evaluate.csv": "evaluate",
    "profile.json": "profile",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What is known of one plan at one batch size; an interval of nan ends was not recorded."""

    origin: str  # 'measured', 'simulated', 'live' or 'fitted'
    batch_size: int
    plan: str
    temperature: float | None = None
    speedup: Interval | None = None  # over plain decoding
    accept_length: Interval | None = None  # tokens per request and round
    tps: tuple[float, float, float] | None = None  # tokens/s of a request: median, 5th and 95th percentile
    round_ms: Interval | None = None
    parts_ms: Mapping[str, Interval] = field(default_factory=dict)  # of PARTS, where they are known
    standing: tuple[Interval, ...] = ()  # share of drafts that stood, by position
    scatter: float | None = None  # log standard deviation of a round's seconds

    @property
    def drafts(self) -> bool:
        """Whether the plan is one (neither plain decoding nor plain against itself)."""
        return not self.plan.startswith("plain")


@dataclass(frozen=True, slots=True)
class RunData:
    """A run directory."""

    name: str
    path: Path
    kinds: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Row] = ()  # of a run that serves: a row for every line, with 'requests'
    gate: Sequence[Row] = ()
    drift: Sequence[Row] = ()
    plans: Mapping[int, str] = field(default_factory=dict)  # chosen, by batch size
    cells: Sequence[Cell] = ()
    board: Sequence[Row] = ()
    regret: Sequence[Row] = ()

    def of(self, *origins: str) -> list[Cell]:
        """Cells of these origins."""
        return [cell for cell in self.cells if cell.origin in origins]


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Run directories, named by what tells them apart.

    Raises:
        ValueError: none are given, one is given twice, or one is no run.
    """
    resolved = [Path(path).resolve() for path in paths]
    if not resolved or len(set(resolved)) < len(resolved):
        raise ValueError(f"a report needs runs, each named once, but got {[str(path) for path in paths]}")
    depth = 1
    names = [path.name for path in resolved]
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(path.parts[-depth:]) for path in resolved]
    return [read_run(path, name) for path, name in zip(resolved, names, strict=True)]


def read_run(path: Path, name: str | None = None) -> RunData:
    """One run directory.

    Raises:
        ValueError: it is not one that specrl wrote, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"a run must be a directory, but {str(path)!r} is none; name the --output_dir of a command")
    found = {file: kind for file, kind in _WRITERS.items() if (path / file).exists()}
    if not found:
        raise ValueError(
            f"a run must hold one of {', '.join(_WRITERS)}, but {str(path)!r} holds none; "
            "name the --output_dir of specrl train, quickstart, bench, evaluate or profile"
        )
    kinds = [kind for kind in found.values() if not (kind == "train" and "measured.csv" in found)]
    log = [row for row in read_csv(path / "log.csv") if row.get("requests") is not None]
    last = log[-1]["requests"] if log else 0.0
    plans = read_json(path / "plans.json").get("plans") or {b: log[-1][f"plan_{b}"] for b in batch_sizes(log)}
    if not isinstance(plans, dict) or not all(str(batch).isdigit() for batch in plans):
        raise ValueError(f"plans must be a plan per batch size, but {path / 'plans.json'} has {plans!r}")
    benched = read_json(path / "bench.json").get("measured")
    origin = "simulated" if isinstance(benched, dict) and benched.get("profile") else "measured"
    lanes = read_csv(path / "measured.csv") + read_csv(path / "bench.csv")
    cells = [
        *_measured(lanes, read_csv(path / "blocks.csv"), origin),
        *_live([row for row in read_csv(path / "windows.csv") if row["requests"] > last / 2]),
        *(_fitted(path / "profile.json") if "profile.json" in found else ()),
    ]
    return RunData(
        name=name or path.name,
        path=path,
        kinds=tuple(kinds),
        config=read_config(path / "config.yaml"),
        environment=_environment(path),
        log=log,
        gate=read_csv(path / "gate.csv"),
        drift=read_csv(path / "drift.csv"),
        plans={int(batch): str(plan) for batch, plan in plans.items()},
        cells=cells,
        board=read_csv(path / "evaluate.csv"),
        regret=read_csv(path / "regret.csv"),
    )


def batch_sizes(log: Sequence[Row]) -> list[int]:
    """Those that a log came to, ascending."""
    found = {key.rpartition("_")[2] for row in log[-1:] for key in row if key.startswith("plan_") and row[key]}
    return sorted(int(text) for text in found if text.isdigit())


def alone(value: float) -> Interval:
    """A number whose interval nobody recorded."""
    return Interval(value, math.nan, math.nan)


def interval(row: Mapping[str, object], key: str) -> Interval | None:
    """The number of a column and its interval, of the columns key_low and key_high."""
    value, low, high = (row.get(key + end) for end in ("", "_low", "_high"))
    if not isinstance(value, float):
        return None
    return Interval(value, low, high) if isinstance(low, float) and isinstance(high, float) else alone(value)


def ratio(top: Sequence[float], bottom: Sequence[float]) -> Interval | None:
    """Σ top ÷ Σ bottom with its 95 % interval over stretches of rounds; of few stretches without, of none None."""
    pairs = [(a, b) for a, b in zip(top, bottom, strict=True) if b > 0]
    if not pairs:
        return None
    x, y = np.array(pairs).T
    if len(pairs) < LEAST:
        return alone(float(x.sum() / y.sum()))
    return ratio_of_sums(x, y, resamples=2000, rng=np.random.default_rng(0))


def _environment(path: Path) -> dict[str, Any]:
    """The first record of where this was measured that a run has."""
    files = [read_json(path / name) for name in ("bench.json", "evaluate.json", "summary.json")]
    if isinstance(provenance := read_json(path / "profile.json").get("provenance"), dict):
        files.append(provenance)
    records = [read_json(path / "environment.json"), *(file.get("environment") for file in files)]
    return next((record for record in records if isinstance(record, dict) and record), {})


def _sums(rows: Iterable[Row]) -> dict[str, Any]:
    """The parts of a `Cell` that stretches of rounds (`specrl.core.round_stats`) say."""
    stretches = [row for row in rows if row.get("rounds")]
    if not stretches:
        return {}

    def column(name: str) -> list[float]:
        return [row.get(name) or 0.0 for row in stretches]

    rounds, verified = column("rounds"), column("verified")
    seconds = {part: column(f"{part}_s") for part in PARTS}
    whole = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
    stood: list[list[float]] = []
    while any(row.get(f"stood_{len(stood) + 1}") is not None for row in stretches):
        stood.append(column(f"stood_{len(stood) + 1}"))
    yielded = [n + sum(counts) for n, *counts in zip(verified, *stood, strict=True)]
    return {
        "accept_length": ratio(yielded, verified),
        "round_ms": ratio([1e3 * s for s in whole], rounds),
        "parts_ms": {part: ratio([1e3 * s for s in seconds[part]], rounds) for part in PARTS},
        "standing": tuple(filter(None, (ratio(counts, verified) for counts in stood))),
    }


def _measured(rows: Sequence[Row], blocks: Sequence[Row], origin: str) -> list[Cell]:
    """Lanes of a measurement; the intervals of all but the speedup come from its blocks."""
    out = []
    for row in rows:
        at = row["batch_size"], row.get("temperature")
        plan = row["plan"] or ""
        lanes = {plan, plan.partition("(")[2].rstrip(")")}  # '0 (no learning)' is of the lane 'no learning'
        mine = [b for b in blocks if (b["batch_size"], b.get("temperature")) == at and b["lane"] in lanes]
        parts = {part: alone(row[f"{part}_ms"]) for part in PARTS if row.get(f"{part}_ms") is not None}
        speedup = row["speedup"]
        known = {
            "accept_length": alone(row["accept_length"]),
            "round_ms": alone(row["round_ms"]),
            "parts_ms": parts,
            **_sums(mine),
        }
        out.append(
            Cell(
                origin,
                int(at[0]),
                plan,
                at[1],
                speedup=None if speedup is None else Interval(speedup, row["low"], row["high"]),
                tps=(row["p50_tps"], row["p05_tps"], row["p95_tps"]) if row.get("p50_tps") is not None else None,
                **known,
            )
        )
    return out


def _live(rows: Sequence[Row]) -> list[Cell]:
    """Live rounds by batch size and plan; the interval is over the stretches between two lines of the log."""
    out = []
    for at in sorted({(row["batch_size"], row["plan"]) for row in rows}):
        mine = [row for row in rows if (row["batch_size"], row["plan"]) == at]
        spent = [sum(row[f"{part}_s"] for part in PARTS) for row in mine]
        speedup = ratio([row["plain_s"] for row in mine], spent)
        out.append(Cell("live", int(at[0]), at[1], speedup=speedup, **_sums(mine)))
    return out


def _fitted(path: Path) -> list[Cell]:
    """What a profile says; it is a fit, and records no intervals."""
    profile = load_profile(str(path))
    out = []
    for cost in profile.costs:
        whole = 1e3 * cost.seconds
        parts = {"draft": cost.draft_share * whole, "verify": (1.0 - cost.draft_share) * whole}
        out.append(
            Cell(
                "fitted",
                cost.batch_size,
                "plain" if cost.plan is None else str(cost.plan),
                speedup=None if cost.plan is None else alone(profile.speedup(cost.batch_size, cost.plan)),
                accept_length=None if cost.plan is None else alone(profile.accept_length(cost.plan)),
                round_ms=alone(whole),
                parts_ms={part: alone(ms) for part, ms in parts.items()} if cost.draft_share else {},
                scatter=math.hypot(cost.jitter, cost.spread),
            )
        )
    return out
