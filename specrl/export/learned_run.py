"""Reads the results of a training run: its draft, its plans, its chooser and its measurements."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.core.plan import Plan, parse_plans
from specrl.export.bundle import PLANS, Provenance, read_plans
from specrl.export.serving_flags import Speeds
from specrl.io.read import read_mapping, read_rows
from specrl.models.draft import Draft, load_draft
from specrl.sglang.plugin.policy import LearnedPolicy

_MEASURED = ("batch_size", "plan", "speedup", "low", "high", "accept_length")  # columns
_QUICKSTART = {"target": "embedded", "temperature": 0.7}  # `specrl quickstart` has no options for these


@dataclass(frozen=True, slots=True)
class LearnedRun:
    """The result of a training run."""

    source: Provenance
    draft: Draft
    table: dict[int, Plan]  # the learned plan per batch size
    chooser: AdaptiveChooser | None  # from the last checkpoint; None: a fixed plan, or no checkpoint

    @classmethod
    def read(cls, run: Path, *, target: str | None = None) -> LearnedRun:
        """Read the output directory of `specrl train` or `specrl quickstart`; `target` replaces the run's.

        Raises:
            ValueError: no draft or plans in it, a damaged file, or a configuration of an older version.
        """
        table, draft = read_plans(run / PLANS), load_draft(run / "draft")
        text, config = _read_config(run / "config.yaml")
        source = Provenance(
            target or config.get("target", {}).get("name", _QUICKSTART["target"]),
            float(config.get("workload", {}).get("temperature", _QUICKSTART["temperature"])),
            read_mapping(run / PLANS).get("requests"),
            _read_measurements(run),
            read_mapping(run / "environment.json"),
            text,
        )
        plans, chooser = config.get("serving", {}).get("plans"), None
        state = read_mapping(run / "checkpoint" / "state.json").get("chooser", {})
        if plans is not None and "survival" in state:  # otherwise a fixed plan
            chooser = AdaptiveChooser(parse_plans(plans))
            try:
                chooser.load_state_dict(state)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{str(run)!r} must hold a checkpoint of this version, but got {error!r}") from error
        return cls(source, draft, table, chooser)

    def policy(self) -> LearnedPolicy:
        """Return the learned table, with the chooser's state if there is one."""
        if self.chooser is None:
            return LearnedPolicy(self.table, tuple(dict.fromkeys(self.table.values())))
        return LearnedPolicy(self.table, self.chooser.plans, self.chooser.state_dict())

    def speeds(self) -> Speeds | None:
        """Return tokens per second and request of every plan that was tried, by batch size; None: no estimates."""
        if self.chooser is None:
            return None
        estimates = {batch: self.chooser.estimates(batch) for batch in self.table}
        return {batch: {e.plan: e.speed for e in plans if e.tried >= 2.0} for batch, plans in estimates.items()}


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the content of a run's configuration."""
    config = read_mapping(path)
    if isinstance(config.get("target"), str):
        raise ValueError(
            f"target in {str(path)!r} must be a group of options, but is {config['target']!r}, as in an older version; "
            "export the run with that version, or write its options as 'specrl train --print_config' does"
        )
    return path.read_text(encoding="utf-8") if path.is_file() else "", config


def _read_measurements(run: Path) -> tuple[dict[str, str], ...]:
    """Return the measured rows with a speedup over plain decoding."""
    rows = [*read_rows(run / "measured.csv"), *read_rows(run / "bench.csv")]
    rows = [row for row in rows if row.get("speedup") and "A/A" not in row.get("plan", "")]
    if missing := [key for row in rows for key in _MEASURED if key not in row]:
        raise ValueError(f"{str(run)!r}'s measurements must have a column {missing[0]!r}, but they do not")
    return tuple(rows)
