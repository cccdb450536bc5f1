"""A target large enough to be bound by memory, pretrained on the Python sources that the machine carries."""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gpu_stages.sizes import Sizes
from specrl.clock import Clock
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetConfig
from specrl.models.embedded import embedded_directory
from specrl.models.embedded.pretrain import EOS, Weights, logits, rotary, save
from specrl.models.tokenizer import load_tokenizer
from specrl.workload import load_workload

_FOR_TOKENIZER = 12 << 20  # bytes that the tokenizer is trained on
_WARM_UP = 100  # steps


def pretrain(out: Path, sizes: Sizes, device: str, clock: Clock, deadline: float) -> dict[str, Any]:
    """Write a checkpoint to `out`, trained until `deadline` on the clock; what was done."""
    began = clock.now()
    texts = list(sources(sizes.corpus_bytes))
    tokenizer = train_tokenizer(texts, sizes.target.vocab_size)
    eos = tokenizer.token_to_id(EOS)
    parts = [
        np.array([eos, *encoding.ids], dtype=np.int64)
        for at in range(0, len(texts), 256)
        for encoding in tokenizer.encode_batch_fast(texts[at : at + 256])
    ]
    ids = torch.from_numpy(np.concatenate(parts))
    held_out, ids = ids[: len(ids) // 100], ids[len(ids) // 100 :].to(device)
    read_s = clock.now() - began
    torch.manual_seed(0)
    weights = new_weights(sizes.target, device)
    done = train(weights, ids, sizes, device, clock, deadline)
    nats = evaluate(weights, held_out.to(device), sizes, device)
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


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """A byte-level BPE of `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    some, taken = [], 0
    for text in random.Random(1).sample(texts, len(texts)):
        some.append(text)
        if (taken := taken + len(text)) >= _FOR_TOKENIZER:
            break
    tokenizer.train_from_iterator(some, trainer)
    return tokenizer


def new_weights(config: TargetConfig, device: str) -> Weights:
    """Random weights under Hugging Face's names, float32 on the device; what writes to the residual starts smaller."""
    deep = 0.02 / math.sqrt(2 * config.num_layers)
    weights = {}
    for name, shape in expected_target_tensors(config).items():
        std = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        new = torch.ones(shape, device=device) if len(shape) == 1 else torch.randn(shape, device=device) * std
        weights[name] = new.requires_grad_()
    return weights


def loss_of(weights: Weights, c: TargetConfig, windows: Tensor) -> Tensor:
    """Mean nats per token of windows [B, T + 1] int64, products in bfloat16."""
    cos, sin = (angles.to(windows.device) for angles in rotary(windows.shape[1] - 1, c))
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        out = logits(weights, windows[:, :-1], cos, sin, c)
    return F.cross_entropy(out.float().flatten(0, 1), windows[:, 1:].flatten())


def train(weights: Weights, ids: Tensor, sizes: Sizes, device: str, clock: Clock, deadline: float) -> dict[str, Any]:
    """AdamW on float32 weights until the deadline; the rate is constant for 60 % of the time, then falls to 2 %."""
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=sizes.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.arange(sizes.context + 1, device=device)
    began, step, course = clock.now(), 0, []
    while step < 2 or clock.now() < deadline:
        progress = (clock.now() - began) / max(deadline - began, 1e-9)
        fall = min(1.0, max(0.02, (1.0 - progress) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = sizes.learning_rate * min(1.0, (step + 1) / _WARM_UP) * fall
        starts = torch.randint(len(ids) - sizes.context - 1, (sizes.windows, 1), generator=generator).to(device)
        loss = loss_of(weights, sizes.target, ids[starts + offsets])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 1:
            course.append({"step": step, "seconds": clock.now() - began, "loss": float(loss.detach())})
    seconds, tokens = clock.now() - began, step * sizes.windows * sizes.context
    course.append({"step": step, "seconds": seconds, "loss": float(loss.detach())})
    return {"steps": step, "tokens": tokens, "training_s": seconds, "tokens_per_s": tokens / seconds, "course": course}


@torch.no_grad()
def evaluate(weights: Weights, ids: Tensor, sizes: Sizes, device: str) -> float:
    """Mean nats per token on up to 16 batches of windows."""
    size = sizes.context + 1
    windows = ids[: len(ids) // size * size].view(-1, size)[: 16 * sizes.windows]
    return float(torch.stack([loss_of(weights, sizes.target, part) for part in windows.split(sizes.windows)]).mean())
