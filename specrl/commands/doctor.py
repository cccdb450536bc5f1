"""`specrl doctor`: what this machine can do, and what would spoil its timings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.io.output import OutputDir, environment, installed, progress, show, table, usable_cores
from specrl.measure import machine as checks
from specrl.measure.machine import Finding, torch_threads

BLOCK = 8  # rounds timed between two changes of the setting, after two untimed ones


@dataclass(frozen=True)
class Setting:
    """Plain decoding in one setting: the median step at one batch size."""

    dtype: str
    threads: int
    batch_size: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.batch_size / self.step_s


def doctor(
    *,
    target: str = "embedded",
    device: str | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    threads: tuple[int, ...] | None = None,
    batch_sizes: tuple[int, ...] = (1, 8),
    seconds: float = 10.0,
    output_dir: Path | None = None,
) -> list[Finding]:
    """Say what this machine can do, and what would slow it down or spoil its timings.

    Times plain decoding in every combination of dtype and threads (a speedup counts against the fastest of them),
    then looks at the clock, at whether repeated work takes the same time, at other load, memory allocation, OpenMP
    and SGLang. Takes about 20 seconds; let nothing else run meanwhile.

    Args:
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
        dtypes: to decode in.
        threads: thread counts to decode with; by default 1, 2, 4, ... and all cores.
        batch_sizes: requests decoded together.
        seconds: time spent on plain decoding.
        output_dir: where doctor.json goes; by default runs/doctor-<time>.

    Raises:
        ValueError: an argument out of range, or a device that torch does not see.

    Example:
        specrl doctor
        specrl doctor --threads 1,2 --batch_sizes 1,4,16 --seconds 30
    """
    from specrl.models.target import default_device

    device = default_device(device)
    cores = usable_cores()
    threads = thread_counts(cores) if threads is None else threads
    _check(device, dtypes, threads, batch_sizes, seconds)

    load = os.getloadavg()[0]  # before our own
    record = environment()
    settings = time_decoding(target, device, dtypes, threads, batch_sizes, seconds)
    clock = WallClock()
    findings = [
        checks.about_device(record, device),
        *(about_fastest(settings, batch) for batch in batch_sizes),
        checks.about_clock(clock),
        *(checks.about_steadiness(clock, count) for count in sorted({1, cores})),
        checks.about_load(load, cores),
        checks.about_malloc(),
        checks.about_openmp(cores),
        checks.about_sglang(installed("sglang")),
    ]
    wide, headings = side_by_side(settings, batch_sizes)
    verdicts = [{**asdict(f), "good": "good" if f.good else "mind"} for f in findings]
    show(
        table(wide, headings, title=f"Plain decoding of {target} on {device}"),
        table(verdicts, {"check": "check", "found": "found", "good": "verdict", "advice": "advice"}, title="Verdicts"),
    )
    if output_dir is not None:
        results = {"environment": record, "decoding": [*map(long_form, settings)], "findings": findings}
        show(f"written: {OutputDir(output_dir).write_json('doctor.json', results)}")
    return findings


def _check(
    device: str, dtypes: Sequence[str], threads: Sequence[int], batch_sizes: Sequence[int], seconds: float
) -> None:
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees, but got {device!r} and it sees no GPU; use 'cpu'")
    for name, values in (("threads", threads), ("batch_sizes", batch_sizes)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be numbers of at least 1, but got {list(values)}; for example 1,2")
    if not dtypes:
        raise ValueError("dtypes must name at least one, but got none; for example float32")
    if not 0.0 < seconds < float("inf"):
        raise ValueError(f"seconds must be above 0, but got {seconds}; 10 is enough for most machines")


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all cores."""
    return tuple(sorted({cores, *(1 << i for i in range(cores.bit_length()))}))


def time_decoding(
    target: str, device: str, dtypes: Sequence[str], threads: Sequence[int], batch_sizes: Sequence[int], seconds: float
) -> list[Setting]:
    """Median plain step of every setting; the settings take turns, so that drift meets all alike."""
    from specrl.decoding.engine import LocalEngine
    from specrl.models.embedded import target_directory
    from specrl.models.target import load_target
    from specrl.workloads.text import load_tokenizer, load_workload

    workload = load_workload("stdlib", load_tokenizer(target_directory(target)), ignore_eos=True, split="held_out")
    engines = {dtype: LocalEngine(load_target(target, device=device, dtype=dtype)) for dtype in dtypes}
    sessions = {
        (dtype, batch): engines[dtype].start(workload, batch_size=batch, seed=0, plain=True)
        for dtype in dtypes
        for batch in batch_sizes
    }
    turns = [(dtype, count, batch) for dtype, batch in sessions for count in threads]
    times: dict[tuple[str, int, int], list[float]] = {turn: [] for turn in turns}
    clock = WallClock(device)
    began = clock.now()
    with progress("timing plain decoding", seconds) as advance:
        while True:
            for dtype, count, batch in turns:
                with torch_threads(count):
                    took = [sessions[dtype, batch].round(Plan(0)).seconds for _ in range(2 + BLOCK)]
                times[dtype, count, batch] += took[2:]
                advance(clock.now() - began)
            if clock.now() - began >= seconds:
                break
            turns.reverse()
    for engine in engines.values():
        engine.close()
    return [Setting(*turn, step_s=float(np.median(times[turn]))) for turn in times]


def about_fastest(settings: Sequence[Setting], batch_size: int) -> Finding:
    """The setting that a speedup at this batch size counts against."""
    ranked = sorted((s for s in settings if s.batch_size == batch_size), key=lambda setting: setting.step_s)
    best, ratio = ranked[0], ranked[-1].step_s / ranked[0].step_s
    found = f"{best.dtype}, threads {best.threads}: {best.tokens_per_s:,.0f} tokens/s"
    return Finding(f"fastest at batch {batch_size}", found, True, f"the slowest setting takes {ratio:.1f}× as long")


def long_form(setting: Setting) -> dict[str, object]:
    """A setting as a row for programs."""
    return {**asdict(setting), "tokens_per_s": setting.tokens_per_s}


def side_by_side(
    settings: Sequence[Setting], batch_sizes: Sequence[int]
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Rows for people, one per dtype and thread count, with the batch sizes beside each other; and their headings."""
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for s in settings:
        row = rows.setdefault((s.dtype, s.threads), {"dtype": s.dtype, "threads": s.threads})
        row |= {f"ms {s.batch_size}": s.step_s * 1e3, f"tps {s.batch_size}": s.tokens_per_s}
    headings = {"dtype": "dtype", "threads": "threads"}
    for batch in batch_sizes:
        headings |= {f"ms {batch}": f"ms/step, batch {batch}", f"tps {batch}": f"tokens/s, batch {batch}"}
    return list(rows.values()), headings
