"""The most memory that a stretch of this process took."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Forget the peak so far, of the process and of its GPU.

    Raises:
        ValueError: the system does not let it be forgotten.
    """
    import torch

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # what earlier trials freed is not this one's
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size
    except OSError as error:
        raise ValueError(
            f"peak memory must be resettable, but {_CLEAR} is not: {error.strerror}; run on Linux"
        ) from None
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mib() -> float:
    """Since the last `reset_peak_memory`: resident memory of the process, MiB, and what the GPU had allocated."""
    import torch

    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return int(found[1]) / 1024 + gpu
