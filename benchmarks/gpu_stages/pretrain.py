"""A target large enough to be bound by memory, pretrained on the Python sources that the machine carries."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pretraining import (
    Recipe,
    Weights,
    encode,
    loss,
    new_weights,
    rotary,
    save,
    train,
    train_tokenizer,
)
from tokenizers import pre_tokenizers
from torch import Tensor

from gpu_stages.sizes import Sizes
from specrl.core.clock import Clock
from specrl.models.config import TargetConfig
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import load_workload

_FOR_TOKENIZER = 12 << 20  # bytes that the tokenizer is trained on


def pretrain(out: Path, sizes: Sizes, device: str, clock: Clock, deadline: float) -> dict[str, Any]:
    """Write a checkpoint to `out`, trained until `deadline` on the clock; what was done."""
    began = clock.now()
    texts = list(sources(sizes.corpus_bytes))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = train_tokenizer(some_of(texts, _FOR_TOKENIZER), sizes.target.vocab_size, words)
    ids = encode(tokenizer, texts)
    held_out, ids = ids[: len(ids) // 100], ids[len(ids) // 100 :].to(device)
    read_s = clock.now() - began
    weights = new_weights(sizes.target, device)
    done = train_until(deadline, weights, ids, sizes, clock)
    nats = evaluate(weights, held_out.to(device), sizes)
    out.mkdir(parents=True, exist_ok=True)
    save(out, weights, tokenizer, sizes.target)
    return {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "corpus_bytes": sum(len(text) for text in texts),
        "corpus_tokens": len(ids),
        "reading_s": read_s,
        **done,
        "held_out_nats_per_token": nats,
    }


def sources(most: int) -> Iterator[str]:
    """Python files of the standard library, but for those that prompts of measurements come from, then of packages."""
    library = load_workload("stdlib", load_tokenizer(embedded_directory()), split="train").texts
    packages = sorted({Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")})
    paths = sorted(path for root in packages for path in root.rglob("*.py") if path.stat().st_size > 500)
    random.Random(0).shuffle(paths)
    taken = 0
    for text in library:
        yield text.content
        if (taken := taken + len(text.content)) >= most:
            return
    for path in paths:
        content = path.read_text(encoding="utf-8", errors="replace")
        yield content
        if (taken := taken + len(content)) >= most:
            return


def some_of(texts: list[str], most: int) -> list[str]:
    """Texts in random order, until they hold `most` characters."""
    some, taken = [], 0
    for text in random.Random(1).sample(texts, len(texts)):
        some.append(text)
        if (taken := taken + len(text)) >= most:
            break
    return some


def loss_of(c: TargetConfig, weights: Weights, windows: Tensor) -> Tensor:
    """Mean nats per token of windows [B, T + 1] int64, products in bfloat16."""
    cos, sin = (angles.to(windows.device) for angles in rotary(windows.shape[1] - 1, c))
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        return loss(weights, windows, cos, sin, c)


def train_until(deadline: float, weights: Weights, ids: Tensor, sizes: Sizes, clock: Clock) -> dict[str, Any]:
    """Train float32 weights until the deadline; how far that went."""
    minutes = max(deadline - clock.now(), 0.0) / 60
    recipe = Recipe(minutes, batch=sizes.windows, lr=sizes.learning_rate, context=sizes.context)
    course: list[dict[str, float]] = []

    def after(step: int, seconds: float, found: Tensor) -> None:
        if step % 50 == 1 or seconds >= recipe.seconds:
            course.append({"step": step, "seconds": seconds, "loss": float(found)})

    train(recipe, weights, ids, partial(loss_of, sizes.target), clock, after)
    steps, seconds = int(course[-1]["step"]), course[-1]["seconds"]
    tokens = steps * sizes.windows * sizes.context
    return {"steps": steps, "tokens": tokens, "training_s": seconds, "tokens_per_s": tokens / seconds, "course": course}


@torch.no_grad()
def evaluate(weights: Weights, ids: Tensor, sizes: Sizes) -> float:
    """Mean nats per token on up to 16 batches of windows."""
    size = sizes.context + 1
    windows = ids[: len(ids) // size * size].view(-1, size)[: 16 * sizes.windows]
    return float(torch.stack([loss_of(sizes.target, weights, part) for part in windows.split(sizes.windows)]).mean())
