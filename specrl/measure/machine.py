"""The machine that measures: its record in results, its threads and memory, and the checks of `specrl doctor`."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specrl.core.clock import Clock, WallClock
from specrl.core.version import __version__

SGLANG = "0.5.23"  # the version that this package is tested with
REPETITIONS = 200  # of a fixed unit of work, to see how much its time varies
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
_LARGE_BLOCK, _LARGE_BLOCK_OLD_GLIBC = 1 << 30, 1 << 25  # bytes


def environment() -> dict[str, object]:
    """The machine and the software, as results record them."""
    import torch

    record: dict[str, object] = {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cpu_mhz": _cpuinfo("cpu MHz"),
        "clock_source": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "cores": usable_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "specrl": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "gpu_driver": _gpu_driver() if torch.cuda.is_available() else None,
    }
    return record | {package: installed(package) for package in ("numpy", "transformers", "tokenizers", "sglang")}


def installed(package: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Cores that this process may use: its CPU affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota
        return cores


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads for a `with` block; None: leave it."""
    import torch

    before = torch.get_num_threads()
    if count not in (None, before):
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count not in (None, before):
            torch.set_num_threads(before)


def malloc_is_configured() -> bool:
    """Whether environment variables set when glibc returns freed memory to the system."""
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    return any(name in os.environ for name in names) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def uses_glibc() -> bool:
    """Whether the C library is glibc."""
    return platform.libc_ver()[0] == "glibc"


def keep_large_blocks() -> bool:
    """Let this process keep freed blocks of up to 1 GiB for reuse, unless the environment configures malloc.

    By default glibc returns large freed blocks to the system at once, and each page that is taken again costs a page
    fault. Training frees its activations in every step and becomes several times slower by it.

    Returns:
        Whether the setting was changed.
    """
    if not uses_glibc() or malloc_is_configured():
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK) or libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK_OLD_GLIBC)
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, _LARGE_BLOCK))


def malloc_times() -> dict[str, float]:
    """Milliseconds to fill blocks of 2 MiB, before and after `keep_large_blocks`; call it in a new process."""
    import torch

    torch.set_num_threads(1)
    clock, block = WallClock(), torch.ones(1 << 19)  # 2 MiB

    def unit() -> None:
        for _ in range(4):
            kept = [block * 1.5 for _ in range(16)]
            del kept

    default_ms = 1e3 * float(repeat(clock, unit, 10).min())
    keep_large_blocks()
    return {"default_ms": default_ms, "kept_ms": 1e3 * float(repeat(clock, unit, 10).min())}


@dataclass(frozen=True)
class Finding:
    """The result of one check, and what to do if it is not good."""

    check: str
    found: str
    good: bool
    advice: str = ""


def check_device(environment: Mapping[str, object], device: str) -> Finding:
    """The processors, and the GPU if there is one."""
    gpus = environment["gpus"]
    machine = f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']} GiB"
    if gpus and device == "cpu":
        return Finding("device", f"{machine}; GPUs {gpus}", False, "a GPU is not used: --target.device cuda")
    return Finding("device", f"{machine}; GPUs {gpus}" if gpus else f"{machine}; no GPU", True)


def check_clock(clock: Clock, readings: int = 10_000) -> Finding:
    """The smallest step of the clock, and the cost of a reading."""
    began = clock.now()
    seen = np.array([clock.now() for _ in range(readings)])
    reading_s = (clock.now() - began) / readings
    steps = np.diff(seen)
    if (steps < 0).any():
        return Finding("clock", "runs backwards", False, "its timings are useless; use another machine")
    step_s = float(steps[steps > 0].min()) if (steps > 0).any() else math.inf
    good = max(step_s, reading_s) < 1e-5
    found = f"resolution {step_s * 1e9:,.0f} ns, a reading {reading_s * 1e9:,.0f} ns"
    return Finding("clock", found, good, "" if good else "too coarse for rounds of about 2 ms; check the clock source")


