"""glibc hands large freed blocks back to the system, and every fresh page taken again costs a page fault.

Blocks beyond a threshold (at most 32 MiB) are mapped and unmapped each time, and the heap's free end is trimmed;
training, which frees its activations at every step, became several times slower by it. `python -m
specrl.measure.malloc` measures what it costs here.
"""

from __future__ import annotations

import ctypes
import json
import os

from specrl.core.clock import WallClock

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 1 << 30  # bytes
_MOST_OLDER = 1 << 25  # bytes, all that older versions take


def is_glibc() -> bool:
    """Whether this process allocates with glibc (an allocator preloaded in its place aside)."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False


def set_by_environment() -> bool:
    """Whether the environment says itself when large blocks go back."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")
    return any(name in os.environ for name in names) or "glibc.malloc." in tunables


def keep_large_blocks() -> bool:
    """Let this process keep freed blocks of up to 1 GiB for reuse, unless the environment decides otherwise.

    Memory once used is then rarely given back before the process ends. Returns whether anything was set.
    """
    if not is_glibc() or set_by_environment():
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_M_MMAP_THRESHOLD, _LARGE) or libc.mallopt(_M_MMAP_THRESHOLD, _MOST_OLDER)
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _LARGE))


def measure() -> dict[str, float]:
    """Milliseconds of a unit of work on fresh blocks of 2 MiB, as the process starts and after `keep_large_blocks`."""
    import torch

    torch.set_num_threads(1)
    clock = WallClock()
    block = torch.ones(1 << 19)  # 2 MiB, as activations in training are

    def unit_ms() -> float:
        best = float("inf")
        for _ in range(5):
            began = clock.now()
            for _ in range(4):
                kept = [block * 1.5 for _ in range(16)]
                del kept
            best = min(best, clock.now() - began)
        return best * 1e3

    default_ms = unit_ms()
    keep_large_blocks()
    return {"default_ms": default_ms, "kept_ms": unit_ms()}


if __name__ == "__main__":
    print(json.dumps(measure()))
