"""A target, a workload and what an engine does with them, small enough for many processes on two cores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretraining import config_json
from safetensors.torch import save_file
from tiny import AUX_LAYERS, CONFIG, Drawn, target_tensors

from specrl.agents.draft.learner import LearnerConfig
from specrl.cluster.engine import EngineSettings
from specrl.config import TargetConfig
from specrl.models.draft import Draft, new_draft
from specrl.models.target import load_target
from specrl.training.config import ServingConfig

LEARNER = LearnerConfig(dtype="float32", batch_size=8, ttt_steps=2, updates_per_request=0.5, learning_rate=1e-2)


def write_target(directory: Path) -> str:
    """A checkpoint of the tiny target."""
    directory.mkdir()
    save_file(target_tensors(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_json(CONFIG, "float32")))
    return str(directory)


def small_draft(target: str) -> Draft:
    return new_draft(load_target(target), intermediate_size=32, aux_layers=AUX_LAYERS)


def partly_private() -> Drawn:
    return Drawn(never=2)


def small(target: str, **changes: Any) -> EngineSettings:
    serving = ServingConfig(plans="0,3/1/4", chooser="3/1/4", batch_schedule="8", weight_sync_interval=8)
    common: dict[str, Any] = {"workload": partly_private, "serving": serving, "learner": LEARNER, "max_context": 32}
    return EngineSettings(TargetConfig(target), **{**common, **changes})
