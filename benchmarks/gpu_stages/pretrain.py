"""A target large enough to be bound by memory, pretrained on the Python sources that the machine carries."""

from __future__ import annotations

import json
import math
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gpu_stages.sizes import Sizes
from specrl.clock import Clock
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetConfig
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workload import load_workload

EOS = "<eos>"  # before every file; the only special token
_FOR_TOKENIZER = 12 << 20  # bytes that the tokenizer is trained on
_WARM_UP = 100  # steps
Weights = dict[str, Tensor]


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
    save(out, weights, sizes.target, tokenizer)
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


def logits(weights: Weights, c: TargetConfig, ids: Tensor) -> Tensor:
    """The model: [B, T] int64 -> [B, T, V]."""
    batch, length = ids.shape
    frequency = 1.0 / c.rope.theta ** (torch.arange(0, c.head_dim, 2, device=ids.device).float() / c.head_dim)
    angle = torch.outer(torch.arange(length, device=ids.device).float(), frequency).repeat(1, 2)  # [T, D]
    cos, sin = angle.cos(), angle.sin()

    def rope(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (c.hidden_size,), weights[name], c.rms_norm_eps)

    x = F.embedding(ids, weights["model.embed_tokens.weight"])  # [B, T, H]
    for layer in range(c.num_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            F.linear(h, weights[f"{at}self_attn.{n}_proj.weight"]).view(batch, length, -1, c.head_dim).transpose(1, 2)
            for n in "qkv"
        )  # [B, heads, T, D]
        k, v = (rope(k).repeat_interleave(c.group, 1), v.repeat_interleave(c.group, 1))
        a = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).reshape(batch, length, -1), weights[at + "self_attn.o_proj.weight"])
        h = norm(x, at + "post_attention_layernorm.weight")
        up = F.silu(F.linear(h, weights[at + "mlp.gate_proj.weight"])) * F.linear(h, weights[at + "mlp.up_proj.weight"])
        x = x + F.linear(up, weights[at + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), weights["lm_head.weight"])


def loss_of(weights: Weights, c: TargetConfig, windows: Tensor) -> Tensor:
    """Mean nats per token of windows [B, T + 1] int64, products in bfloat16."""
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        out = logits(weights, c, windows[:, :-1])
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


def save(out: Path, weights: Weights, c: TargetConfig, tokenizer: Tokenizer) -> None:
    """Write the checkpoint as Hugging Face reads it."""
    out.mkdir(parents=True, exist_ok=True)
    half = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in weights.items()}
    save_file(half, out / "model.safetensors", {"format": "pt"})
    eos = tokenizer.token_to_id(EOS)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "max_position_embeddings": c.max_position_embeddings,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": eos,
        "eos_token_id": eos,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS}
    (out / "tokenizer_config.json").write_text(json.dumps(kind, indent=2) + "\n")
