"""EAGLE3 drafts that others published: shape, training recipe and plan, each figure with its source."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving
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
    """A published draft. Its 'taps' are the layers whose input it reads; explicit ids in config.json are one less."""

    name: str
    about: Mapping[str, str | None]  # target, published (its own name), profile (of the simulation), plan, parameters
    draft: Mapping[str, Figure]  # by their names in config.json, and 'taps'
    recipe: Mapping[str, Figure]  # how it was trained
    results: Mapping[str, Figure]  # the plan that it is served with, accept length and number of parameters

    def launch_command(self, target: str = "TARGET", draft: str = "DRAFT") -> str:
        """The command that serves the draft with SGLang."""
        flags = Serving(None, Plan.parse(self.results["plan"].value)).flags(target)
        flags |= {"speculative-draft-model-path": draft, "dtype": "bfloat16"}
        words = [word for flag, value in flags.items() for word in (f"--{flag}", shlex.quote(str(value)))]
        return " ".join(["python -m sglang.launch_server", *words, "--trust-remote-code"])

    def count_parameters(self) -> int | None:
        """Parameters of a draft of this shape; None: a figure of its shape is not known."""
        vocab, draft_vocab, hidden, *rest = (self.draft[key].value for key in _SHAPE.split())
        if None in (vocab, draft_vocab, hidden, *rest):
            return None
        sizes: list[Any] = [vocab, draft_vocab, hidden, hidden, *rest, 1e-6, RopeConfig(1e4), 1, (1, 2, 3)]
        tensors = expected_draft_tensors(DraftArchitecture(*sizes))
        return sum(prod(shape) for name, shape in tensors.items() if name not in ("d2t", "t2d"))


def preset_names() -> tuple[str, ...]:
    """Names of the presets in the package."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_preset(name: str) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in preset_names():
        raise ValueError(f"name must be one of the presets {', '.join(preset_names())}, but got {name!r}")
    found: dict[str, Any] = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))

    def figures(given: Mapping[str, Mapping[str, Any]]) -> dict[str, Figure]:
        return {key: Figure(said["value"], found["sources"].get(said["source"])) for key, said in given.items()}

    about = {key: found[key] for key in ("target", "published", "profile")}
    about |= {"plan": found["plan"].get("note"), "parameters": found["parameters"]["difference"]}
    results = figures({key: found[key] for key in ("plan", "accept_length", "parameters")})
    return Preset(name, about, figures(found["draft"]), figures(found["recipe"]), results)
