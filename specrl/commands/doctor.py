"""`specrl doctor`: what this machine can do, and what would spoil its timings."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path

from specrl.config import DTypeName, TargetConfig, WorkloadConfig, check_batch_sizes
from specrl.core.checks import require
from specrl.core.clock import WallClock
from specrl.io.output import OutputDir, show, table
from specrl.measure import checks, machine
from specrl.measure.checks import Finding
from specrl.measure.plain import DTYPES, settings_table, thread_counts, time_plain
from specrl.models.target import check_device, default_device


def doctor(
    *,
    target: TargetConfig = TargetConfig(),
    dtypes: tuple[DTypeName, ...] = DTYPES,
    threads: tuple[int, ...] | None = None,
    batch_sizes: tuple[int, ...] = (1, 8),
    seconds: float = 10.0,
    output_dir: Path | None = None,
) -> list[Finding]:
    """Report what this machine can do, and what slows it down or spoils its timings.

    Times plain decoding in every combination of dtype and threads (speedups are measured against the fastest one),
    then checks the clock, the steadiness of repeated work, other load, memory allocation, OpenMP and SGLang. Takes
    about 20 seconds; run nothing else meanwhile.

    Args:
        target: the target model; target.dtype is not used.
        dtypes: to decode in.
        threads: thread counts to decode with; by default 1, 2, 4, ... and all cores.
        batch_sizes: requests decoded together.
        seconds: of timing plain decoding.
        output_dir: where doctor.json is written; by default runs/doctor-<time>.

    Example:
        specrl doctor
        specrl doctor --threads 1,2 --batch_sizes 1,4,16 --seconds 30
    """
    device, cores, sizes = default_device(target.device), machine.usable_cores(), check_batch_sizes(batch_sizes)
    check_device(device)
    counts = thread_counts(cores) if threads is None else threads
    require(bool(counts) and min(counts) >= 1, "threads", "numbers of at least 1, such as 1,2", counts)
    require(bool(dtypes), "dtypes", "at least one, such as float32", dtypes)
    require(0.0 < seconds < math.inf, "seconds", "a finite number above 0", seconds)
    load = os.getloadavg()[0]  # before this program adds to it
    record, prompts = machine.environment(), WorkloadConfig().open(target.name, "held_out")
    settings = time_plain(target, prompts, dtypes=dtypes, threads=counts, batch_sizes=sizes, seconds=seconds)
    clock = WallClock()
    findings = [
        checks.check_device(record, device),
        *(checks.check_fastest(settings, batch) for batch in sizes),
        checks.check_clock(clock),
        *(checks.check_steadiness(clock, count) for count in sorted({1, cores})),
        checks.check_load(load, cores),
        checks.check_malloc(),
        checks.check_openmp(cores),
        checks.check_sglang(machine.installed("sglang")),
    ]
    rows, headings = settings_table(settings, sizes)
    verdicts = [{**asdict(f), "good": "good" if f.good else "warning"} for f in findings]
    show(
        table(rows, headings, title=f"Plain decoding of {target.name} on {device}"),
        table(verdicts, {"check": "check", "found": "found", "good": "verdict", "advice": "advice"}, title="Verdicts"),
    )
    if output_dir is not None:
        decoding = [{**asdict(setting), "tokens_per_s": setting.tokens_per_s} for setting in settings]
        results = {"environment": record, "decoding": decoding, "findings": findings}
        show(f"written: {OutputDir(output_dir).write_json('doctor.json', results)}")
    return findings
