"""EAGLE3 drafts as others published them: their shape, recipe and plan, each figure with where it stands.

What no source states is unknown, and is read from the target's own configuration or given by hand, never guessed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving
from specrl.models.checkpoint import expected_draft_tensors
from specrl.models.config import DraftConfig, default_taps
from specrl.models.rope import RopeConfig

_FOLDER = Path(__file__).parent / "preset_data"
_SHAPE = "vocab_size draft_vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"
SHAPE = tuple(_SHAPE.split())  # what the tensors' shapes follow from
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_DTYPES = {torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}  # safetensors' names


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and where it stands; both None: no source states it."""

    value: Any = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """A published draft.

    Attributes:
        name: of the preset.
        target: what it drafts for, in words.
        published: the draft's own name; None: only its configuration is public.
        draft: figures by their names in config.json, and 'taps': layers whose INPUT is read, as SGLang's defaults are
            counted (explicit ids are one less).
        recipe: how it was trained.
        plan: that it is served with, as num_steps/topk/num_draft_tokens.
        note: on the plan.
        accept_length: as published, under that plan.
        parameters: as published.
        difference: why ours may count others.
        profile: of `specrl bench --engine simulated`; None: no table was published.
    """

    name: str
    target: str
    published: str | None
    draft: Mapping[str, Figure]
    recipe: Mapping[str, Figure]
    plan: Figure
    note: str | None
    accept_length: Figure
    parameters: Figure
    difference: str | None
    profile: str | None

    @property
    def unknown(self) -> tuple[str, ...]:
        """Figures of the draft that are not known."""
        return tuple(key for key, figure in self.draft.items() if figure.value is None)


def preset_names() -> tuple[str, ...]:
    """Of the presets inside the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none.
    """
    names = preset_names()
    if name not in names:
        close = get_close_matches(name.lower(), names, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"a preset must be one of {', '.join(names)}, but got {name!r}{meant}")
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))

    def figure(said: Mapping[str, Any]) -> Figure:
        source = said["source"]
        return Figure(said["value"], None if source is None else found["sources"][source])

    return Preset(
        name=name,
        target=found["target"],
        published=found["published"],
        draft={key: figure(said) for key, said in found["draft"].items()},
        recipe={key: figure(said) for key, said in found["recipe"].items()},
        plan=figure(found["plan"]),
        note=found["plan"].get("note"),
        accept_length=figure(found["accept_length"]),
        parameters=figure(found["parameters"]),
        difference=found["parameters"]["difference"],
        profile=found["profile"],
    )


def complete(preset: Preset, target: Path | None, *, draft_vocab_size: int | None = None) -> Preset:
    """Fill what is unknown from the target's config.json; `draft_vocab_size` no target states, so it is given.

    Raises:
        ValueError: the directory holds no config.json, or one that contradicts the preset: another target.
    """
    draft = dict(preset.draft)
    if draft_vocab_size is not None:
        known = draft["draft_vocab_size"].value
        if known not in (None, draft_vocab_size):
            raise ValueError(f"{preset.name}'s draft_vocab_size is {known}, but got {draft_vocab_size}; leave it out")
        draft["draft_vocab_size"] = Figure(draft_vocab_size, "given")
    if target is not None:
        path = Path(target) / "config.json"
        if not path.is_file():
            raise ValueError(f"a target must be a directory with config.json, but {str(target)!r} has none")
        for key, value in _stated(json.loads(path.read_text(encoding="utf-8")), preset).items():
            known = draft.get(key, Figure()).value
            if known is None:
                draft[key] = Figure(value, f"the target's {path}")
            elif key in ("vocab_size", "hidden_size") and known != value:
                raise ValueError(
                    f"{preset.name}'s target must have {key} {known}, but {path} says {value}; name another"
                )
    return replace(preset, draft=draft)


def _stated(config: Mapping[str, Any], preset: Preset) -> dict[str, Any]:
    """What a target's configuration says of the draft's figures; the taps are SGLang's defaults for its layers."""
    keys = [key for key in preset.draft if key not in ("draft_vocab_size", "taps", "rope_theta")]
    out = {key: config[key] for key in keys if config.get(key) is not None}
    heads = config.get("num_attention_heads")
    if heads and config.get("hidden_size"):
        out.setdefault("head_dim", config["hidden_size"] // heads)
        out.setdefault("num_key_value_heads", heads)
    if preset.draft["rope_theta"].value is None:  # rope is taken whole or not at all
        out |= {key: config[key] for key in _ROPE if config.get(key) is not None}
        parameters = config.get("rope_parameters") or {}
        if "rope_theta" in parameters:
            out.setdefault("rope_theta", parameters["rope_theta"])
    if config.get("num_hidden_layers"):
        out["taps"] = list(default_taps(config["num_hidden_layers"]))
    return out


def meta_tensors(preset: Preset) -> dict[str, Tensor]:
    """The draft's tensors on torch's meta device, weights in bfloat16: names, shapes and dtypes, no memory.

    Raises:
        ValueError: a figure that shapes follow from is not known.
    """
    missing = [key for key in SHAPE if preset.draft[key].value is None]
    if missing:
        raise ValueError(
            f"{preset.name} cannot be built: no source states {', '.join(missing)}; name its target's directory"
            + (" and draft_vocab_size" if "draft_vocab_size" in missing else "")
        )
    size = {key: int(preset.draft[key].value) for key in SHAPE}
    shape = DraftConfig(
        size["vocab_size"], size["draft_vocab_size"], size["hidden_size"], size["hidden_size"],
        size["intermediate_size"], size["num_attention_heads"], size["num_key_value_heads"], size["head_dim"],
        rms_norm_eps=1e-6, rope=RopeConfig(1e4), max_position_embeddings=1, taps=(1, 2, 3),  # of these no shape follows
    )  # fmt: skip
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    return {
        name: torch.empty(sizes, dtype=kinds.get(name, torch.bfloat16), device="meta")
        for name, sizes in expected_draft_tensors(shape).items()
    }


def count(tensors: Mapping[str, Tensor]) -> int:
    """Parameters: numbers that are learnt, so without the vocabulary's maps."""
    return sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())


def checkpoint_header(tensors: Mapping[str, Tensor]) -> bytes:
    """The header of a safetensors file with these tensors: its length as 8 bytes, then JSON; the data would follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draft_config(preset: Preset) -> dict[str, Any]:
    """config.json as SGLang and `specrl.models.config.read_draft_config` read it.

    Raises:
        ValueError: a figure is not known.
    """
    if preset.unknown:
        raise ValueError(f"{preset.name}'s config.json needs {', '.join(preset.unknown)}, which no source states")
    values = {key: figure.value for key, figure in preset.draft.items()}
    taps = values.pop("taps")
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **values,
        "target_hidden_size": values["hidden_size"],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps]},
    }


def launch_command(preset: Preset, target: str = "TARGET", draft: str = "DRAFT") -> str:
    """The command that serves the draft with SGLang, its plan checked: a chain verifies num_steps + 1 tokens."""
    flags = Serving(None, Plan.parse(preset.plan.value)).flags(target)
    flags |= {"speculative-draft-model-path": draft, "dtype": "bfloat16"}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", shlex.quote(str(value)))]
    return " ".join(["python -m sglang.launch_server", *words, "--trust-remote-code"])
