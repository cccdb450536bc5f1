"""How SGLang serves a table of plans: its adaptive config for chains, one plan for all batch sizes with trees.

SGLang 0.5.23 changes num_steps while it serves, but neither topk nor the number of verified tokens of a tree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from specrl.core.checks import require
from specrl.core.plan import Plan
from specrl.io.output import OutputDir
from specrl.models.hub import served_as

Lookahead = Literal["auto", "adaptive", "single"]
Speeds = Mapping[int, Mapping[Plan, float]]  # batch size -> plan -> tokens per second and request, as it was learned
ADAPTIVE, SERVE, LAUNCH = "adaptive.json", "serve.yaml", "launch.sh"


@dataclass(frozen=True, slots=True)
class Serving:
    """The plans that SGLang runs."""

    tiers: Mapping[int, tuple[int, ...]] | None  # lower bound of the batch size -> candidate num_steps, ascending
    plan: Plan  # to start with; without tiers, for all batch sizes. Plan 0: no draft is served
    costs: Mapping[int, float | None] = field(default_factory=dict)  # batch size -> share of speed lost, if known

    def adaptive_config(self) -> dict[str, object] | None:
        """The content of --speculative-adaptive-config; None without tiers."""
        if self.tiers is None:
            return None
        return {str(bound): {"candidate_steps": list(steps)} for bound, steps in sorted(self.tiers.items())}

    def flags(self, model_path: str, *, rejection_sampling: bool = False) -> dict[str, object]:
        """Flags of sglang.launch_server without their dashes; the bundle's paths are relative.

        `model_path` is a directory, or a Hugging Face id with or without '@revision'.
        """
        flags = served_as(model_path)
        if self.plan.num_steps == 0:
            return flags
        flags |= {
            "speculative-algorithm": "EAGLE3",
            "speculative-draft-model-path": "draft",
            "speculative-num-steps": self.plan.num_steps,
            "speculative-eagle-topk": self.plan.topk,
            "speculative-num-draft-tokens": self.plan.num_draft_tokens,
        }
        if self.tiers is not None:
            flags |= {"speculative-adaptive": True, "speculative-adaptive-config": ADAPTIVE}
        if rejection_sampling and self.plan.is_chain:
            flags["speculative-use-rejection-sampling"] = True
        return flags


def flag_words(flags: Mapping[str, object]) -> list[str]:
    """Return flags as words of a command line; True is a flag without a value."""
    words: list[str] = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def plan_serving(
    table: Mapping[int, Plan], speeds: Speeds | None = None, *, lookahead: Lookahead = "auto", candidates: int = 1
) -> Serving:
    """Fit a learned table of plans to the abilities of SGLang.

    Args:
        table: lower bound of the batch size -> plan.
        speeds: estimates of the run; needed for more than one candidate, and to replace a tree by a chain.
        lookahead: 'adaptive': the best chain per batch size; 'single': one plan; 'auto': 'single' if there is a tree.
        candidates: per batch size, among which SGLang's own rule chooses; 1 pins the learned plan.

    Raises:
        ValueError: `speeds` are needed but missing, or no candidate.
    """
    require(candidates >= 1, "candidates", "at least 1", candidates)
    if all(plan.num_steps == 0 for plan in table.values()):
        return Serving(None, Plan(0), dict.fromkeys(table, 0.0))
    trees = not all(plan.is_chain for plan in table.values())
    if lookahead == "single" or (lookahead == "auto" and trees):
        return _single(table, speeds or {})
    if speeds is None and (candidates > 1 or trees):
        reason = "to replace a tree by a chain" if trees else f"for {candidates} candidates"
        raise ValueError(f"a run must hold estimates of every plan {reason}, but it does not; export one of 'train'")
    return _adaptive(table, speeds or {}, candidates)


def _adaptive(table: Mapping[int, Plan], speeds: Speeds, candidates: int) -> Serving:
    """The best chains at each batch size, the learned one first."""
    tiers: dict[int, tuple[int, ...]] = {}
    costs: dict[int, float | None] = {}
    for bound, plan in table.items():
        known = speeds.get(bound, {})
        ranked = sorted((p for p in known if p.is_chain), key=lambda p: (p != plan, -known[p]))
        if plan.is_chain and plan not in ranked:
            ranked.insert(0, plan)
        if not ranked:
            raise ValueError(f"batch size {bound} needs a chain that was tried, but got only the tree {plan}")
        tiers[bound] = tuple(sorted(p.num_steps for p in ranked[:candidates]))
        costs[bound] = _cost(known, ranked[0], plan)
    return Serving(tiers, Plan(max(max(tier) for tier in tiers.values())), costs)


def _single(table: Mapping[int, Plan], speeds: Speeds) -> Serving:
    """The plan with drafts that loses the least, as a mean of log speeds over the table's batch sizes."""
    tried = set.intersection(*(set(speeds.get(bound, {})) for bound in table)) - {Plan(0)}
    if tried:
        best = max(sorted(tried), key=lambda plan: sum(math.log(speeds[bound][plan]) for bound in table))
    else:  # the most frequent one
        plans = [plan for plan in table.values() if plan.num_steps]
        best = max(plans, key=lambda plan: (plans.count(plan), not plan.is_chain, plan))
    return Serving(None, best, {bound: _cost(speeds.get(bound, {}), best, plan) for bound, plan in table.items()})


def _cost(known: Mapping[Plan, float], served: Plan, learned: Plan) -> float | None:
    if served == learned:
        return 0.0
    return 1.0 - known[served] / known[learned] if served in known and learned in known else None


def write_serving(serving: Serving, flags: Mapping[str, object], output: OutputDir) -> None:
    """Write serve.yaml, launch.sh, and adaptive.json if there are tiers."""
    config = serving.adaptive_config()
    if config is not None:
        output.write_json(ADAPTIVE, config)
    output.write_text(SERVE, "".join(f"{flag}: {json.dumps(value)}\n" for flag, value in flags.items()))
    output.write_text(LAUNCH, _LAUNCH).chmod(0o755)


_LAUNCH = """\
#!/usr/bin/env bash
# Serve this directory with SGLang 0.5.23. Flags on the command line override serve.yaml: ./launch.sh --port 30001
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-python3}" -m sglang.launch_server --config serve.yaml "$@"
"""
