"""Reading what a training run left: its draft, its plans, its chooser and its configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.core.plan import Plan, parse_plans
from specrl.export.bundle import PLANS, read_plans
from specrl.export.serving_flags import Speeds
from specrl.models.draft import Draft, load_draft

_QUICKSTART = {"target": "embedded", "temperature": 0.7}  # `specrl quickstart` has no options for these


@dataclass(frozen=True, slots=True)
class LearnedRun:
    """The result of a training run.

    Attributes:
        target: name of the target.
        temperature: of the requests.
        draft: the learned draft.
        table: the learned plan per batch size.
        chooser: as the last checkpoint left it; None: a fixed plan, or no checkpoint.
    """

    target: str
    temperature: float
    draft: Draft
    table: dict[int, Plan]
    chooser: AdaptiveChooser | None

    @classmethod
    def read(cls, run: Path) -> LearnedRun:
        """Read the output directory of `specrl train` or `specrl quickstart`.

        Raises:
            ValueError: no draft or plans in it, a damaged file, or a configuration of an older version.
        """
        table, draft = read_plans(run / PLANS), load_draft(run / "draft")
        config = _read_config(run / "config.yaml")
        plans = config.get("serving", {}).get("plans")
        return cls(
            config.get("target", {}).get("name", _QUICKSTART["target"]),
            float(config.get("workload", {}).get("temperature", _QUICKSTART["temperature"])),
            draft,
            dict(table),
            None if plans is None else _read_chooser(run / "checkpoint" / "state.json", parse_plans(plans)),
        )

    @property
    def plans(self) -> tuple[Plan, ...]:
        """All plans that may serve."""
        return self.chooser.plans if self.chooser is not None else tuple(dict.fromkeys(self.table.values()))

    def speeds(self) -> Speeds | None:
        """Tokens per second and request of every plan that was tried, by batch size; None: no estimates."""
        if self.chooser is None:
            return None
        estimates = {batch: self.chooser.estimates(batch) for batch in self.table}
        return {batch: {e.plan: e.speed for e in found if e.tried >= 2.0} for batch, found in estimates.items()}


def _read_config(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} must be YAML, but is not: {' '.join(str(error).split())}") from error
    if isinstance(found.get("target"), str):
        raise ValueError(
            f"target in {str(path)!r} must be a group of options, but is {found['target']!r}, as in an older version; "
            "export the run with that version, or write its options as 'specrl train --print_config' does"
        )
    return dict(found)


def _read_chooser(path: Path, plans: tuple[Plan, ...]) -> AdaptiveChooser | None:
    if not path.is_file():
        return None
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))["chooser"]
        if "survival" not in state:  # a fixed plan
            return None
        chooser = AdaptiveChooser(plans)
        chooser.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} must be a checkpoint that this version wrote, but got {error!r}") from error
    return chooser
