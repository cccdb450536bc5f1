"""Tiny checkpoints with random weights, written by transformers, to compare with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    **{"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
    "tie_word_embeddings": False,
}
HEAD_DIM = 12  # of qwen3, whose heads need not share the hidden size
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
_NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


def hf_config(family: str, **changes: Any) -> Any:
    if family == "qwen3":
        changes = {"head_dim": HEAD_DIM, **changes}
    return getattr(transformers, f"{_NAMES[family]}Config")(**{**SIZES, **changes})


def hf_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Random weights whose every part matters: matrices of spread 0.25, norms in [0.5, 1.5], biases of spread 0.5."""
    model = getattr(transformers, f"{_NAMES[family]}ForCausalLM")(hf_config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and not name.endswith("bias"):
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.25 if weight.ndim == 2 else 0.5))
    return model


def hf_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).logits


def token_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def read_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def write_config(directory: Path, config: Mapping[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def change_config(directory: Path, **changes: Any) -> None:
    write_config(directory, {**read_config(directory), **changes})


def change_tensors(directory: Path, drop: tuple[str, ...] = (), **changes: Tensor) -> None:
    """Rewrite model.safetensors; a dot in a name is spelt as two underscores."""
    path = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file({**tensors, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}, path)
