"""Tokens per second and peak memory of the learner's update, against a plain one written out below.

    python benchmarks/learner_speed.py [--shape embedded|real] [--dtype auto] [--length T] [--pairs N]

Both make the same update (forward KL, AdamW, clipping, running average) of one batch from the same weights. The plain
one unrolls with whole attention matrices, holds the logits of all passes, and differentiates everything at once.
Shapes: 'embedded' is the quickstart's (4 sequences of 192 tokens), 'real' a draft of hidden size 2048 with 16 heads of
128, 4 of keys and values, an MLP of 8192 and 32,000 words (the draft of Qwen3-Coder-Next by SpecForge's
configuration, for a target with those words alone, so that nothing is counted for cutting the target's distribution
down).

Speed: each runs in turns (ABBA) in a process of both; tokens are those of the batch, not of its passes; the ratio is
the geometric mean over pairs with a 95 % interval. Memory: each alone in a process; the peak of the resident set in an
update beyond what is resident before it (weights, optimiser, the batch), and the whole peak. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner, product_dtype
from specrl.agents.draft.objective import collate
from specrl.agents.draft.sequences import TrainingSequence
from specrl.core.clock import WallClock
from specrl.core.statistics import abba, paired_speedup
from specrl.measure.machine import keep_large_blocks
from specrl.models.checkpoint import expected_draft_tensors
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft
from specrl.models.layer import interleave
from specrl.models.rope import RopeConfig, rope_table

EMBEDDED = DraftArchitecture(512, 512, 192, 192, 256, 6, 2, 32, 1e-6, RopeConfig(10000.0), 4096, (2, 8, 13))
REAL = DraftArchitecture(32000, 32000, 2048, 2048, 8192, 16, 4, 128, 1e-6, RopeConfig(1e6), 16384, (2, 24, 45))
SHAPES = {"embedded": (EMBEDDED, 4, 192), "real": (REAL, 1, 2048)}


class PlainLearner:
    """The update written out: what `OnlineLearner.update` is measured against."""

    def __init__(self, draft: Draft, embedding: Tensor, config: LearnerConfig) -> None:
        self.config, self.shape, self.embedding = config, draft.config, embedding
        self.parameters = {name: t.clone().requires_grad_() for name, t in draft.tensors.items()}
        self.served = {name: t.detach().clone() for name, t in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, betas=config.betas, weight_decay=0.0, fused=True
        )
        c = self.shape
        self.rotation = rope_table(c.rope, c.head_dim, c.max_position_embeddings)

    def update(self, sequences: list[TrainingSequence]) -> dict[str, float]:
        """One step."""
        c = self.config
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(sequences)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), c.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            for name, served in self.served.items():
                served.lerp_(self.parameters[name], 1.0 - c.ema_decay)
        return {"loss": loss.item(), "gradient_norm": float(norm)}

    def loss(self, sequences: list[TrainingSequence]) -> Tensor:
        """All passes at once."""
        c = self.config
        batch = collate(sequences, [1.0] * len(sequences), None)
        logits = torch.nn.utils.rnn.pad_sequence([s.logits for s in sequences], batch_first=True)
        p = torch.softmax(logits[:, 1:].float(), -1)
        bfloat16 = product_dtype(c.dtype) == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            passes = plain_unroll(
                self.parameters,
                self.shape,
                self.embedding[batch.tokens],
                batch.features.float(),
                self.rotation,
                c.ttt_steps,
            )
        loss = torch.zeros(())
        for k, drafted in enumerate(passes):
            here = batch.inside.clone()
            here[:, :k] = False
            cross = -(p * torch.log_softmax(drafted.float(), -1)).sum(-1)
            loss = loss + c.ttt_decay**k * cross[here].mean()
        return loss


def plain_unroll(
    w: Mapping[str, Tensor], c: DraftArchitecture, embeddings: Tensor, features: Tensor, rotation: Tensor, passes: int
) -> list[Tensor]:
    """[B, T, Vd] logits of every pass (see `specrl.agents.draft.unroll`)."""
    batch, length, _ = embeddings.shape
    group, at = c.num_heads // c.num_kv_heads, "midlayer.self_attn."
    slots = torch.arange(length)
    state, logits, past = F.linear(features, w["fc.weight"]), [], []
    turn = rotation[:length, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), w[name].to(x.dtype), c.rms_norm_eps)

    def heads(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
        x = F.linear(x, weight).view(batch, length, -1, c.head_dim)
        if turned:
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
        return x.transpose(1, 2)  # [B, heads, T, D]

    for k in range(passes):
        if k:
            state = F.pad(state[:, :-1], (0, 0, 1, 0))
        normed = norm(embeddings, "midlayer.input_layernorm.weight")
        x = torch.cat([normed, norm(state, "midlayer.hidden_norm.weight").to(normed.dtype)], -1)
        queries = heads(x, interleave(w[f"{at}q_proj.weight"], c.head_dim), True)
        keys = heads(x, interleave(w[f"{at}k_proj.weight"], c.head_dim), True)
        values = heads(x, w[f"{at}v_proj.weight"], False)
        past.append((keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)))
        scores = queries @ past[0][0].transpose(-1, -2) * c.head_dim**-0.5  # [B, heads, T, T]
        parts, later = [scores.masked_fill(slots > slots[:, None] - k, float("-inf"))], []
        for j in range(1, k + 1):
            key, value = (F.pad(y, (0, 0, k - j, 0))[:, :, :length] for y in past[j])
            parts.append((queries * key).sum(-1, keepdim=True) * c.head_dim**-0.5)
            later.append(value)
        weights = torch.softmax(torch.cat(parts, -1), -1)
        attended = weights[..., :length] @ past[0][1]
        for j, value in enumerate(later):
            attended = attended + weights[..., length + j, None] * value
        state = state + F.linear(attended.transpose(1, 2).flatten(2), w[f"{at}o_proj.weight"])
        normed = norm(state, "midlayer.post_attention_layernorm.weight")
        gate = F.silu(F.linear(normed, w["midlayer.mlp.gate_proj.weight"]))
        up = F.linear(normed, w["midlayer.mlp.up_proj.weight"])
        state = state + F.linear(gate * up, w["midlayer.mlp.down_proj.weight"])
        logits.append(F.linear(norm(state, "norm.weight"), w["lm_head.weight"]))
    return logits


def made_up(shape: DraftArchitecture, batch: int, length: int) -> tuple[Draft, Tensor, list[TrainingSequence]]:
    """Random weights and sequences: speed and memory do not depend on what they say."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
        for name, size in expected_draft_tensors(shape).items()
    }
    embedding = torch.randn(shape.vocab_size, shape.hidden_size, generator=generator)
    sequences = []
    for _ in range(batch):
        tokens = torch.randint(shape.vocab_size, (length,), generator=generator)
        features = torch.randn(length, 3 * shape.hidden_size, generator=generator).to(torch.bfloat16)
        logits = torch.empty(length, shape.vocab_size, dtype=torch.float16)
        for rows in logits.split(64):
            rows.copy_(torch.randn(rows.shape, generator=generator) * 2)
        sequences.append(TrainingSequence(tokens, features, logits, 1.0, 0))
    return Draft(shape, tensors), embedding, sequences


