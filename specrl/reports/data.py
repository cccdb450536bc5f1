"""Reads the files of run directories into one form for the report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.statistics import Interval, ratio_of_sums
from specrl.io.read import read_mapping, read_rows
from specrl.simulation.profile import load_profile

Row = Mapping[str, Any]  # of a CSV file: numbers as floats, text, None for an empty field
PARTS = ("draft", "verify", "other")  # of a round's time
MIN_STRETCHES = 6  # fewer give no confidence interval
_COMMANDS = {  # a file that identifies a run: the command that writes it
    "log.csv": "train",
    "measured.csv": "quickstart",
    "bench.csv": "bench",
    "evaluate.csv": "evaluate",
    "profile.json": "profile",
}
_MEASURED = ("batch_size", "plan", "speedup", "low", "high", "accept_length", "round_ms", "draft_ms")
_REQUIRED_COLUMNS = {
    "log.csv": ("seconds",),
    "gate.csv": ("requests", "version", "check", "passed", "harmful", "reason"),
    "windows.csv": ("served", "batch_size", "plan", "rounds", "plain_s", "draft_s", "verify_s"),
    "measured.csv": _MEASURED,
    "bench.csv": _MEASURED,
    "blocks.csv": ("batch_size", "arm", "block", "tokens"),
    "evaluate.csv": ("source", "chooser", "seeds", "speedup", "speedup_low", "speedup_high", "share", "regret"),
    "regret.csv": ("source", "chooser", "round", "regret", "least", "greatest"),
}
_TEXT_COLUMNS = ("plan", "arm", "check", "reason", "source", "chooser", "part", "passed", "harmful")


@dataclass(frozen=True, slots=True)
class PlanResult:
    """Results of one plan at one batch size. An interval has nan bounds where none was recorded.

    Attributes:
        origin: 'measured', 'simulated', 'live' (while serving) or 'profile'.
        plan: a plan, with a name behind it in parentheses or none; or plain decoding ('plain...').
        speedup: over plain decoding.
        accept_length: tokens per request and round.
        request_tps: tokens/s of a request: median, 5th and 95th percentile.
        parts_ms: milliseconds of a round by part, with keys from `PARTS`.
        acceptance: by position, the share of requests and rounds that accepted the draft token at this position.
        spread: log standard deviation of the seconds of a round.
    """

    origin: str
    batch_size: int
    plan: str
    temperature: float | None = None
    speedup: Interval | None = None
    accept_length: Interval | None = None
    request_tps: tuple[float, float, float] | None = None
    round_ms: Interval | None = None
    parts_ms: Mapping[str, Interval | None] | None = None
    acceptance: tuple[Interval, ...] = ()
    spread: float | None = None

    @property
    def speculative(self) -> bool:
        """False for plain decoding, and for plain decoding compared with itself."""
        return not self.plan.startswith("plain")


@dataclass(frozen=True, slots=True)
class RunData:
    """The contents of a run directory."""

    name: str
    path: Path
    commands: tuple[str, ...]  # that wrote it
    config: Mapping[str, Any]  # options by their names on the command line
    environment: Mapping[str, Any]
    log: Sequence[Row]
    gate: Sequence[Row]
    plans: Mapping[int, str]  # chosen, by batch size
    results: Sequence[PlanResult]
    leaderboard: Sequence[Row]
    regret: Sequence[Row]

    @property
    def speedups(self) -> list[PlanResult]:
        """The results of speculative decoding that have a speedup."""
        return [result for result in self.results if result.speculative and result.speedup is not None]


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read run directories. Each is named by its last parts that make its name unique.

    Raises:
        ValueError: no directory, the same directory twice, one that is not a run, or one of its files is damaged.
    """
    resolved = [Path(path).resolve() for path in paths]
    if not resolved or len(set(resolved)) < len(resolved):
        raise ValueError(f"runs must be one or more different directories, but got {[str(path) for path in paths]}")
    depth = 1
    while len(names := {"/".join(path.parts[-depth:]): path for path in resolved}) < len(resolved):
        depth += 1
    return [_read_run(path, name) for name, path in names.items()]


