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
    """Bytes of a loaded target's weights: a lower bound.

    The head is kept twice: as it is (with tied embeddings this is the embedding), and with the last norm folded in. On
    a CPU small matrices are kept twice, too (`specrl.models.linear`); that is not counted.
    """
    entries = sum(math.prod(shape) for shape in expected_target_tensors(config).values())
    return (entries + (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)) * dtype.itemsize


def cache_bytes(config: TargetArchitecture, dtype: torch.dtype, draft: DraftArchitecture | None = None) -> int:
    """Bytes of keys and values per token of a request, in all layers of the target and the one layer of the draft."""
    layers = config.num_layers * config.num_kv_heads * config.head_dim
    return 2 * (layers + (0 if draft is None else draft.num_kv_heads * draft.head_dim)) * dtype.itemsize


def free_bytes(device: str, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this process may still allocate.

    On a GPU: free memory, plus the memory that torch has reserved and does not use. On a CPU: the memory that Linux
    reports as available, or the rest of the control group (container) if that is less. None if neither can be read, or
    for other devices.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = []
    if device == "cpu" and meminfo.is_file():
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
        found += [int(available[1]) * 1024] if available else []
    files = [cgroup / f"memory.{name}" for name in ("max", "current", "stat")]
    if device == "cpu" and all(file.is_file() for file in files):
        most, now, stat = (file.read_text().strip() for file in files)
        cached = sum(int(size) for size in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
        found += [int(most) - int(now) + cached] if most.isdecimal() else []
    return min(found, default=None)


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
        """Bytes for `batch` requests of up to `context` tokens."""
        return batch * (context + self.draft_headroom) * self.per_token

    def largest_batch(self, context: int) -> int:
        """Requests of up to `context` tokens that fit."""
        return max(0, self.free // self.needed(1, context))

    def largest_context(self, batch: int) -> int:
        """Tokens that each of `batch` requests may reach; 0 or less if none fit."""
        return self.free // (batch * self.per_token) - self.draft_headroom


def check_room(
    config: TargetArchitecture,
    draft: DraftArchitecture | None,
    dtype: torch.dtype,
    device: str,
    *,
    batch_size: int,
    max_context: int,
    draft_headroom: int = 0,
) -> None:
    """Refuse caches that do not fit the device. If its free memory is unknown, nothing is refused.

    Args:
        config, draft: the models whose keys and values are cached.
        batch_size, max_context, draft_headroom: requests, tokens that each may reach, and slots beyond.

    Raises:
        ValueError: the caches do not fit; the message names sizes that do.
    """
    free = free_bytes(device)
    if free is None:
        return
    room = Room(cache_bytes(config, dtype, draft), free, draft_headroom)
    needed = room.needed(batch_size, max_context)
    if needed > free:
        context, batch = room.largest_context(batch_size), room.largest_batch(max_context)
        fits = [f"max_context={context} at this batch size"] if context >= 2 else []
        fits += [f"a batch size of {batch} at this max_context"] if batch else []
        raise ValueError(
            f"the caches of all requests must fit the memory, but {batch_size} of max_context={max_context} take "
            f"{_size(needed)} ({room.per_token} bytes a token) and {device} has {_size(free)} free; "
            + (f"{' or '.join(fits)} would fit" if fits else "free memory, or use a smaller target or dtype")
        )


def check_weights(config: TargetArchitecture, dtype: torch.dtype, device: str) -> None:
    """Refuse a target whose weights do not fit the device.

    Raises:
        ValueError: they do not.
    """
    free, needed = free_bytes(device), weight_bytes(config, dtype)
    if free is not None and needed > free:
        half = " (bfloat16 takes half)" if dtype.itemsize == 4 else ""
        raise ValueError(
            f"a target's weights must fit the memory, but in {str(dtype).removeprefix('torch.')} they take "
            f"{_size(needed)} and {device} has {_size(free)} free; free some, or use a smaller target or dtype{half}"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