def resident(field: str) -> int:
    """Bytes: 'VmRSS' resident now, 'VmHWM' at most since the start or the last reset."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def memory_of(kind: str, shape: DraftArchitecture, batch: int, length: int, config: LearnerConfig) -> dict[str, float]:
    """GiB of an update: beyond what is resident before it, and in all."""
    draft, embedding, sequences = made_up(shape, batch, length)
    learner = (PlainLearner if kind == "plain" else OnlineLearner)(draft, embedding, config)
    del draft
    learner.update(sequences)  # makes the optimiser's state
    learner.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    trim()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    learner.update(sequences)
    peak = resident("VmHWM")
    return {"step_gib": (peak - before) / 2**30, "whole_gib": peak / 2**30}


def trim() -> None:
    """Give what is free back to the system, so that it is not counted as resident."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="embedded")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--memory", choices=("plain", "fused"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape, batch, length = SHAPES[args.shape]
    batch, length = args.batch or batch, args.length or length
    config = LearnerConfig(dtype=args.dtype, ttt_steps=args.passes)
    if args.memory:
        print(json.dumps(memory_of(args.memory, shape, batch, length, config)))
        return
    call = [sys.executable, __file__, *sys.argv[1:], "--memory"]
    memory = {
        kind: json.loads(subprocess.run([*call, kind], check=True, capture_output=True, text=True).stdout)
        for kind in ("plain", "fused")
    }
    keep_large_blocks()
    draft, embedding, sequences = made_up(shape, batch, length)
    learners = {"A": PlainLearner(draft, embedding, config), "B": OnlineLearner(draft, embedding, config)}
    pairs, clock = args.pairs or (40 if args.shape == "embedded" else 4), WallClock()
    seconds: dict[str, list[float]] = {"A": [], "B": []}
    losses = [learners[kind].update(sequences)["loss"] for kind in "AB"]  # warm
    for kind in abba(pairs):
        began = clock.now()
        learners[kind].update(sequences)
        seconds[kind].append(clock.now() - began)
    ratio = paired_speedup(seconds["A"], seconds["B"], rng=np.random.default_rng(0))
    tokens = batch * length
    speed = {kind: tokens / float(np.median(seconds[kind])) for kind in "AB"}
    less = memory["fused"]["step_gib"] / memory["plain"]["step_gib"]
    print(
        f"{args.shape}, {batch} x {length} tokens, {args.passes} passes, {product_dtype(args.dtype)}; losses {losses}"
    )
    print(f"plain  {speed['A']:10.0f} tokens/s, step {memory['plain']['step_gib']:.3f} GiB, {memory['plain']}")
    print(f"fused  {speed['B']:10.0f} tokens/s, step {memory['fused']['step_gib']:.3f} GiB, {memory['fused']}")
    print(f"speed x {ratio}, memory x {less:.3f}")
    result = {"shape": args.shape, "batch": batch, "length": length, "passes": args.passes, "speed": speed}
    result["seconds"] = seconds
    print(json.dumps({**result, "ratio": [ratio.value, ratio.low, ratio.high], "memory": memory, "memory_ratio": less}))


if __name__ == "__main__":
    main()
