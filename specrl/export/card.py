"""The model card of an export: what was measured, where, and how to serve it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specrl.core.plan import Plan
from specrl.export.serving_flags import ADAPTIVE, Serving
from specrl.models.config import DraftArchitecture

_MEASURED = ("batch_size", "plan", "speedup", "low", "high", "accept_length")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an export comes from: what its run says of itself, read by `of`."""

    target: str
    temperature: float
    requests: int | None = None
    measured: tuple[Mapping[str, str], ...] = ()  # rows with a speedup, of `_MEASURED`
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""  # the run's configuration, YAML

    @classmethod
    def of(cls, run: Path, *, target: str, temperature: float) -> Provenance:
        """What the run's files say; what it did not write is left out.

        Raises:
            ValueError: a file is damaged.
        """
        plans, environment = _json(run / "plans.json"), _json(run / "environment.json")
        rows: list[dict[str, str]] = []
        for name in ("measured.csv", "bench.csv"):
            if (run / name).is_file():
                rows += csv.DictReader((run / name).read_text(encoding="utf-8").splitlines())
        with_interval = [row for row in rows if row.get("speedup") and "A/A" not in row.get("plan", "")]
        missing = [key for row in with_interval for key in _MEASURED if key not in row]
        if missing:
            raise ValueError(f"{str(run)!r}'s measurements must have a column {missing[0]!r}, but they do not")
        config = run / "config.yaml"
        return cls(
            target,
            temperature,
            plans.get("requests"),
            tuple({key: row[key] for key in _MEASURED} for row in with_interval),
            environment,
            config.read_text(encoding="utf-8") if config.is_file() else "",
        )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON, but it is not ({error})") from error
    return found if isinstance(found, dict) else {}


def model_card(config: DraftArchitecture, table: Mapping[int, Plan], serving: Serving, source: Provenance) -> str:
    """README.md as a Hugging Face model card."""
    shape = f"hidden size {config.hidden_size}, draft vocabulary {config.draft_vocab_size} of {config.vocab_size}"
    parts = [
        "---\nlibrary_name: sglang\ntags:\n- speculative-decoding\n- eagle3\n---",
        f"# An EAGLE3 draft for `{source.target}`",
        f"Learned by specrl on live traffic{_after(source)}: one layer, {shape}. The target's embedding is not in it; "
        "SGLang shares the target's.",
        "## Serve it\n" + _serve(serving),
        "## Plans\n`num_steps/topk/num_draft_tokens` by batch size, from the one named on; 0 drafts nothing.\n\n"
        + _plans(table, serving),
        "## Measured\n" + _measured(source),
    ]
    if source.environment:
        keys = ("cpu", "cores", "gpus", "memory_gib", "python", "torch", "specrl", "commit", "date_utc")
        lines = [f"- {key}: {source.environment[key]}" for key in keys if source.environment.get(key)]
        parts.append("## Where it was learned\n" + "\n".join(lines))
    if source.config:
        parts.append("## Traffic and configuration of the run\n```yaml\n" + source.config.strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def _after(source: Provenance) -> str:
    return "" if source.requests is None else f" of {source.requests} requests"


def _serve(serving: Serving) -> str:
    if serving.plan.num_steps == 0:
        return "No plan paid at any batch size: `./launch.sh` serves the target without speculation."
    text = "```bash\n./launch.sh  # or: python -m sglang.launch_server --config serve.yaml, in this directory\n```\n"
    if serving.tiers is not None:
        return text + f"The lookahead follows the batch size as `{ADAPTIVE}` says; a tier with one candidate is pinned."
    return text + f"SGLang serves one tree for all batch sizes: {serving.plan}. The table shows what that gives up."


def _plans(table: Mapping[int, Plan], serving: Serving) -> str:
    lines = ["| batch size | learned | served | speed given up |", "|---|---|---|---|"]
    for bound, plan in sorted(table.items()):
        steps = None if serving.tiers is None else serving.tiers[bound]
        served = str(serving.plan) if steps is None else " or ".join(str(Plan(count)) for count in steps)
        cost = serving.costs.get(bound)
        lines.append(f"| {bound} | {plan} | {served} | {'not measured' if cost is None else f'{cost:.1%}'} |")
    return "\n".join(lines) + "\n\nWhat is given up is the run's own estimate, on its machine."


def _measured(source: Provenance) -> str:
    if not source.measured:
        return "The run was not measured against plain decoding: `specrl bench --draft draft` does it."
    lines = [
        "| batch size | plan | speedup over plain decoding | 95 % interval | accept length |",
        "|---|---|---|---|---|",
    ]
    for row in source.measured:
        lines.append(
            f"| {row['batch_size']} | {row['plan']} | {row['speedup']} | {row['low']} to {row['high']} "
            f"| {row['accept_length']} |"
        )
    by = "by specrl's own engine, not by SGLang, paired and interleaved with plain decoding on held-out prompts"
    return "\n".join(lines) + f"\n\nMeasured {by}, at temperature {source.temperature:g}."
