"""A target, a workload and what an engine does with them, small enough for many processes on two cores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import CONFIG, TAPS, prompts

from specrl.agents.draft_learner import LearnerConfig
from specrl.apps.cluster.serving import Serving
from specrl.engines.base import Request
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.draft import Draft, new_draft
from specrl.models.target import load_target

LEARNER = LearnerConfig(dtype="float32", batch_size=8, passes=2, updates_per_request=0.5, learning_rate=1e-2)


def write_target(directory: Path) -> str:
    """A checkpoint of the tiny target."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_target_tensors(CONFIG).items():
        spread = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.3 * 32**-0.5}.get(name, 0.25)
        tensors[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * spread
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    c = CONFIG
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
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": c.max_position_embeddings,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def small_draft(target: str) -> Draft:
    return new_draft(load_target(target), intermediate_size=32, taps=TAPS)


@dataclass(frozen=True)
class Drawn:
    """Random prompts; every `never`-th is not to be learnt from."""

    never: int = 0

    def requests(self, seed: int) -> Iterator[Request]:
        for i, prompt in enumerate(prompts(20_000, 4, seed=seed)):
            yield Request(prompt, 20, 1.0, ignore_eos=True, learn=not self.never or i % self.never > 0)


def partly_private() -> Drawn:
    return Drawn(never=2)


def small(target: str, **changes: Any) -> Serving:
    common: dict[str, Any] = {
        "target": target,
        "workload": partly_private,
        "plans": "0,3/1/4",
        "chooser": "3/1/4",
        "traffic": "8",
        "max_context": 32,
        "sync_every": 8,
        "in_flight": 2,
        "learner": LEARNER,
        "seed": 0,
    }
    return Serving(**{**common, **changes})