def repeat(clock: Clock, unit: Callable[[], object], count: int = REPETITIONS) -> NDArray[np.float64]:
    """Seconds of each of `count` calls of `unit`, after a warm-up: [count] float64."""
    for _ in range(count // 10):
        unit()
    seconds = np.empty(count)
    for i in range(count):
        began = clock.now()
        unit()
        seconds[i] = clock.now() - began
    return seconds


def check_steadiness(clock: Clock, threads: int, unit: Callable[[], object] | None = None) -> Finding:
    """Whether the same work takes the same time: its spread, every other repetition against the rest (A/A), drift."""
    with torch_threads(threads):
        seconds = repeat(clock, unit or matmuls())
    p50, p95 = np.percentile(seconds, [50, 95])
    half = len(seconds) // 2
    a_a = float(np.median(seconds[::2]) / np.median(seconds[1::2]))
    drift = float(np.median(seconds[half:]) / np.median(seconds[:half]))
    found = f"P95/P50 {p95 / p50:.2f}, A/A {a_a:.3f}, second half/first {drift:.3f} ({2 * half} × {p50 * 1e3:.2f} ms)"
    good = bool(p95 / p50 < 1.25) and abs(a_a - 1) < 0.02 and abs(drift - 1) < 0.05
    remedy = "fewer threads or a quieter machine" if threads > 1 else "a quieter machine, or longer runs"
    return Finding(f"steadiness, {threads} thread{'s' * (threads > 1)}", found, good, "" if good else remedy)


def matmuls() -> Callable[[], object]:
    """A unit of work of one or two milliseconds on a CPU core, shaped like decoding."""
    import torch

    weights, x = torch.ones(16, 512, 512) / 512, torch.ones(8, 512)

    def unit() -> object:
        y = x
        for weight in weights:
            y = y @ weight
        return y

    return unit


def check_load(load: float, cores: int) -> Finding:
    """The load of other programs: the mean of the minute before this one started to work."""
    good = load < 0.25 * cores
    found = f"{load:.2f} over {cores} cores"
    return Finding("other load", found, good, "" if good else "wait until it is done, or stop it")


def check_malloc(milliseconds: Mapping[str, float] | None = None) -> Finding:
    """What returning freed memory to the system costs, measured in a new process."""
    if not uses_glibc():
        return Finding("malloc", "not glibc", True)
    command = "import json; from specrl.measure.machine import malloc_times; print(json.dumps(malloc_times()))"
    try:
        if milliseconds is None:
            words = [sys.executable, "-c", command]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
            milliseconds = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return Finding("malloc", "could not be measured", False, f'{sys.executable} -c "{command}"')
    ratio = milliseconds["default_ms"] / milliseconds["kept_ms"]
    found = f"new 2 MiB blocks cost {ratio:.1f}× as much as reused ones"
    if malloc_is_configured():
        advice = "" if ratio < 1.5 else "raise or unset MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_"
        return Finding("malloc", f"set by the environment; {found}", ratio < 1.5, advice)
    advice = "specrl's commands avoid it; in your own programs: specrl.measure.machine.keep_large_blocks()"
    return Finding("malloc", found, True, advice if ratio >= 1.5 else "")


def check_openmp(cores: int) -> Finding:
    """The number of torch's threads, and the variables that set it."""
    import torch

    count = torch.get_num_threads()
    prefixes = ("OMP_", "KMP_", "MKL_")
    named = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    found = f"torch uses {count} threads; " + (", ".join(named) or "OMP_* not set")
    good = count <= cores
    return Finding("OpenMP", found, good, "" if good else f"more threads than cores: OMP_NUM_THREADS={cores}")


def check_sglang(version: str | None) -> Finding:
    """Whether SGLang is installed, in the version that this package is tested with."""
    if version is None:
        return Finding("SGLang", "not installed", True, "needed to serve with it only: pip install 'specrl[sglang]'")
    good = version == SGLANG or version.startswith(f"{SGLANG}.")
    return Finding("SGLang", version, good, "" if good else f"tested with {SGLANG}: pip install 'specrl[sglang]'")


def _cpuinfo(key: str) -> str | None:
    """An entry of the first core in /proc/cpuinfo; None if there is none."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _gpu_driver() -> str | None:
    """The version of NVIDIA's driver; None if nvidia-smi does not say it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _commit() -> str | None:
    """The commit of this checkout, with '+' if files were changed; None for an installed package."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
