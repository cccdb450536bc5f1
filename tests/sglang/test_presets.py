"""SGLang's own class takes the presets' checkpoints by name and shape; nothing of them is ever in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specrl.export.presets import complete, draft_config, load_preset, meta_tensors, preset_names

STATED = {"vocab_size", "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size"}
TARGET = {  # what no source states, as some target might have it
    "num_hidden_layers": 62,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "vocab_size": 200064,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
}


@pytest.mark.parametrize("name", preset_names())
def test_sglang_takes_every_tensor_of_a_preset(name: str, tmp_path: Path, sglang_runtime: None) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3

    preset = load_preset(name)
    known = {key: preset.draft[key].value for key in STATED if preset.draft[key].value is not None}
    (tmp_path / "target").mkdir()
    (tmp_path / "target/config.json").write_text(json.dumps(TARGET | known))
    unknown = preset.draft["draft_vocab_size"].value is None
    preset = complete(preset, tmp_path / "target", draft_vocab_size=32000 if unknown else None)
    (tmp_path / "config.json").write_text(json.dumps(draft_config(preset)))
    config = ModelConfig(str(tmp_path), dtype="bfloat16", is_draft_model=True)
    bootstrap.init_layer_runtime(model_config=config)
    taken: dict[str, int] = {}  # SGLang's parameter -> numbers that came in
    with torch.device("meta"):
        model = LlamaForCausalLMEagle3(config.hf_config)
        for weight_name, weight in model.named_parameters():
            weight.weight_loader = _counting(getattr(weight, "weight_loader", None), weight_name, taken)
        tensors = meta_tensors(preset)
        model.load_weights(tensors.items())  # copies on meta: a wrong shape is refused
    theirs = {n: w.numel() for n, w in model.named_parameters() if n != "model.embed_tokens.weight"}
    assert taken == theirs
    assert (model.hot_token_id is None) == ("d2t" not in tensors)
    assert config.hf_config.eagle_config["eagle_aux_hidden_state_layer_ids"] == [1, 30, 58]


def _counting(loader: Any, name: str, taken: dict[str, int]) -> Any:
    def load(parameter: torch.nn.Parameter, weight: torch.Tensor, *shard: object) -> None:
        taken[name] = taken.get(name, 0) + weight.numel()
        if loader is None:
            assert parameter.shape == weight.shape, name
        else:
            loader(parameter, weight, *shard)

    return load
