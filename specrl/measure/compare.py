"""Two drafts or runs, measured in turns; or two finished benchmarks, which were measured at different times."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.config import MeasureConfig, TargetConfig, WorkloadConfig
from specrl.core.batch_schedule import reached_bound
from specrl.core.plan import Plan
from specrl.core.statistics import Interval, mean_interval, paired_speedup, probability_of_improvement
from specrl.export.bundle import PLANS, read_plans
from specrl.measure.arms import local_arms
from specrl.measure.paired import AA_CONTROL, PLAIN, ArmResult, measure, seconds_per_token
from specrl.measure.plain import fastest_plain
from specrl.models.draft import Draft, load_draft

Floats = NDArray[np.float64]
Key = tuple[str, str, str]  # temperature ('' in simulation), batch size and arm, as written in blocks.csv
DEFAULT_PLAN = Plan(3)
_BLOCKS, _BENCH = "blocks.csv", "bench.json"
_COMPARED = ("cpu", "cores", "gpus", "torch", "torch_threads", "commit")  # keys of two environments


class DraftedRun(NamedTuple):
    """A draft, and the plan that its run chose for each batch size; None: it chose none."""

    draft: Draft
    plans: Mapping[int, Plan] | None

    def plan(self, batch_size: int) -> Plan:
        """The run's plan for the largest batch size that is not above, or 3/1/4."""
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
    """A row for each batch size: two drafts and plain decoding, measured in turns on the same prompts.

    Args:
        a: the reference.
        b: compared with it.
        target: the target model.
        workload: prompts, held out from training.
        batch_sizes: live requests.
        plan: of both; None: the plans of the runs.
        until: when to stop at a batch size.
        use_rejection_sampling: see `specrl.LocalEngine`.
        seed: of prompts and sampling.
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
        results = measure(
            arms,
            prompts,
            batch_size=batch,
            block_tokens=workload.max_new_tokens,
            until=until,
            stop_each=True,
            seed=seed,
        )
        yield paired_row({result.name: result for result in results})


def paired_row(arms: Mapping[str, ArmResult]) -> dict[str, object]:
    """The row of a batch size, from arms 'A', 'B' and plain, measured with A as the reference."""
    a, b, ratio = arms["A"], arms["B"], arms["B"].speedup
    assert ratio is not None, "A is the reference"
    speedups = []
    for arm in (a, b):
        pairs = min(len(arm.blocks), len(arms[PLAIN].blocks))
        mine, plain = (seconds_per_token(blocks[:pairs]) for blocks in (arm.blocks, arms[PLAIN].blocks))
        speedups.append(paired_speedup(plain, mine, rng=np.random.default_rng(0)))
    gains = np.log(seconds_per_token(a.blocks[: len(b.blocks)]) / seconds_per_token(b.blocks))
    return {
        "batch_size": a.batch_size,
        "plan_a": a.plan,
        "plan_b": b.plan,
        **_intervals(speedups[0], speedups[1], ratio),
        "probability": probability_of_improvement(gains, [0.0]),  # of pairs
        "accept_length_a": a.accept_length,
        "accept_length_b": b.accept_length,
        "tps_a": a.mean_tps,
        "tps_b": b.mean_tps,
        "blocks_a": len(a.blocks),
        "blocks_b": len(b.blocks),
    }


def is_bench(path: Path) -> bool:
    """Whether `specrl bench` wrote this directory."""
    return (path / _BLOCKS).is_file() and (path / _BENCH).is_file()


def compare_benches(a: Path, b: Path) -> list[dict[str, object]]:
    """A row for each arm that two benchmarks measured at the same temperature and batch size.

    The ratio is that of their speedups, each over plain decoding in its own run.

    Raises:
        ValueError: they have nothing in common, or are damaged.
    """
    (cells_a, rows_a), (cells_b, rows_b) = _read_bench(a), _read_bench(b)
    common = [key for key in cells_a if key in cells_b]
    if not common:
        raise ValueError(
            f"two benchmarks must share a temperature, batch size and plan, but {str(a)!r} has "
            f"{', '.join(map(_named, cells_a))}, and {str(b)!r} {', '.join(map(_named, cells_b))}"
        )
    out: list[dict[str, object]] = []
    for key in common:
        x, y = cells_a[key], cells_b[key]
        speedups = [_exp(mean_interval(logs, rng=np.random.default_rng(0))) for logs in (x, y)]
        out.append(
            {
                "temperature": key[0] or None,
                "batch_size": int(key[1]),
                "plan_a": key[2],
                "plan_b": key[2],
                **_intervals(speedups[0], speedups[1], _exp(mean_difference(y, x, rng=np.random.default_rng(0)))),
                "probability": probability_of_improvement(y, x),
                "accept_length_a": rows_a[key]["accept_length"],
                "accept_length_b": rows_b[key]["accept_length"],
                "tps_a": rows_a[key]["mean_tps"],
                "tps_b": rows_b[key]["mean_tps"],
                "blocks_a": len(x),
                "blocks_b": len(y),
            }
        )
    return out


def environment_differences(a: Path, b: Path) -> list[str]:
    """A line with the differences between the environments of two benchmarks; none if there are none."""
    first, second = (json.loads((path / _BENCH).read_text(encoding="utf-8"))["environment"] for path in (a, b))
    changed = [
        f"{key} {first.get(key)} and {second.get(key)}" for key in _COMPARED if first.get(key) != second.get(key)
    ]
    return [f"They differ in: {'; '.join(changed)}."] if changed else []


def mean_difference(x: Floats, y: Floats, *, resamples: int = 4000, rng: np.random.Generator) -> Interval:
    """Mean of x [n >= 2] less mean of y [m >= 2], independent samples, with a 95 % interval.

    A studentised bootstrap with Welch's standard error (Efron and Tibshirani, 1993, section 16.2).
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


def _read_bench(path: Path) -> tuple[dict[Key, Floats], dict[Key, dict[str, Any]]]:
    """Log speedups of the blocks, and the row of bench.json, of every arm with a draft."""
    seconds: dict[Key, list[float]] = {}
    try:
        for row in csv.DictReader((path / _BLOCKS).read_text(encoding="utf-8").splitlines()):
            key = row["temperature"], row["batch_size"], row["lane"]
            seconds.setdefault(key, []).append(float(row["seconds"]) / float(row["tokens"]))
        rows = {
            ("" if row["temperature"] is None else str(row["temperature"]), str(row["batch_size"]), row["plan"]): row
            for row in json.loads((path / _BENCH).read_text(encoding="utf-8"))["rows"]
        }
        cells = {
            (t, batch, arm): np.log(np.array(seconds[t, batch, PLAIN])[: len(own)] / np.array(own))
            for (t, batch, arm), own in seconds.items()
            if arm not in (PLAIN, AA_CONTROL)
        }
        return cells, {key: rows[key] for key in cells}
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{str(path)!r} must be written by 'specrl bench', but it is damaged: {error!r}") from error


def _exp(interval: Interval) -> Interval:
    value, low, high = np.exp([interval.value, interval.low, interval.high]).tolist()
    return Interval(value, low, high)


def _intervals(a: Interval, b: Interval, ratio: Interval) -> dict[str, object]:
    """Two speedups and their ratio as columns."""
    out: dict[str, object] = {}
    for name, interval in (("speedup_a", a), ("speedup_b", b), ("ratio", ratio)):
        out |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return out


def _named(key: Key) -> str:
    return f"{key[2]} at batch size {key[1]}" + (f", temperature {key[0]}" if key[0] else "")
