"""Pretraining of a small Llama: weights, tokenizer, logits, training loop and checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor

from specrl.core.clock import Clock
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetArchitecture
from specrl.models.layer import DecoderLayer, GatedMLP, rms_norm
from specrl.models.linear import TrainableLinear

EOS = "<eos>"  # before every text; the only special token

Weights = dict[str, Tensor]
Loss = Callable[[Weights, Tensor], Tensor]
After = Callable[[int, float, Tensor], None]


@dataclass(frozen=True)
class Recipe:
    """Training settings.

    Args:
        minutes: time budget, compilation included; the learning rate is constant for 60 % of it, then falls to 2 %.
        batch: windows per step.
        lr: peak learning rate of AdamW.
        context: tokens per window, at most the positions of the model.
    """

    minutes: float = 60.0
    batch: int = 16
    lr: float = 3e-3
    context: int = 256

    @property
    def seconds(self) -> float:
        """The time budget."""
        return self.minutes * 60


def train_tokenizer(texts: list[str], vocab_size: int, words: PreTokenizer) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, within `words`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts one after the other, each with EOS before it: [N] int64."""
    eos = tokenizer.token_to_id(EOS)
    parts = [
        np.array([eos, *encoding.ids], dtype=np.int64)
        for at in range(0, len(texts), 256)
        for encoding in tokenizer.encode_batch_fast(texts[at : at + 256])
    ]
    return torch.from_numpy(np.concatenate(parts))


def new_weights(c: TargetArchitecture, device: str = "cpu") -> Weights:
    """Random float32 weights under Hugging Face's names; maps that write to the residual stream start smaller."""
    generator = torch.Generator(device).manual_seed(0)
    deep = 0.02 / math.sqrt(2 * c.num_layers)
    weights = {}
    for name, shape in expected_target_tensors(c).items():
        std = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator, device=device) * std
        weights[name] = drawn.to(device)
    return weights


def rotary(context: int, c: TargetArchitecture) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, [context, D] float32 each."""
    inverse = 1.0 / c.rope.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    angle = torch.outer(torch.arange(context).float(), inverse)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def logits(weights: Weights, ids: Tensor, cos: Tensor, sin: Tensor, c: TargetArchitecture) -> Tensor:
    """The model, a Llama: [B, T] int64 -> [B, T, V] in the weights' dtype, or in autocast's."""
    batch, length = ids.shape
    heads, kv_heads, size = c.num_heads, c.num_kv_heads, c.head_dim
    dtype = weights["model.norm.weight"].dtype
    cos, sin = cos[:length].to(dtype), sin[:length].to(dtype)

    def rope(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)

    def attend(_: DecoderLayer, qkv: Tensor) -> Tensor:
        split = qkv.view(batch, length, heads + 2 * kv_heads, size).transpose(1, 2)  # [B, heads, T, D]
        q, k, v = split.split((heads, kv_heads, kv_heads), 1)
        group = c.num_heads // c.num_kv_heads
        k, v = rope(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
        return attended.transpose(1, 2).reshape(batch * length, -1)

    def norm(name: str) -> partial[Tensor]:
        return partial(rms_norm, weight=weights[name], eps=c.rms_norm_eps)

    def linear(*names: str) -> TrainableLinear:
        parts = [weights[f"{name}_proj.weight"] for name in names]
        return TrainableLinear(parts[0] if len(parts) == 1 else torch.cat(parts))

    x = F.embedding(ids.flatten(), weights["model.embed_tokens.weight"])  # [B * T, H]
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        qkv = linear(*(f"{at}self_attn.{n}" for n in "qkv"))
        mlp = GatedMLP(linear(f"{at}mlp.gate", f"{at}mlp.up"), linear(f"{at}mlp.down"), c.intermediate_size)
        layer = DecoderLayer(qkv, linear(f"{at}self_attn.o"), mlp, norm(at + "post_attention_layernorm.weight"), i)
        x = layer.forward(norm(at + "input_layernorm.weight")(x), x, attend)
    out = F.linear(norm("model.norm.weight")(x), weights["lm_head.weight"])
    return out.view(batch, length, -1)


def loss(weights: Weights, windows: Tensor, cos: Tensor, sin: Tensor, c: TargetArchitecture) -> Tensor:
    """Mean nats per token of windows [B, T + 1] int64."""
    out = logits(weights, windows[:, :-1], cos, sin, c)
    return F.cross_entropy(out.float().flatten(0, 1), windows[:, 1:].flatten())


def config_json(c: TargetArchitecture, dtype: str = "bfloat16") -> dict[str, Any]:
    """Hugging Face's config.json of a Llama with one end-of-sequence token; `dtype` is that of the weights."""
    return {
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
        "torch_dtype": dtype,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": c.eos_token_ids[0],
    }


def save(out: Path, weights: Weights, tokenizer: Tokenizer, c: TargetArchitecture) -> None:
    """Write a checkpoint in Hugging Face's layout."""
    half = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in weights.items()}
    save_file(half, out / "model.safetensors", {"format": "pt"})
    eos = tokenizer.token_to_id(EOS)
    assert eos is not None, f"the tokenizer has no {EOS}"
    config = config_json(replace(c, bos_token_id=eos, eos_token_ids=(eos,)))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS}
    (out / "tokenizer_config.json").write_text(json.dumps(kind, indent=2) + "\n")


def learning_rate_scale(step: int, progress: float) -> float:
    """Warm-up over 100 steps; constant until 60 % of the time have passed; then linearly down to 2 %."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.6 else max(0.02, (1.0 - progress) / 0.4))


def train(recipe: Recipe, weights: Weights, text: Tensor, loss_of: Loss, clock: Clock, after: After) -> None:
    """Train float32 weights in place, on their device, until the time budget is used, and for at least two steps.

    Args:
        recipe: settings.
        weights: by name.
        text: [N] int64 tokens that windows are drawn from.
        loss_of: function of weights and windows [B, context + 1] int64.
        clock: measures the time.
        after: called after every step with its number (from 1 on), the seconds so far, and the loss [], a tensor on
            the device. After the last step, the seconds are at least those of the recipe.
    """
    for weight in weights.values():
        weight.requires_grad_()
    matrices = [weight for weight in weights.values() if weight.ndim == 2]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)

    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(recipe.context + 1, device=text.device)
    began, seconds, step = clock.now(), 0.0, 0
    while step < 2 or seconds < recipe.seconds:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate_scale(step, seconds / max(recipe.seconds, 1e-9))
        starts = torch.randint(0, len(text) - recipe.context - 1, (recipe.batch, 1), generator=generator)
        found = loss_of(weights, text[starts.to(text.device) + offsets])
        found.backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seconds = step + 1, clock.now() - began
        after(step, seconds, found.detach())


def halved(weights: Weights) -> Weights:
    """Copies in bfloat16; gradients pass through."""
    return {name: weight.bfloat16() for name, weight in weights.items()}
