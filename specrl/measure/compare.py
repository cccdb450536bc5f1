"""Two finished benchmarks: measured at different times, so that nothing pairs them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.core.statistics import Interval, mean_interval, probability_of_improvement
from specrl.measure.local_arms import NULL
from specrl.measure.paired import PLAIN

Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # temperature ('' in simulation), batch size, lane, as blocks.csv writes them
_BLOCKS, _BENCH = "blocks.csv", "bench.json"
_SAME = ("cpu", "cores", "gpus", "torch", "torch_threads", "commit")  # of two environments that are the same


def is_bench(path: Path) -> bool:
    """Whether a directory is one that 'specrl bench' wrote."""
    return (path / _BLOCKS).is_file() and (path / _BENCH).is_file()


def compare_benches(a: Path, b: Path) -> list[dict[str, object]]:
    """Rows of what two benchmarks measured at the same temperature and batch size under the same lane's name.

    Raises:
        ValueError: they have nothing in common, or are damaged.
    """
    cells, rows = zip(*(_read_bench(path) for path in (a, b)), strict=True)
    common = [key for key in cells[0] if key in cells[1]]
    if not common:
        raise ValueError(
            f"two benchmarks must share a temperature, batch size and plan to be compared, but {str(a)!r} has "
            f"{', '.join(map(_named, cells[0]))}, and {str(b)!r} {', '.join(map(_named, cells[1]))}"
        )
    lines: list[dict[str, object]] = []
    for key in common:
        x, y = cells[0][key], cells[1][key]
        speedups = [_exp(mean_interval(logs, rng=np.random.default_rng(0))) for logs in (x, y)]
        lines.append(
            {
                "temperature": key[0] or None,
                "batch_size": int(key[1]),
                "plan_a": key[2],
                "plan_b": key[2],
                **intervals(speedups[0], speedups[1], _exp(mean_difference(y, x, rng=np.random.default_rng(0)))),
                "probability": probability_of_improvement(y, x),
                **{f"accept_length_{n}": found[key]["accept_length"] for n, found in zip("ab", rows, strict=True)},
                **{f"tps_{n}": found[key]["mean_tps"] for n, found in zip("ab", rows, strict=True)},
                "blocks_a": len(x),
                "blocks_b": len(y),
            }
        )
    return lines


def mean_difference(x: Floats, y: Floats, *, resamples: int = 4000, rng: np.random.Generator) -> Interval:
    """Mean of x [n >= 2] less mean of y [m >= 2], independent samples, with a 95 % interval.

    A studentised bootstrap with Welch's standard error (Efron and Tibshirani, 1993, section 16.2).
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an interval needs at least 2 blocks of both, but got {len(x)} and {len(y)}; measure longer")

    def both(x: Floats, y: Floats) -> tuple[Floats, Floats]:
        error = np.sqrt(x.var(-1, ddof=1) / x.shape[-1] + y.var(-1, ddof=1) / y.shape[-1])
        return x.mean(-1) - y.mean(-1), error

    value, error = both(x, y)
    if error == 0.0:
        return Interval(float(value), float(value), float(value))
    again, errors = both(*(sample[rng.integers(len(sample), size=(resamples, len(sample)))] for sample in (x, y)))
    low, high = value - error * np.quantile((again - value) / np.maximum(errors, 1e-3 * error), [0.975, 0.025])
    return Interval(float(value), float(low), float(high))


def unlike(a: Path, b: Path) -> list[str]:
    """A line for what two benchmarks' environments do not share."""
    first, second = (json.loads((path / _BENCH).read_text(encoding="utf-8"))["environment"] for path in (a, b))
    differ = [f"{key} {first.get(key)} and {second.get(key)}" for key in _SAME if first.get(key) != second.get(key)]
    return [f"They differ in: {'; '.join(differ)}."] if differ else []


def _read_bench(path: Path) -> tuple[dict[Key, Floats], dict[Key, dict[str, Any]]]:
    """Log speedups of the blocks, and the row of bench.json, of every lane but the plain ones."""
    seconds: dict[Key, list[float]] = {}
    try:
        for row in csv.DictReader((path / _BLOCKS).read_text(encoding="utf-8").splitlines()):
            key = row["temperature"], row["batch_size"], row["lane"]
            seconds.setdefault(key, []).append(float(row["seconds"]) / float(row["tokens"]))
        found = json.loads((path / _BENCH).read_text(encoding="utf-8"))["rows"]
        rows = {
            ("" if row["temperature"] is None else str(row["temperature"]), str(row["batch_size"]), row["plan"]): row
            for row in found
        }
        cells = {
            (t, batch, lane): np.log(np.array(seconds[t, batch, PLAIN])[: len(mine)] / np.array(mine))
            for (t, batch, lane), mine in seconds.items()
            if lane not in (PLAIN, NULL)
        }
        return cells, {key: rows[key] for key in cells}
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{str(path)!r} must hold what 'specrl bench' wrote, but it does not: {error!r}") from error


def _exp(interval: Interval) -> Interval:
    value, low, high = np.exp([interval.value, interval.low, interval.high]).tolist()
    return Interval(value, low, high)


def intervals(a: Interval, b: Interval, ratio: Interval) -> dict[str, object]:
    """Two speedups and their ratio as columns."""
    named = {"speedup_a": a, "speedup_b": b, "ratio": ratio}
    parts = ("value", "low", "high")
    return {n if p == "value" else f"{n}_{p}": getattr(i, p) for n, i in named.items() for p in parts}


def _named(key: Key) -> str:
    return f"{key[2]} at batch size {key[1]}" + (f", temperature {key[0]}" if key[0] else "")
