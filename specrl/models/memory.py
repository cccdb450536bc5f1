"""Memory of a target's weights and key-value caches, free memory of a device, and what fits into it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import DraftArchitecture, TargetArchitecture

_CGROUP = Path("/sys/fs/cgroup")


def weight_bytes(config: TargetArchitecture, dtype: torch.dtype) -> int:
    """Return a lower bound of the bytes of a loaded target's weights.

    The head counts twice: as it is (with tied embeddings this is the embedding), and with the last norm folded in. A
    CPU also stores small matrices twice (`specrl.models.linear`); that is not counted.
    """
    entries = sum(math.prod(shape) for shape in expected_target_tensors(config).values())
    return (entries + (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)) * dtype.itemsize


def cache_bytes(config: TargetArchitecture, dtype: torch.dtype, draft: DraftArchitecture | None = None) -> int:
    """Return the bytes of keys and values per token, in all layers of the target and the one layer of the draft."""
    entries = config.num_layers * config.num_kv_heads * config.head_dim
    entries += 0 if draft is None else draft.num_kv_heads * draft.head_dim
    return 2 * entries * dtype.itemsize


def free_bytes(device: str, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Return the bytes that this process may still allocate; None if unknown.

    On a GPU: free memory, plus the memory that torch has reserved and does not use. On a CPU: the memory that Linux
    reports as available, or the rest of the control group (container) if that is less.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    limits = []
    if device == "cpu" and meminfo.is_file():
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        limits += [int(available[1]) * 1024] if available else []
    files = [cgroup / f"memory.{name}" for name in ("max", "current", "stat")]
    if device == "cpu" and all(file.is_file() for file in files):
        limit, used, stat = (file.read_text().strip() for file in files)
        cached = sum(int(size) for size in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
        limits += [int(limit) - int(used) + cached] if limit.isdecimal() else []
    return min(limits, default=None)


@dataclass(frozen=True)
class Room:
    """Key-value caches in free memory.

    Args:
        per_token: bytes per token, see `cache_bytes`.
        free: bytes.
        draft_headroom: slots of a request beyond its context, for drafts that are not committed.
    """

    per_token: int
    free: int
    draft_headroom: int = 0

    def needed(self, batch: int, context: int) -> int:
        """Return the bytes for `batch` requests of up to `context` tokens."""
        return batch * (context + self.draft_headroom) * self.per_token

    def largest_batch(self, context: int) -> int:
        """Return how many requests of up to `context` tokens fit."""
        return max(0, self.free // self.needed(1, context))

    def largest_context(self, batch: int) -> int:
        """Return how many tokens each of `batch` requests may reach; 0 or less if none fit."""
        return self.free // (batch * self.per_token) - self.draft_headroom


def check_room(per_token: int, device: str, batch_size: int, max_context: int, *, draft_headroom: int = 0) -> None:
    """Refuse key-value caches (see `Room`) that do not fit the device, unless its free memory is unknown.

    Raises:
        ValueError: the caches do not fit; the message names sizes that do.
    """
    free = free_bytes(device)
    if free is None:
        return
    room = Room(per_token, free, draft_headroom)
    needed = room.needed(batch_size, max_context)
    if needed > free:
        context, batch = room.largest_context(batch_size), room.largest_batch(max_context)
        fitting = [f"max_context={context} at this batch size"] if context >= 2 else []
        fitting += [f"a batch size of {batch} at this max_context"] if batch else []
        raise ValueError(
            f"the caches of all requests must fit the memory, but {batch_size} of max_context={max_context} take "
            f"{_size(needed)} ({per_token} bytes per token) and {device} has {_size(free)} free; "
            + (f"use {' or '.join(fitting)}" if fitting else "free memory, or use a smaller target or dtype")
        )


def check_weights(config: TargetArchitecture, dtype: torch.dtype, device: str) -> None:
    """Refuse a target whose weights do not fit the device.

    Raises:
        ValueError: they do not.
    """
    free, needed = free_bytes(device), weight_bytes(config, dtype)
    if free is not None and needed > free:
        raise ValueError(
            f"a target's weights must fit the memory, but in {str(dtype).removeprefix('torch.')} they take "
            f"{_size(needed)} and {device} has {_size(free)} free; free memory, or use a smaller target or dtype"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
