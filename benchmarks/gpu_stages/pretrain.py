"""The target: a Llama pretrained on the Python sources of this machine."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from pretraining import Recipe, Weights, encode, loss, new_weights, rotary, save, train, train_tokenizer
from tokenizers import pre_tokenizers
from torch import Tensor

from gpu_stages.stage import Stage
from specrl.measure.machine import keep_large_blocks
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import load_workload

_TOKENIZER_TEXT = 12 << 20  # characters that the tokenizer is trained on
_WINDOWS, _LEARNING_RATE = 32, 1e-3


def pretrain(stage: Stage) -> None:
    """Train a tokenizer and a target until the deadline, and write them to target/."""
    keep_large_blocks()
    config, context, device = stage.sizes.target, stage.sizes.context, stage.device
    texts = list(sources(stage.sizes.corpus_bytes))
    some = texts[:: 1 + sum(map(len, texts)) // _TOKENIZER_TEXT]
    tokenizer = train_tokenizer(some, config.vocab_size, pre_tokenizers.ByteLevel(add_prefix_space=False))
    ids, weights = encode(tokenizer, texts).to(device), new_weights(config, device)
    cos, sin = (angles.to(device) for angles in rotary(context, config))

    def loss_of(weights: Weights, windows: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            return loss(weights, windows, cos, sin, config)

    losses, began = list[Tensor](), stage.clock.now()
    recipe = Recipe(stage.seconds_left / 60, batch=_WINDOWS, lr=_LEARNING_RATE, context=context)
    train(recipe, weights, ids, loss_of, stage.clock, lambda step, seconds, found: losses.append(found))
    seconds = stage.clock.now() - began
    stage.target.mkdir(parents=True, exist_ok=True)
    save(stage.target, weights, tokenizer, config)
    row = {
        "parameters": sum(weight.numel() for weight in weights.values()),
        "corpus_tokens": len(ids),
        "steps": len(losses),
        "seconds": seconds,
        "tokens_per_s": len(losses) * _WINDOWS * context / seconds,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
    }
    stage.write("pretrain", [row])


def sources(size: int) -> Iterator[str]:
    """About `size` characters: standard library files that are not held out, then files of installed packages."""
    library = load_workload("stdlib", load_tokenizer(embedded_directory()), split="train").texts
    roots = sorted({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})
    paths = sorted(path for root in roots for path in Path(root).rglob("*.py"))
    random.Random(0).shuffle(paths)
    files = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    for texts in ((text.content for text in library), files):
        for text in texts:
            yield text
            if (size := size - len(text)) <= 0:
                return
