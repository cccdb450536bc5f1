"""How SGLang is told to run any of some plans, round by round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from specrl.core.plan import Plan
from specrl.export.serving_flags import ADAPTIVE, Serving


def serving_of(plans: Sequence[Plan]) -> Serving:
    """Chains, any of which may serve the next round, or one tree for all of them.

    Raises:
        ValueError: nothing to draft, or a tree beside other plans.
    """
    drafting = [plan for plan in plans if plan.num_steps]
    if not drafting:
        raise ValueError("plans must name one that drafts, but got only 0; for example '0,1/1/2,3/1/4'")
    trees = [plan for plan in drafting if not plan.is_chain]
    if trees and len(plans) > 1:
        raise ValueError(
            f"SGLang switches between chains while it serves, or runs one tree, but got {', '.join(map(str, plans))}; "
            f"leave out {', '.join(map(str, trees))}, or name it alone"
        )
    if trees:
        return Serving(None, trees[0])
    steps = tuple(sorted({plan.num_steps for plan in plans}))
    return Serving({1: steps}, Plan(steps[-1]))


def command_line(serving: Serving, target: str, draft: str, folder: Path) -> list[str]:
    """Flags of sglang.launch_server; the adaptive config is written to `folder`."""
    flags = dict(serving.flags(target))
    flags["speculative-draft-model-path"] = draft
    config = serving.adaptive_config()
    if config is not None:
        path = folder / ADAPTIVE
        path.write_text(json.dumps(config) + "\n", encoding="utf-8")
        flags["speculative-adaptive-config"] = str(path)
    return words(flags)


def words(flags: Mapping[str, object]) -> list[str]:
    """Flags as words of a command line; True stands alone."""
    out: list[str] = []
    for name, value in flags.items():
        out += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return out
