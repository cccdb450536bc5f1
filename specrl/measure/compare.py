"""Comparison of two drafts or runs, measured in turns, or of two finished benchmarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.config import MeasureConfig, TargetConfig, WorkloadConfig
from specrl.core.batch_schedule import reached_bound
from specrl.core.plan import PLAIN, Plan
from specrl.core.statistics import Interval, mean_interval, probability_of_improvement
from specrl.export.bundle import PLANS, read_plans
from specrl.io.read import read_mapping, read_rows
from specrl.measure.arms import local_arms
from specrl.measure.paired import AA_CONTROL, ArmResult, measure, seconds_per_token, speedup
from specrl.measure.plain import fastest_plain
from specrl.models.draft import Draft, load_draft

Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # temperature ('' in simulation), batch size and arm, as blocks.csv has them
DEFAULT_PLAN = Plan(3)
_BLOCKS, _BENCH = "blocks.csv", "bench.json"
_COMPARED = ("cpu", "cores", "gpus", "torch", "torch_threads", "commit")  # keys of the environments


class DraftedRun(NamedTuple):
    """A draft, and the plan that its run chose for each batch size (None: no run, no plans)."""

    draft: Draft
    plans: Mapping[int, Plan] | None

    def plan(self, batch_size: int) -> Plan:
        """Return the run's plan for a batch size, or 3/1/4."""
        if self.plans is None:
            return DEFAULT_PLAN
        return self.plans[reached_bound(self.plans, batch_size)]


def read_drafted(path: Path) -> DraftedRun:
    """Read a draft directory, or the draft and the plans of a run.

    Raises:
        ValueError: it is neither.
    """
    if (path / "draft").is_dir():
        return DraftedRun(load_draft(path / "draft"), read_plans(path / PLANS) if (path / PLANS).is_file() else None)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"a and b must be drafts (config.json), runs (draft/) or benchmarks (bench.json, blocks.csv), "
            f"but {str(path)!r} is none of them"
        )
    return DraftedRun(load_draft(path), None)


def compare_runs(
    a: DraftedRun,
    b: DraftedRun,
    target: TargetConfig,
    workload: WorkloadConfig,
    *,
    batch_sizes: Sequence[int],
    plan: Plan | None,
    until: MeasureConfig,
    use_rejection_sampling: bool = True,
    seed: int = 0,
) -> Iterator[dict[str, object]]:
    """Yield a row for each batch size: two drafts and plain decoding, measured in turns on held-out prompts.

    `a` is the reference. With `plan` None, each has the plan of its run.
    """
    model, prompts = target.load(), workload.open(target.name, "held_out")
    for batch in batch_sizes:
        arms = local_arms(
            target,
            model,
            {name: (run.draft, plan or run.plan(batch)) for name, run in (("A", a), ("B", b))},
            fastest_plain(replace(target, device=model.device), prompts, batch),
            max_context=workload.max_context,
            use_rejection_sampling=use_rejection_sampling,
        )
        arms.sort(key=lambda arm: arm.name != "A")  # the reference comes first
        tokens = workload.max_new_tokens
        results = measure(arms, prompts, batch_size=batch, block_tokens=tokens, until=until, stop_each=True, seed=seed)
        yield paired_row({result.name: result for result in results})


def paired_row(arms: Mapping[str, ArmResult]) -> dict[str, object]:
    """Return the row of a batch size, from arms 'A', 'B' and plain, measured with A as the reference."""
    a, b = arms["A"], arms["B"]
    assert b.speedup is not None, "A is the reference"
    gains = np.log(seconds_per_token(a.blocks[: len(b.blocks)]) / seconds_per_token(b.blocks))
    sides = [
        _Side(m.plan, speedup(arms[PLAIN].blocks, m.blocks), m.accept_length, m.mean_tps, len(m.blocks)) for m in (a, b)
    ]
    return {"batch_size": a.batch_size, **_columns(sides, b.speedup, probability_of_improvement(gains, [0.0]))}


class _Side(NamedTuple):
    """One of the two that are compared."""

    plan: str
    speedup: Interval
    accept_length: float
    tps: float
    blocks: int


def _columns(sides: Sequence[_Side], ratio: Interval, probability: float) -> dict[str, object]:
    a, b = sides
    columns: dict[str, object] = {"plan_a": a.plan, "plan_b": b.plan}
    for name, interval in (("speedup_a", a.speedup), ("speedup_b", b.speedup), ("ratio", ratio)):
        columns |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    columns["probability"] = probability
    for name in ("accept_length", "tps", "blocks"):
        columns |= {f"{name}_a": getattr(a, name), f"{name}_b": getattr(b, name)}
    return columns


