"""The checks of `specrl doctor`: does this machine measure reliably?"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specrl.core.clock import Clock, WallClock
from specrl.measure.machine import keep_large_blocks, malloc_is_configured, output_of, torch_threads, uses_glibc
from specrl.measure.plain import PlainSetting

SGLANG = "0.5.23"  # the version that this package is tested with
REPETITIONS = 200  # of a fixed unit of work, whose times should be equal


@dataclass(frozen=True)
class Finding:
    """The result of one check; `advice` is a remedy if it is not good, or a hint."""

    check: str
    found: str
    good: bool
    advice: str = ""


def _judge(check: str, found: str, good: bool, remedy: str) -> Finding:
    return Finding(check, found, good, "" if good else remedy)


def check_device(environment: Mapping[str, object], device: str) -> Finding:
    """Report the processors, and whether a GPU is used if there is one."""
    gpus = environment["gpus"]
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB"
    found = f"{machine}; GPUs {gpus}" if gpus else f"{machine}; no GPU"
    return _judge("device", found, not gpus or device != "cpu", "a GPU is not used: --target.device cuda")


def check_fastest(settings: Sequence[PlainSetting], batch_size: int) -> Finding:
    """Report the fastest setting of plain decoding at a batch size, the reference of speedups."""
    ranked = sorted((s for s in settings if s.batch_size == batch_size), key=lambda setting: setting.step_s)
    best, ratio = ranked[0], ranked[-1].step_s / ranked[0].step_s
    found = f"{best.dtype}, threads {best.threads}: {best.tokens_per_s:,.0f} tokens/s"
    return Finding(f"fastest at batch {batch_size}", found, True, f"the slowest setting takes {ratio:.1f}× as long")


def check_clock(clock: Clock, readings: int = 10_000) -> Finding:
    """Check the smallest step of the clock, and the time of a reading."""
    began = clock.now()
    times = np.array([clock.now() for _ in range(readings)])
    reading_s = (clock.now() - began) / readings
    steps = np.diff(times)
    if (steps < 0).any():
        return Finding("clock", "runs backwards", False, "its timings are useless; use another machine")
    step_s = float(steps[steps > 0].min()) if (steps > 0).any() else math.inf
    found = f"resolution {step_s * 1e9:,.0f} ns, a reading {reading_s * 1e9:,.0f} ns"
    good = max(step_s, reading_s) < 1e-5
    return _judge("clock", found, good, "too imprecise for rounds of about 2 ms; check the clock source")


def repeat(clock: Clock, unit: Callable[[], object], count: int = REPETITIONS) -> NDArray[np.float64]:
    """Return the seconds of each of `count` calls of `unit`, after a warm-up: [count] float64."""
    for _ in range(count // 10):
        unit()
    seconds = np.empty(count)
    for i in range(count):
        began = clock.now()
        unit()
        seconds[i] = clock.now() - began
    return seconds


def check_steadiness(clock: Clock, threads: int, unit: Callable[[], object] | None = None) -> Finding:
    """Check whether the same work takes the same time: its spread, even against odd repetitions (A/A), and drift."""
    with torch_threads(threads):
        seconds = repeat(clock, unit or matmuls())
    p50, p95 = np.percentile(seconds, [50, 95])
    half = len(seconds) // 2
    a_a = float(np.median(seconds[::2]) / np.median(seconds[1::2]))
    drift = float(np.median(seconds[half:]) / np.median(seconds[:half]))
    found = f"P95/P50 {p95 / p50:.2f}, A/A {a_a:.3f}, second half/first {drift:.3f} ({2 * half} × {p50 * 1e3:.2f} ms)"
    good = bool(p95 / p50 < 1.25) and abs(a_a - 1) < 0.02 and abs(drift - 1) < 0.05
    remedy = "fewer threads or a quieter machine" if threads > 1 else "a quieter machine, or longer runs"
    return _judge(f"steadiness, {threads} thread{'s' * (threads > 1)}", found, good, remedy)


def matmuls() -> Callable[[], object]:
    """Return a unit of work of one or two milliseconds on a CPU core, shaped like decoding."""
    import torch

    weights, x = torch.ones(16, 512, 512) / 512, torch.ones(8, 512)

    def unit() -> object:
        y = x
        for weight in weights:
            y = y @ weight
        return y

    return unit


def check_load(load: float, cores: int) -> Finding:
    """Check the load of other programs, the mean over the last minute."""
    return _judge("other load", f"{load:.2f} over {cores} cores", load < 0.25 * cores, "stop it, or wait for its end")


def malloc_times() -> dict[str, float]:
    """Return the milliseconds to fill blocks of 2 MiB, before and after `keep_large_blocks`, in a new process."""
    import torch

    torch.set_num_threads(1)
    clock, block = WallClock(), torch.ones(1 << 19)  # 2 MiB

    def unit() -> None:
        for _ in range(4):
            blocks = [block * 1.5 for _ in range(16)]
            del blocks

    default_ms = 1e3 * float(repeat(clock, unit, 10).min())
    keep_large_blocks()
    return {"default_ms": default_ms, "kept_ms": 1e3 * float(repeat(clock, unit, 10).min())}


def check_malloc(milliseconds: Mapping[str, float] | None = None) -> Finding:
    """Check the cost of returning freed memory to the system (see `malloc_times`; None: measured in a new process)."""
    if not uses_glibc():
        return Finding("malloc", "not glibc", True)
    if milliseconds is None:
        command = "import json; from specrl.measure.checks import malloc_times; print(json.dumps(malloc_times()))"
        printed = output_of(sys.executable, "-c", command, timeout_s=60.0)
        if printed is None:
            return Finding("malloc", "could not be measured", False, f'{sys.executable} -c "{command}"')
        milliseconds = json.loads(printed)
    ratio = milliseconds["default_ms"] / milliseconds["kept_ms"]
    found, good = f"new 2 MiB blocks cost {ratio:.1f}× as much as reused ones", ratio < 1.5
    if malloc_is_configured():
        remedy = "raise or unset MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_"
        return _judge("malloc", f"set by the environment; {found}", good, remedy)
    hint = "specrl's commands avoid it; in your own programs: specrl.measure.machine.keep_large_blocks()"
    return Finding("malloc", found, True, "" if good else hint)


def check_openmp(cores: int) -> Finding:
    """Check the number of torch's threads, and report the variables that set it."""
    import torch

    count = torch.get_num_threads()
    prefixes = ("OMP_", "KMP_", "MKL_")
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    found = f"torch uses {count} threads; " + (", ".join(variables) or "OMP_* not set")
    return _judge("OpenMP", found, count <= cores, f"more threads than cores: OMP_NUM_THREADS={cores}")


def check_sglang(version: str | None) -> Finding:
    """Check whether the installed SGLang (None: not installed) is the version that this package is tested with."""
    if version is None:
        return Finding("SGLang", "not installed", True, "only needed for serving with it: pip install 'specrl[sglang]'")
    good = version == SGLANG or version.startswith(f"{SGLANG}.")
    return _judge("SGLang", version, good, f"tested with {SGLANG}: pip install 'specrl[sglang]'")
