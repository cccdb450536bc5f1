"""A plain decoding step of a large shape with random weights, against the device's copy bandwidth.

A step takes as long with random weights as with trained ones. What a draft would gain on them means nothing.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_stages.stage import Stage
from specrl.core.clock import Clock
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetArchitecture
from specrl.models.target import Target
from specrl.simulation.engine import Requests

CONTEXTS = (128, 1024)
_WARM_UP_STEPS, _STEPS, _COPIES = 8, 48, 8
_DTYPE = torch.bfloat16


class RandomTensors(dict[str, Tensor]):
    """The tensors of a target, drawn on the device when they are read and not kept."""

    def __init__(self, config: TargetArchitecture, device: str) -> None:
        super().__init__()
        self.shapes, self.device = expected_target_tensors(config), device

    def __missing__(self, name: str) -> Tensor:
        tensor = torch.ones(self.shapes[name], device=self.device, dtype=_DTYPE)
        return tensor if tensor.ndim == 1 else tensor.normal_(std=0.02)


def plain(stage: Stage) -> None:
    """Write plain.json: seconds of a step at batch size 1 by context length, and the bandwidth of its reading."""
    config, rows = stage.sizes.plain, list[dict[str, Any]]()
    copied = copy_bandwidth(min(weight_bytes(config), 4 << 30), stage.device, stage.clock)
    target = Target(config, RandomTensors(config, stage.device), device=stage.device, dtype=_DTYPE)
    for context in CONTEXTS:
        if rows and not stage.seconds_left:
            break
        steps = _WARM_UP_STEPS + _STEPS
        engine = LocalEngine(target, max_context=context + steps)
        prompts = Requests((context - steps // 2,) * 2, (steps + 2,) * 2)
        session = engine.start(prompts, batch_size=1, seed=0, plain=True)
        rounds = [session.round(Plan(0)) for _ in range(steps)][_WARM_UP_STEPS:]
        engine.close()
        seconds = float(np.median([done.seconds for done in rounds]))
        length = float(np.mean([done.context_lengths.mean() for done in rounds]))
        bandwidth = (weight_bytes(config) + cache_bytes(config, length)) / seconds
        figures = {"context": length, "seconds": seconds, "bytes_per_s": bandwidth, "copy_bytes_per_s": copied}
        rows.append({"parameters": count(config), **figures, "of_copy": bandwidth / copied})
        stage.write("plain", rows)


def count(config: TargetArchitecture) -> int:
    """Number of parameters."""
    return sum(map(prod, expected_target_tensors(config).values()))


def weight_bytes(config: TargetArchitecture) -> int:
    """Bytes of the weights that a step reads: all of them, but one row of the embedding only."""
    return (count(config) - (config.vocab_size - 1) * config.hidden_size) * _DTYPE.itemsize


def cache_bytes(config: TargetArchitecture, context: float) -> float:
    """Bytes of the keys and values that a step reads."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * _DTYPE.itemsize


def copy_bandwidth(size: int, device: str, clock: Clock) -> float:
    """Bytes per second of copies of `size` bytes on the device; reading and writing both count."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    copy, seconds = source.clone(), list[float]()
    for _ in range(3):
        began = clock.now()
        for _ in range(_COPIES):
            copy.copy_(source)
        seconds.append(clock.now() - began)
    return 2 * size * _COPIES / min(seconds)
