"""Pretrain an embedded target: a small Llama on the Python standard library's sources.

    python -m specrl.models.embedded.pretrain OUT --minutes 62
    python -m specrl.models.embedded.pretrain OUT2 --minutes 8 --init OUT --context 1024 --batch 4 --lr 5e-4

The second run teaches longer positions. Each writes a Hugging Face checkpoint (config.json, model.safetensors in
bfloat16, tokenizer.json), held_out.txt and log.json. Where glibc allocates, MALLOC_MMAP_THRESHOLD_=1073741824
MALLOC_TRIM_THRESHOLD_=1073741824 in the environment makes it several times faster.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from specrl.clock import Clock, WallClock
from specrl.models.config import TargetConfig
from specrl.models.embedded.corpus import library_files, library_root
from specrl.models.rope import RopeConfig

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, MLP, THETA, EPS = 512, 192, 16, 6, 2, 512, 10000.0, 1e-6
HEAD = WIDTH // HEADS
POSITIONS = 1024
CONFIG = TargetConfig("llama", VOCAB, WIDTH, MLP, LAYERS, HEADS, KV_HEADS, HEAD, EPS, RopeConfig(THETA), POSITIONS)
EOS = "<eos>"  # before every file; the only special token

Weights = dict[str, Tensor]
Loss = Callable[[Weights, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        minutes: time budget, compilation included; the rate is constant for 60 % of it, then falls to 2 %.
        batch: windows per step.
        lr: peak learning rate of AdamW.
        context: tokens per window, at most 1024.
        init: checkpoint to continue from; None: new weights and a new tokenizer.
    """

    minutes: float = 60.0
    batch: int = 16
    lr: float = 3e-3
    context: int = 256
    init: Path | None = None


def corpus() -> tuple[list[str], list[str], list[str]]:
    """Texts to train on, texts held out (a twentieth of the files), and the names of the latter."""
    root = library_root()
    files = library_files(root)
    random.Random(0).shuffle(files)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    held_out = len(texts) // 20
    return texts[held_out:], texts[:held_out], [path.relative_to(root).as_posix() for path in files[:held_out]]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of 512 tokens: words, single digits, and newlines with the indentation that follows."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\n *| ?[A-Za-z]+|[0-9]| +|[^\sA-Za-z0-9]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts in a row, EOS before each: [N] int64."""
    eos = tokenizer.token_to_id(EOS)
    parts = [np.array([eos, *encoding.ids], dtype=np.int64) for encoding in tokenizer.encode_batch(texts)]
    return torch.from_numpy(np.concatenate(parts))


def new_weights() -> Weights:
    """Random weights under Hugging Face's names, float32; what writes to the residual stream starts smaller."""
    generator = torch.Generator().manual_seed(0)
    deep = 0.02 / math.sqrt(2 * LAYERS)
    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, generator=generator) * 0.02}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, rows, columns, std in (
            ("self_attn.q_proj", HEADS * HEAD, WIDTH, 0.02),
            ("self_attn.k_proj", KV_HEADS * HEAD, WIDTH, 0.02),
            ("self_attn.v_proj", KV_HEADS * HEAD, WIDTH, 0.02),
            ("self_attn.o_proj", WIDTH, HEADS * HEAD, deep),
            ("mlp.gate_proj", MLP, WIDTH, 0.02),
            ("mlp.up_proj", MLP, WIDTH, 0.02),
            ("mlp.down_proj", WIDTH, MLP, deep),
        ):
            weights[f"{at}{name}.weight"] = torch.randn(rows, columns, generator=generator) * std
        weights[f"{at}input_layernorm.weight"] = torch.ones(WIDTH)
        weights[f"{at}post_attention_layernorm.weight"] = torch.ones(WIDTH)
    weights["model.norm.weight"] = torch.ones(WIDTH)
    weights["lm_head.weight"] = torch.randn(VOCAB, WIDTH, generator=generator) * 0.02
    return weights


def rotary(context: int, c: TargetConfig = CONFIG) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, [context, D] float32 each."""
    inverse = 1.0 / c.rope.theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    angle = torch.outer(torch.arange(context).float(), inverse)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def logits(weights: Weights, ids: Tensor, cos: Tensor, sin: Tensor, c: TargetConfig = CONFIG) -> Tensor:
    """The model, a Llama: [B, T] int64 -> [B, T, V] in the weights' dtype, or in autocast's."""
    batch, length = ids.shape
    dtype = weights["model.norm.weight"].dtype
    cos, sin = cos[:length].to(dtype), sin[:length].to(dtype)

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
        k, v = rope(k).repeat_interleave(c.group, 1), v.repeat_interleave(c.group, 1)
        a = F.scaled_dot_product_attention(rope(q), k, v, is_causal=True)
        x = x + F.linear(a.transpose(1, 2).reshape(batch, length, -1), weights[at + "self_attn.o_proj.weight"])
        h = norm(x, at + "post_attention_layernorm.weight")
        up = F.silu(F.linear(h, weights[at + "mlp.gate_proj.weight"])) * F.linear(h, weights[at + "mlp.up_proj.weight"])
        x = x + F.linear(up, weights[at + "mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), weights["lm_head.weight"])


def save(out: Path, weights: Weights, tokenizer: Tokenizer, c: TargetConfig = CONFIG) -> None:
    """Write the checkpoint as Hugging Face reads it."""
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


def learning_rate_scale(step: int, progress: float) -> float:
    """Warm-up over 100 steps; constant until 60 % of the time is gone; then linearly down to 2 %."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.6 else max(0.02, (1.0 - progress) / 0.4))


