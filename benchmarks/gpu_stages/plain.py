"""A plain step of a large shape with random weights, against the device's measured copy bandwidth.

Random weights take as long to read as learnt ones, so the seconds of a step hold for any checkpoint of the shape; what
a draft would gain on them means nothing and is not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_stages.sizes import Sizes
from specrl.core.clock import Clock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetConfig
from specrl.models.target import Target

_WARM_STEPS = 8
_COPIES = 8


class RandomTensors(Mapping[str, Tensor]):
    """A target's tensors, each drawn on the device when it is asked for: nothing is held twice, or on the host."""

    def __init__(self, config: TargetConfig, device: str, dtype: torch.dtype) -> None:
        self.shapes, self._device, self._dtype = expected_target_tensors(config), device, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        return torch.empty(shape, device=self._device, dtype=self._dtype).normal_(std=0.02)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Same:
    """One prompt, over and over."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless repetition."""
        return repeat(self._request)


def plain(sizes: Sizes, device: str, clock: Clock, deadline: float) -> dict[str, Any]:
    """Seconds of a plain step at batch 1 by context, bytes it must read, and the bandwidth that comes to.

    After the deadline only the first context is looked at.
    """
    config, dtype = sizes.plain, torch.bfloat16
    copied = copy_bandwidth(sizes.copy_bytes, device, clock)
    began = clock.now()
    tensors = RandomTensors(config, device, dtype)
    target = Target(config, tensors, device=device, dtype=dtype)
    built_s = clock.now() - began
    rows, skipped = [], []
    for context in sizes.contexts:
        if rows and clock.now() >= deadline:
            skipped.append(context)
            continue
        steps = _WARM_STEPS + sizes.plain_steps
        prompt = tuple((np.arange(context - steps // 2 - 1) % (config.vocab_size - 1) + 1).tolist())
        engine = LocalEngine(target, max_context=context + steps)
        request = Request(prompt, steps + 2, ignore_eos=True)
        session = engine.start(Same(request), batch_size=1, seed=0, plain=True)
        done = [session.round(Plan(0)) for _ in range(steps)][_WARM_STEPS:]
        engine.close()
        seconds = float(np.median([each.seconds for each in done]))
        known = float(np.mean([each.context_lengths.mean() for each in done]))
        read = weight_bytes(config, dtype.itemsize) + cache_bytes(config, known, dtype.itemsize)
        bandwidth = read / seconds
        rows.append(
            {
                "context": known,
                "seconds": seconds,
                "all_seconds": [each.seconds for each in done],
                "bytes": read,
                "bytes_per_s": bandwidth,
                "of_copy": bandwidth / copied,
            }
        )
    return {
        "parameters": count(config),
        "built_s": built_s,
        "copy_bytes_per_s": copied,
        "rows": rows,
        "out_of_time": skipped,
    }


def count(config: TargetConfig) -> int:
    """Parameters."""
    return sum(int(np.prod(shape)) for shape in expected_target_tensors(config).values())


def weight_bytes(config: TargetConfig, itemsize: int) -> int:
    """Of weights that a step of one token must read: all but the embedding, of which it reads one row."""
    return (count(config) - (config.vocab_size - 1) * config.hidden_size) * itemsize


def cache_bytes(config: TargetConfig, context: float, itemsize: int) -> float:
    """Of keys and values that a step of one token must read."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * itemsize


def copy_bandwidth(size: int, device: str, clock: Clock) -> float:
    """Bytes a second, read and written both counted, of copies of `size` bytes within the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy.copy_(source)
    best = float("inf")
    for _ in range(3):
        began = clock.now()
        for _ in range(_COPIES):
            copy.copy_(source)
        best = min(best, (clock.now() - began) / _COPIES)
    return 2 * size / best
