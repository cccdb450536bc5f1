"""The machine that measures: its record in results, its cores and threads, and memory allocation."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from specrl.core.version import __version__

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
_LARGE_BLOCK, _LARGE_BLOCK_OLD_GLIBC = 1 << 30, 1 << 25  # bytes


def environment() -> dict[str, object]:
    """Return the machine and the software, as results record them."""
    import torch

    has_gpu = torch.cuda.is_available()
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else None
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
        "gpu_driver": driver.split()[0] if driver else None,
    }
    return record | {package: installed(package) for package in ("numpy", "transformers", "tokenizers", "sglang")}


def installed(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its CPU affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch's threads for a `with` block; None: no change."""
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

    By default glibc returns large freed blocks to the system at once, and every page costs a page fault when it is
    used again. Training frees its activations in every step and becomes several times slower by it.

    Returns:
        Whether the setting was changed.
    """
    if not uses_glibc() or malloc_is_configured():
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK) or libc.mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK_OLD_GLIBC)
    return bool(kept and libc.mallopt(_TRIM_THRESHOLD, _LARGE_BLOCK))


def output_of(*command: str, timeout_s: float = 20.0) -> str | None:
    """Return what a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpuinfo(key: str) -> str | None:
    """Return an entry of the first core in /proc/cpuinfo; None if there is none."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout, with '+' if files were changed; None for an installed package."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    head, changes = (output_of("git", "-C", str(root), *words) for words in (["rev-parse", "HEAD"], ["status", "-s"]))
    return head and head + ("+" if changes else "")