def batch_sizes(log: Sequence[Row]) -> list[int]:
    """Return the batch sizes in a log, ascending."""
    last = log[-1] if log else {}
    suffixes = (key.removeprefix("plan_") for key in last if key.startswith("plan_") and last[key])
    return sorted(int(suffix) for suffix in suffixes if suffix.isdigit())


def interval(row: Row, key: str) -> Interval | None:
    """Return the value in the column `key` with the bounds in the columns key_low and key_high."""
    value, low, high = (row.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return None
    return _point(value) if low is None or high is None else Interval(value, low, high)


def _read_run(path: Path, name: str) -> RunData:
    if not path.is_dir():
        raise ValueError(f"a run must be a directory, but {str(path)!r} is not; give the --output_dir of a command")
    commands = {file: command for file, command in _COMMANDS.items() if (path / file).exists()}
    if not commands:
        raise ValueError(
            f"a run must contain one of {', '.join(_COMMANDS)}, but {str(path)!r} does not; "
            f"give the --output_dir of specrl {', '.join(_COMMANDS.values())}"
        )
    if "measured.csv" in commands:
        commands.pop("log.csv", None)  # quickstart writes both
    log = [row for row in _read_csv(path / "log.csv") if row.get("requests") is not None]
    half = log[-1]["requests"] / 2 if log else 0.0
    plans = read_mapping(path / "plans.json").get("plans") or {b: log[-1][f"plan_{b}"] for b in batch_sizes(log)}
    if not isinstance(plans, dict) or not all(str(batch).isdigit() for batch in plans):
        raise ValueError(f"{path / 'plans.json'} must map batch sizes to plans, but has {plans!r}")
    bench = read_mapping(path / "bench.json").get("measured")
    results = _measured(
        [*_read_csv(path / "measured.csv"), *_read_csv(path / "bench.csv")],
        _read_csv(path / "blocks.csv"),
        "simulated" if isinstance(bench, dict) and bench.get("profile") else "measured",
    )
    results += _live([row for row in _read_csv(path / "windows.csv") if row["served"] > half])
    if "profile.json" in commands:
        results += _of_profile(path / "profile.json")
    return RunData(
        name=name,
        path=path,
        commands=tuple(commands.values()),
        config=dict(_options(read_mapping(path / "config.yaml"))),
        environment=_environment(path),
        log=log,
        gate=_read_csv(path / "gate.csv"),
        plans={int(batch): str(plan) for batch, plan in plans.items()},
        results=results,
        leaderboard=_read_csv(path / "evaluate.csv"),
        regret=_read_csv(path / "regret.csv"),
    )


def _read_csv(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none if it does not exist."""
    rows = read_rows(path)
    if missing := [name for name in _REQUIRED_COLUMNS[path.name] if any(name not in row for row in rows[:1])]:
        raise ValueError(f"{path} must have the columns that specrl writes, but has no {', '.join(missing)}")
    return [{key: _parse(path, key, text) for key, text in row.items() if key} for row in rows]


def _parse(path: Path, key: str, text: str | None) -> float | str | None:
    if not text:
        return None
    if key in _TEXT_COLUMNS or key.startswith("plan_"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path} must have numbers in column {key!r}, but has {text!r}") from None


def _options(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options in a configuration file; those of a group are named 'group.option'."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _environment(path: Path) -> Mapping[str, Any]:
    """Return the machine and software of a run; commands write them to different files."""
    records: list[dict[str, Any] | None] = [read_mapping(path / "environment.json")]
    records += [read_mapping(path / f"{name}.json").get("environment") for name in ("bench", "evaluate", "summary")]
    records += [(read_mapping(path / "profile.json").get("provenance") or {}).get("environment")]
    return next((record for record in records if record), {})


def _point(value: float) -> Interval:
    """Return a value without an interval."""
    return Interval(value, math.nan, math.nan)


def _ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Interval | None:
    """Σ numerator ÷ Σ denominator over stretches of rounds, with a 95 % interval if there are enough of them."""
    pairs = [(a, b) for a, b in zip(numerator, denominator, strict=True) if b > 0]
    if not pairs:
        return None
    x, y = np.array(pairs).T
    if len(pairs) < MIN_STRETCHES:
        return _point(float(x.sum() / y.sum()))
    return ratio_of_sums(x, y, resamples=2000, rng=np.random.default_rng(0))


def _summary(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the fields of `PlanResult` that follow from stretches of rounds (see `specrl.core.round_stats`)."""
    stretches = [row for row in rows if row.get("rounds")]
    if not stretches:
        return {}

    def column(name: str) -> list[float]:
        return [row.get(name) or 0.0 for row in stretches]

    rounds, requests = column("rounds"), column("requests")  # requests: summed over rounds
    part_ms = {part: [1e3 * seconds for seconds in column(f"{part}_s")] for part in PARTS}
    keys = {key for row in stretches for key, value in row.items() if value is not None}
    positions = sum(key.startswith("accepted_") for key in keys)
    accepted = [column(f"accepted_{k}") for k in range(1, positions + 1)]
    return {
        "accept_length": _ratio([sum(counts) for counts in zip(requests, *accepted, strict=True)], requests),
        "round_ms": _ratio([sum(parts) for parts in zip(*part_ms.values(), strict=True)], rounds),
        "parts_ms": {part: _ratio(ms, rounds) for part, ms in part_ms.items()},
        "acceptance": tuple(filter(None, (_ratio(counts, requests) for counts in accepted))),
    }


def _measured(rows: Sequence[Row], blocks: Sequence[Row], origin: str) -> list[PlanResult]:
    """Return results of `specrl bench` and `quickstart`. Intervals other than the speedup's come from the blocks."""
    results = []
    for row in rows:
        cell, plan = (row["batch_size"], row.get("temperature")), row["plan"]
        arms = {plan, plan.partition("(")[2].rstrip(")")}  # '0 (no learning)' is called 'no learning' in blocks.csv
        measured = [b for b in blocks if (b["batch_size"], b.get("temperature")) == cell and b["arm"] in arms]
        fields = {
            "accept_length": _point(row["accept_length"]),
            "round_ms": _point(row["round_ms"]),
            "parts_ms": {part: _point(row[f"{part}_ms"]) for part in PARTS if row.get(f"{part}_ms") is not None},
            **_summary(measured),
        }
        if row["speedup"] is not None:
            fields["speedup"] = Interval(row["speedup"], row["low"], row["high"])
        if row.get("p50_tps") is not None:
            fields["request_tps"] = row["p50_tps"], row["p05_tps"], row["p95_tps"]
        results.append(PlanResult(origin, int(row["batch_size"]), plan, row.get("temperature"), **fields))
    return results


def _live(rows: Sequence[Row]) -> list[PlanResult]:
    """Return results while serving, with intervals over stretches of rounds."""
    results = []
    for batch, plan in sorted({(row["batch_size"], row["plan"]) for row in rows}):
        windows = [row for row in rows if (row["batch_size"], row["plan"]) == (batch, plan)]
        seconds = [sum(row[f"{part}_s"] for part in PARTS) for row in windows]
        speedup = _ratio([row["plain_s"] for row in windows], seconds)
        results.append(PlanResult("live", int(batch), plan, speedup=speedup, **_summary(windows)))
    return results


def _of_profile(path: Path) -> list[PlanResult]:
    """Return the costs in a profile, which records no intervals."""
    profile = load_profile(str(path))
    results = []
    for cost in profile.costs:
        ms, share = 1e3 * cost.seconds, cost.draft_share
        fields: dict[str, Any] = {"round_ms": _point(ms), "spread": math.hypot(cost.jitter, cost.spread)}
        if share:
            fields["parts_ms"] = {"draft": _point(share * ms), "verify": _point((1.0 - share) * ms)}
        if cost.plan is not None:
            fields["speedup"] = _point(profile.speedup(cost.batch_size, cost.plan))
            fields["accept_length"] = _point(profile.accept_length(cost.plan))
        plan = "plain" if cost.plan is None else str(cost.plan)
        results.append(PlanResult("profile", cost.batch_size, plan, **fields))
    return results
