"""Reads published EAGLE3 drafts to start from; every change is reported.

Known layouts: `midlayer.*` (the EAGLE-3 authors', SGLang's) and `layers.0.*` (vLLM's, SpecForge's later ones), with or
without a leading `model.`; with the target's embedding; vocabulary maps as offsets or as ids, or one of the two only.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrl.core.checks import require
from specrl.models.checkpoint import read_tensors
from specrl.models.config import default_aux_layers
from specrl.models.draft import Draft
from specrl.models.hf_config import read_draft_config

_ARCHITECTURE = "LlamaForCausalLMEagle3"
_OTHER_NAMES = ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle", "LlamaModel")
_DROPPED = {  # tensors by the end of their name
    "embed_tokens.weight": "the target's own serves",
    "rotary_emb.inv_freq": "it follows from the configuration",
}
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"


def import_draft(directory: Path, *, num_layers: int | None = None) -> tuple[Draft, list[str]]:
    """Read a published EAGLE3 draft (config.json and safetensors) from a directory.

    `num_layers` is the number of its target's layers; it is needed if the draft does not name its aux layers.

    Returns:
        The draft, and a note for every difference from SGLang's layout.

    Raises:
        ValueError: a variant that would compute something else, by name.
    """
    notes: list[str] = []
    tensors = _rename(read_tensors(directory), notes)
    config = _config(directory / "config.json", tensors, num_layers, notes)
    _make_offsets(tensors, config, notes)
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    if kinds != ["float32"]:
        notes.append(f"weights are {', '.join(kinds)}: learned on in float32")
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return Draft(read_draft_config(temporary), tensors), notes


def _rename(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors that a draft needs, by SGLang's names."""
    needed: dict[str, Tensor] = {}
    renamed = []
    for name, tensor in tensors.items():
        short = re.sub(r"^layers\.0\.", "midlayer.", name.removeprefix("model."))
        if reason := next((reason for end, reason in _DROPPED.items() if short.endswith(end)), None):
            notes.append(f"{name} is dropped: {reason}")
            continue
        if short in needed:
            raise ValueError(f"a draft must hold each tensor once, but {short} is there twice, once as {name}")
        needed[short] = tensor
        if short != name:
            renamed.append(name)
    if renamed:
        notes.append(f"{len(renamed)} tensors are renamed to SGLang's names, {min(renamed)} among them")
    return needed


def _config(path: Path, tensors: dict[str, Tensor], num_layers: int | None, notes: list[str]) -> dict[str, Any]:
    """Return the configuration with all entries that SGLang needs."""
    if not path.is_file():
        raise ValueError(f"a draft must hold config.json, but {str(path.parent)!r} does not; download it again")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = config.get("architectures") or [_ARCHITECTURE]
    if names != [_ARCHITECTURE]:
        known = len(names) == 1 and names[0] in _OTHER_NAMES
        require(known, "a draft's architecture", f"one of {', '.join((_ARCHITECTURE, *_OTHER_NAMES))}", names)
        notes.append(f"architecture {names[0]} is read as {_ARCHITECTURE}")
    config["architectures"] = [_ARCHITECTURE]
    if config.get("draft_vocab_size") is None and "lm_head.weight" in tensors:
        config["draft_vocab_size"] = size = len(tensors["lm_head.weight"])
        notes.append(f"draft_vocab_size is not in config.json: {size}, by lm_head.weight")
    if config.get("target_hidden_size") is None and "fc.weight" in tensors:
        config["target_hidden_size"] = size = tensors["fc.weight"].shape[1] // 3
        if size != config.get("hidden_size"):
            notes.append(f"target_hidden_size is not in config.json: {size}, by fc.weight")
    eagle = dict(config.get("eagle_config") or {})
    if config.get(_AUX_LAYERS) is not None:  # SGLang does not read it there
        eagle.setdefault(_AUX_LAYERS, config.pop(_AUX_LAYERS))
        notes.append(f"{_AUX_LAYERS} was outside eagle_config")
    if eagle.get(_AUX_LAYERS) is None:
        if num_layers is None:
            raise ValueError(f"the draft must have {_AUX_LAYERS}, but does not; set num_layers to its target's layers")
        eagle[_AUX_LAYERS] = [layer - 1 for layer in default_aux_layers(num_layers)]
        notes.append(f"aux layers are not named: SGLang's defaults for {num_layers} layers, {eagle[_AUX_LAYERS]}")
    config["eagle_config"] = eagle
    return config


def _make_offsets(tensors: dict[str, Tensor], config: dict[str, Any], notes: list[str]) -> None:
    """Replace the vocabulary maps by d2t as offsets."""
    size = int(config["draft_vocab_size"])
    if size == int(config["vocab_size"]):
        for name in {"d2t", "t2d"} & set(tensors):
            del tensors[name]
            notes.append(f"{name} is dropped: the draft's vocabulary is the target's")
        return
    if "t2d" in tensors and tensors["t2d"].dtype != torch.bool:
        notes.append(f"t2d is {tensors['t2d'].dtype}: read as truth values")
        tensors["t2d"] = tensors["t2d"] != 0
    ids = tensors["t2d"].nonzero().flatten() if "t2d" in tensors else None  # [Vd] int64 target ids
    if "d2t" not in tensors:
        if ids is None or len(ids) != size:
            raise ValueError(f"a draft of {size} tokens must hold d2t, or t2d with {size} tokens, but holds neither")
        tensors["d2t"] = ids - torch.arange(size)
        notes.append("d2t is missing: computed from t2d")
        return
    d2t = tensors["d2t"].to(torch.int64)
    tensors["d2t"], index = d2t, torch.arange(len(d2t))
    if ids is not None and not torch.equal((d2t + index).sort().values, ids):
        if not torch.equal(d2t.sort().values, ids):
            raise ValueError("d2t and t2d must name the same tokens, but do not, neither as offsets nor as ids")
        tensors["d2t"] = d2t - index
        notes.append("d2t holds ids: converted to offsets, which SGLang reads")
