"""EAGLE3 drafts that others published: shape, training recipe and plan, each figure with its source."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from specrl.core.checks import require_known
from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving, flag_words
from specrl.models.checkpoint import expected_draft_tensors
from specrl.models.config import DraftArchitecture
from specrl.models.rope import RopeConfig

_FOLDER = Path(__file__).parent / "preset_data"
_SHAPE = "vocab_size draft_vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim"


class Figure(NamedTuple):
    """A value and its source; both are None if no source states it."""

    value: Any = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """A published draft. It reads the inputs of the layers 'taps'; explicit ids in config.json are one less."""

    name: str
    about: Mapping[str, str | None]  # target, published (its own name), profile (of the simulation), plan, parameters
    draft: Mapping[str, Figure]  # by their names in config.json, and 'taps'
    recipe: Mapping[str, Figure]  # how it was trained
    results: Mapping[str, Figure]  # the plan that it is served with, accept length and number of parameters

    def launch_command(self, target: str = "TARGET", draft: str = "DRAFT") -> str:
        """Return the command that serves the draft with SGLang."""
        flags = Serving(None, Plan.parse(self.results["plan"].value)).flags(target)
        flags |= {"speculative-draft-model-path": draft, "dtype": "bfloat16", "trust-remote-code": True}
        return shlex.join(["python", "-m", "sglang.launch_server", *flag_words(flags)])

    def count_parameters(self) -> int | None:
        """Return the number of parameters of a draft of this shape; None: its shape is not fully known."""
        vocab, draft_vocab, hidden, *rest = (self.draft[key].value for key in _SHAPE.split())
        if None in (vocab, draft_vocab, hidden, *rest):
            return None
        sizes: list[Any] = [vocab, draft_vocab, hidden, hidden, *rest, 1e-6, RopeConfig(1e4), 1, (1, 2, 3)]
        tensors = expected_draft_tensors(DraftArchitecture(*sizes))
        return sum(prod(shape) for name, shape in tensors.items() if name not in ("d2t", "t2d"))


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets in the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_preset(name: str) -> Preset:
    """Return a preset; raise a ValueError if there is none of this name."""
    require_known("name", name, preset_names())
    content: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))

    def figures(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        return {key: Figure(entry["value"], content["sources"].get(entry["source"])) for key, entry in entries.items()}

    about = {key: content[key] for key in ("target", "published", "profile")}
    about |= {"plan": content["plan"].get("note"), "parameters": content["parameters"]["difference"]}
    results = figures({key: content[key] for key in ("plan", "accept_length", "parameters")})
    return Preset(name, about, figures(content["draft"]), figures(content["recipe"]), results)
