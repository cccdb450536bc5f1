"""`specrl compare`: two drafts or runs, measured in turns; or two finished benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrl.config import MeasureConfig, TargetConfig, WorkloadConfig, check_batch_sizes
from specrl.core.plan import Plan
from specrl.core.statistics import Interval
from specrl.io.output import OutputDir, show, table
from specrl.measure.compare import compare_benches, compare_runs, environment_differences, is_bench, read_drafted
from specrl.measure.machine import environment


def compare(
    *,
    a: Path,
    b: Path,
    target: TargetConfig = TargetConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    measure: MeasureConfig = MeasureConfig(),
    plan: str | None = None,
    batch_sizes: tuple[int, ...] = (1, 4, 16),
    use_rejection_sampling: bool = True,
    seed: int = 0,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Measure how much faster B is than A.

    Two drafts, or two runs with a draft, are measured now: both and plain decoding alternate in one process on the
    same prompts, and blocks are compared in pairs. Of two directories of 'specrl bench' the speedups are compared, for
    the plans that both measured; their blocks cannot be paired.

    Args:
        a: EAGLE3 draft directory, output directory of 'specrl train' or 'quickstart', or of 'specrl bench'.
        b: of the same kind.
        plan: num_steps/topk/num_draft_tokens for both; by default the plan that each run chose, or 3/1/4.
        batch_sizes: requests decoded together.
        use_rejection_sampling: sample chains from the draft; else take its best tokens, as SGLang does by default.
        seed: of prompts and sampling.
        output_dir: where compare.json and compare.csv are written; by default runs/compare-<time>.

    Example:
        specrl compare runs/day0 runs/day0-lk
        specrl compare runs/bench-monday runs/bench-tuesday
    """
    sizes, fixed_plan = check_batch_sizes(batch_sizes), None if plan is None else Plan.parse(plan)
    finished = is_bench(a)
    if finished != is_bench(b):
        raise ValueError(f"a benchmark can only be compared with another, but got {str(a)!r} and {str(b)!r}")
    if finished:
        rows = compare_benches(a, b)
        notes = [
            "Not paired: A and B were measured at different times. The ratio is that of their speedups over plain "
            "decoding in their own runs, with a bootstrap interval over the blocks of both.",
            *environment_differences(a, b),
        ]
    else:
        measured = compare_runs(
            read_drafted(a),
            read_drafted(b),
            target,
            workload,
            batch_sizes=sizes,
            plan=fixed_plan,
            until=measure,
            use_rejection_sampling=use_rejection_sampling,
            seed=seed,
        )
        rows = list(measured)
        notes = ["Paired: A, B and plain decoding took turns in one process on the same prompts."]
    show(table([_shown(row) for row in rows], title=f"A: {a}; B: {b}"), *notes)
    if output_dir is not None:
        directory = OutputDir(output_dir)
        directory.write_csv("compare.csv", rows)
        report = {"a": a, "b": b, "paired": not finished, "notes": notes, "rows": rows, "environment": environment()}
        show(f"written: {directory.write_json('compare.json', report)}")
    return rows


def _shown(row: Mapping[str, Any]) -> dict[str, object]:
    """Return a row for people."""

    def interval(name: str) -> str:
        return str(Interval(row[name], row[f"{name}_low"], row[f"{name}_high"]))

    return {
        **({"temperature": row["temperature"]} if row.get("temperature") is not None else {}),
        "batch": row["batch_size"],
        "plans": row["plan_a"] if row["plan_a"] == row["plan_b"] else f"{row['plan_a']} and {row['plan_b']}",
        "A over plain [95 %]": interval("speedup_a"),
        "B over plain [95 %]": interval("speedup_b"),
        "B over A [95 %]": interval("ratio"),
        "P(B faster)": f"{row['probability']:.2f}",
        "accept length A": row["accept_length_a"],
        "B": row["accept_length_b"],
    }