def train(
    recipe: Recipe, master: Weights, text: Tensor, loss_of: Loss, clock: Clock, report: Callable[..., None]
) -> None:
    """Train `master` (float32, in place) through bfloat16 copies until the time is gone.

    `report(minutes, step, loss, master, average)` is called after a minute, every five, and at the end; `average`
    is the exponential moving average of the weights.
    """
    work = {name: weight.bfloat16().requires_grad_() for name, weight in master.items()}
    average = {name: weight.clone() for name, weight in master.items()}
    matrices = [weight for weight in master.values() if weight.ndim == 2]
    vectors = [weight for weight in master.values() if weight.ndim == 1]
    for weight in master.values():
        weight.requires_grad_()
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)

    generator = torch.Generator().manual_seed(1)
    began, budget_s, step, next_report_s = clock.now(), recipe.minutes * 60, 0, 60.0
    while (elapsed_s := clock.now() - began) < budget_s:
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * learning_rate_scale(step, elapsed_s / budget_s)
        starts = torch.randint(0, len(text) - recipe.context - 1, (recipe.batch,), generator=generator).tolist()
        loss = loss_of(work, torch.stack([text[i : i + recipe.context + 1] for i in starts]))
        loss.backward()
        with torch.no_grad():
            for name in master:
                grad = work[name].grad
                assert grad is not None, f"{name} takes no part in the loss"
                master[name].grad, work[name].grad = grad.float(), None
            torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
            optimizer.step()
            for name in master:
                work[name].copy_(master[name])
                average[name].lerp_(master[name].detach(), 0.01 if step > 100 else 1.0)
        step += 1
        if elapsed_s > next_report_s or clock.now() - began >= budget_s:
            next_report_s = elapsed_s + 300.0
            report(elapsed_s / 60, step, loss.item(), master, average)


def pretrain(out: Path, recipe: Recipe, clock: Clock) -> None:
    """Make the checkpoint in `out`: the better of the weights and their average, at every report anew.

    Raises:
        ValueError: `context` is longer than the positions the checkpoint declares.
    """
    if not 1 <= recipe.context <= POSITIONS:
        raise ValueError(f"context must be in [1, {POSITIONS}], but got {recipe.context}")
    out.mkdir(parents=True, exist_ok=True)
    train_texts, held_out_texts, held_out_files = corpus()
    (out / "held_out.txt").write_text("\n".join(held_out_files) + "\n")
    init = recipe.init
    tokenizer = Tokenizer.from_file(str(init / "tokenizer.json")) if init else train_tokenizer(train_texts)
    text, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    bytes_per_token = sum(len(t.encode()) for t in held_out_texts) / len(held_out)
    print(f"{len(text)} training tokens, {bytes_per_token:.2f} bytes per token", flush=True)

    cos, sin = rotary(recipe.context)

    def plain_loss(weights: Weights, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits(weights, ids[:, :-1], cos, sin).float().flatten(0, 1), ids[:, 1:].flatten())

    loss_of: Loss = torch.compile(plain_loss)
    last = len(held_out) - recipe.context - 1
    windows = torch.stack([held_out[i : i + recipe.context + 1] for i in range(0, last, last // 64)][:64])

    @torch.no_grad()
    def evaluate(weights: Weights) -> float:
        half = {name: weight.bfloat16() for name, weight in weights.items()}
        return float(torch.stack([loss_of(half, part) for part in windows.split(16)]).mean())

    history = []

    def report(minutes: float, step: int, loss: float, master: Weights, average: Weights) -> None:
        now, smooth = evaluate(master), evaluate(average)
        row = {
            "minutes": round(minutes, 1),
            "step": step,
            "tokens": step * recipe.batch * recipe.context,
            "train": round(loss, 3),
            "held_out": round(now, 4),
            "held_out_average": round(smooth, 4),
            "bits_per_byte": round(min(now, smooth) / math.log(2) / bytes_per_token, 4),
        }
        history.append(row)
        print(json.dumps(row), flush=True)
        save(out, master if now < smooth else average, tokenizer)
        (out / "log.json").write_text(json.dumps(history, indent=1) + "\n")

    master = {name: w.float() for name, w in load_file(init / "model.safetensors").items()} if init else new_weights()
    train(recipe, master, text, loss_of, clock, report)


def main() -> None:
    """Read the command line and pretrain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write the checkpoint to")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes, help="time budget")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="windows per step")
    parser.add_argument("--lr", type=float, default=Recipe.lr, help="peak learning rate")
    parser.add_argument("--context", type=int, default=Recipe.context, help="tokens per window")
    parser.add_argument("--init", type=Path, help="continue from this checkpoint")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    pretrain(args.pop("out"), Recipe(**args), WallClock())


if __name__ == "__main__":
    main()
