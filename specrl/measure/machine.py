"""What `specrl doctor` looks at beside decoding: each check is a function that returns a finding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specrl.core.clock import Clock
from specrl.measure.malloc import is_glibc, set_by_environment

SGLANG = "0.5.23"  # the version whose interfaces this package was checked against
UNITS = 200  # repetitions of the fixed unit of work


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, whether it is good, and what to do where it is not."""

    check: str
    found: str
    good: bool
    advice: str = ""


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with `count` threads inside; None: as many as it does."""
    import torch

    before = torch.get_num_threads()
    if count not in (None, before):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count not in (None, before):
            torch.set_num_threads(before)


def about_device(environment: Mapping[str, object], device: str) -> Finding:
    """The processors, and the GPU where there is one."""
    gpus = environment["gpus"]
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB"
    if gpus and device == "cpu":
        return Finding("device", f"{machine}; GPUs {gpus}", False, "a GPU stands idle: --device cuda")
    return Finding("device", f"{machine}; GPUs {gpus}" if gpus else f"{machine}; no GPU", True)


def about_clock(clock: Clock, readings: int = 10_000) -> Finding:
    """The smallest step that the clock shows, and what a reading costs."""
    began = clock.now()
    seen = np.array([clock.now() for _ in range(readings)])
    reading_s = (clock.now() - began) / readings
    steps = np.diff(seen)
    if (steps < 0).any():
        return Finding("clock", "runs backwards", False, "its timings mean nothing; use another machine")
    step_s = float(steps[steps > 0].min()) if (steps > 0).any() else float("inf")
    found = f"resolution {step_s * 1e9:,.0f} ns, a reading {reading_s * 1e9:,.0f} ns"
    good = max(step_s, reading_s) < 1e-5
    return Finding(
        "clock", found, good, "" if good else "coarse against rounds of about 2 ms; look at the clock source"
    )


def repeat(clock: Clock, unit: Callable[[], object], count: int = UNITS) -> NDArray[np.float64]:
    """Seconds of each of `count` runs of `unit`, after a warm-up: [count] float64."""
    for _ in range(count // 10):
        unit()
    took = np.empty(count)
    for i in range(count):
        began = clock.now()
        unit()
        took[i] = clock.now() - began
    return took


def about_steadiness(clock: Clock, threads: int, unit: Callable[[], object] | None = None) -> Finding:
    """Whether the same work takes the same time: its spread, and every other repetition against the rest (A/A)."""
    with torch_threads(threads):
        took = repeat(clock, unit or matmuls())
    p50, p95 = np.percentile(took, [50, 95])
    a_a = float(np.median(took[::2]) / np.median(took[1::2]))
    drift = float(np.median(took[len(took) // 2 :]) / np.median(took[: len(took) // 2]))
    found = f"P95/P50 {p95 / p50:.2f}, A/A {a_a:.3f}, second half/first {drift:.3f} ({len(took)} × {p50 * 1e3:.2f} ms)"
    good = bool(p95 / p50 < 1.25) and abs(a_a - 1) < 0.02 and abs(drift - 1) < 0.05
    remedy = "fewer threads or a quieter machine" if threads > 1 else "a quieter machine, or longer runs"
    return Finding(f"steadiness, {threads} thread{'s' * (threads > 1)}", found, good, "" if good else remedy)


def matmuls() -> Callable[[], object]:
    """A unit of work of a millisecond or two on a CPU core, shaped like decoding."""
    import torch

    weights = torch.ones(16, 512, 512) / 512
    x = torch.ones(8, 512)

    def unit() -> object:
        y = x
        for weight in weights:
            y = y @ weight
        return y

    return unit


def about_load(load: float, cores: int) -> Finding:
    """Work that others had running, as the mean of the last minute, taken before our own."""
    good = load < 0.25 * cores
    return Finding(
        "other load", f"{load:.2f} over {cores} cores", good, "" if good else "wait until it is done, or stop it"
    )


def about_malloc(milliseconds: Mapping[str, float] | None = None) -> Finding:
    """What giving freed memory back to the system costs, measured in a fresh process."""
    if not is_glibc():
        return Finding("malloc", "not glibc", True)
    took = milliseconds or _measure_malloc()
    if took is None:
        return Finding("malloc", "could not be measured", False, "python -m specrl.measure.malloc")
    ratio = took["default_ms"] / took["kept_ms"]
    costs = f"fresh 2 MiB blocks cost {ratio:.1f}× what reused ones do"
    if set_by_environment():
        advice = "" if ratio < 1.5 else "raise or unset MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_"
        return Finding("malloc", f"the environment sets it; {costs}", ratio < 1.5, advice)
    advice = "specrl sees to it; in your own programs: specrl.measure.malloc.keep_large_blocks()"
    return Finding("malloc", costs, True, advice if ratio >= 1.5 else "")


def _measure_malloc() -> dict[str, float] | None:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "specrl.measure.malloc"], capture_output=True, text=True, timeout=60, check=True
        )
        took: dict[str, float] = json.loads(done.stdout)
        return took
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def about_openmp(cores: int) -> Finding:
    """The threads torch takes by default, and what the environment says of them."""
    import torch

    count = torch.get_num_threads()
    named = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "KMP_", "MKL_"))
    ]
    found = f"torch takes {count} threads; " + (", ".join(named) or "OMP_* not set")
    good = count <= cores
    return Finding("OpenMP", found, good, "" if good else f"more threads than cores: OMP_NUM_THREADS={cores}")


def about_sglang(version: str | None) -> Finding:
    """Whether SGLang is installed, in the version this package knows."""
    if version is None:
        return Finding("SGLang", "not installed", True, "needed only to serve with it: pip install 'specrl[sglang]'")
    good = version == SGLANG or version.startswith(f"{SGLANG}.")
    return Finding("SGLang", version, good, "" if good else f"{SGLANG} was checked: pip install 'specrl[sglang]'")
