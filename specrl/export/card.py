"""The model card of an export: what was measured, where, and how to serve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specrl.core.plan import Plan
from specrl.export.serving_flags import ADAPTIVE, Serving
from specrl.models.config import DraftArchitecture

_FACTS = ("cpu", "cores", "gpus", "memory_gib", "python", "torch", "specrl", "commit", "date_utc")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an export comes from."""

    target: str  # its name
    temperature: float  # of the requests
    requests: int | None = None  # number of requests that were learned from; None: not known
    measured: tuple[Mapping[str, str], ...] = ()  # rows with batch_size, plan, speedup, low, high and accept_length
    environment: Mapping[str, Any] = field(default_factory=dict)  # of the run, as in environment.json
    config: str = ""  # of the run, YAML


def model_card(config: DraftArchitecture, table: Mapping[int, Plan], serving: Serving, source: Provenance) -> str:
    """README.md as a Hugging Face model card."""
    shape = f"hidden size {config.hidden_size}, draft vocabulary {config.draft_vocab_size} of {config.vocab_size}"
    traffic = "live traffic" if source.requests is None else f"live traffic of {source.requests} requests"
    parts = [
        "---\nlibrary_name: sglang\ntags:\n- speculative-decoding\n- eagle3\n---",
        f"# An EAGLE3 draft for `{source.target}`",
        f"Learned by specrl on {traffic}: one layer, {shape}. It has no embedding; SGLang shares the target's.",
        "## Serve it\n" + _serve(serving),
        "## Plans\n`num_steps/topk/num_draft_tokens` by batch size, from the given one on; 0 drafts nothing.\n\n"
        + _plans(table, serving)
        + "\n\nThe speed given up is the run's own estimate, on its machine.",
        "## Measured\n" + _measured(source),
    ]
    facts = [f"- {key}: {source.environment[key]}" for key in _FACTS if source.environment.get(key)]
    if source.environment:
        parts.append("## Where it was learned\n" + "\n".join(facts))
    if source.config:
        parts.append("## Traffic and configuration of the run\n```yaml\n" + source.config.strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def _serve(serving: Serving) -> str:
    if serving.plan.num_steps == 0:
        return "No plan paid at any batch size: `./launch.sh` serves the target without speculation."
    text = "```bash\n./launch.sh  # or: python -m sglang.launch_server --config serve.yaml, in this directory\n```\n"
    if serving.tiers is not None:
        return text + f"`{ADAPTIVE}` sets the number of steps by batch size; a tier with one candidate is pinned."
    return text + f"SGLang serves one tree for all batch sizes: {serving.plan}. The table shows what that gives up."


def _plans(table: Mapping[int, Plan], serving: Serving) -> str:
    rows = []
    for bound, plan in sorted(table.items()):
        steps = None if serving.tiers is None else serving.tiers[bound]
        served = str(serving.plan) if steps is None else " or ".join(str(Plan(count)) for count in steps)
        cost = serving.costs.get(bound)
        rows.append([bound, plan, served, "not measured" if cost is None else f"{cost:.1%}"])
    return _table(["batch size", "learned", "served", "speed given up"], rows)


def _measured(source: Provenance) -> str:
    if not source.measured:
        return "The run was not measured against plain decoding: `specrl bench --draft draft` does it."
    headings = ["batch size", "plan", "speedup over plain decoding", "95 % interval", "accept length"]
    rows = [
        [row["batch_size"], row["plan"], row["speedup"], f"{row['low']} to {row['high']}", row["accept_length"]]
        for row in source.measured
    ]
    by = "by specrl's own engine, not by SGLang, paired and interleaved with plain decoding on held-out prompts"
    return f"{_table(headings, rows)}\n\nMeasured {by}, at temperature {source.temperature:g}."


def _table(headings: list[str], rows: list[list[object]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [headings, ["---"] * len(headings), *rows])