def is_bench(path: Path) -> bool:
    """Whether `specrl bench` wrote this directory."""
    return (path / _BLOCKS).is_file() and (path / _BENCH).is_file()


def compare_benches(a: Path, b: Path) -> list[dict[str, object]]:
    """Return a row for each arm that two benchmarks measured at the same temperature and batch size.

    The ratio is that of their speedups, each over plain decoding in its own run.

    Raises:
        ValueError: they have no arm in common, or are damaged.
    """
    first, second = _read_bench(a), _read_bench(b)
    common = [key for key in first if key in second]
    if not common:
        raise ValueError(
            f"two benchmarks must share a temperature, batch size and plan, but {str(a)!r} has "
            f"{', '.join(map(_text, first))}, and {str(b)!r} {', '.join(map(_text, second))}"
        )
    rows = []
    for key in common:
        temperature, batch_size, plan = key
        sides = []
        for logs, row in (first[key], second[key]):
            interval = _exp(mean_interval(logs, rng=np.random.default_rng(0)))
            sides.append(_Side(plan, interval, row["accept_length"], row["mean_tps"], len(logs)))
        (logs_a, _), (logs_b, _) = first[key], second[key]
        ratio = _exp(mean_difference(logs_b, logs_a, rng=np.random.default_rng(0)))
        columns = _columns(sides, ratio, probability_of_improvement(logs_b, logs_a))
        rows.append({"temperature": temperature or None, "batch_size": int(batch_size), **columns})
    return rows


def environment_differences(a: Path, b: Path) -> list[str]:
    """Return a line with the differences between the environments of two benchmarks, or no line."""
    first, second = (read_mapping(path / _BENCH)["environment"] for path in (a, b))
    changed = [
        f"{key} {first.get(key)} and {second.get(key)}" for key in _COMPARED if first.get(key) != second.get(key)
    ]
    return [f"They differ in: {'; '.join(changed)}."] if changed else []


def mean_difference(x: Floats, y: Floats, *, resamples: int = 4000, rng: np.random.Generator) -> Interval:
    """Return the mean of x [n] minus the mean of y [m], independent samples, with a 95 % interval.

    A studentised bootstrap with Welch's standard error (Efron and Tibshirani, 1993, section 16.2).

    Raises:
        ValueError: n or m is below 2.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an interval needs at least 2 blocks of both, but got {len(x)} and {len(y)}; measure longer")

    def difference(x: Floats, y: Floats) -> tuple[Floats, Floats]:
        error = np.sqrt(x.var(-1, ddof=1) / x.shape[-1] + y.var(-1, ddof=1) / y.shape[-1])
        return x.mean(-1) - y.mean(-1), error

    value, error = difference(x, y)
    if error == 0.0:
        return Interval(float(value), float(value), float(value))
    samples = (sample[rng.integers(len(sample), size=(resamples, len(sample)))] for sample in (x, y))
    values, errors = difference(*samples)
    low, high = value - error * np.quantile((values - value) / np.maximum(errors, 1e-3 * error), [0.975, 0.025])
    return Interval(float(value), float(low), float(high))


def _read_bench(path: Path) -> dict[Key, tuple[Floats, dict[str, Any]]]:
    """Return the log speedups of the blocks and the row of bench.json of every arm with a draft."""
    seconds: dict[Key, list[float]] = {}
    try:
        for row in read_rows(path / _BLOCKS):
            key = row["temperature"], row["batch_size"], row["arm"]
            seconds.setdefault(key, []).append(float(row["seconds"]) / float(row["tokens"]))
        rows = {
            ("" if row["temperature"] is None else str(row["temperature"]), str(row["batch_size"]), row["plan"]): row
            for row in read_mapping(path / _BENCH)["rows"]
        }
        return {
            (t, batch, arm): (np.log(seconds[t, batch, PLAIN][: len(own)] / np.array(own)), rows[t, batch, arm])
            for (t, batch, arm), own in seconds.items()
            if arm not in (PLAIN, AA_CONTROL)
        }
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{str(path)!r} must be written by this version of 'specrl bench', but it is damaged or older: {error!r}"
        ) from error


def _exp(interval: Interval) -> Interval:
    return Interval(*np.exp([interval.value, interval.low, interval.high]).tolist())


def _text(key: Key) -> str:
    return f"{key[2]} at batch size {key[1]}" + (f", temperature {key[0]}" if key[0] else "")
