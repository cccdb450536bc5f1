"""A learned policy as a file: the plan per batch size, and the state of the chooser that goes on learning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import PlanTable
from specrl.core.checks import require
from specrl.core.interfaces import PlanChooser
from specrl.core.plan import Plan, parse_plans

POLICY = "policy.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LearnedPolicy:
    """A learned table of plans, perhaps with a chooser that goes on learning.

    Args:
        table: lower bound of the batch size -> plan.
        plans: plans that the chooser may choose.
        state: JSON-able state of an `AdaptiveChooser` for `plans`; None: the table alone.

    Raises:
        ValueError: the table is empty, or names a plan that is not among `plans`.
    """

    table: Mapping[int, Plan]
    plans: tuple[Plan, ...]
    state: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        allowed = bool(self.table) and set(self.table.values()) <= set(self.plans)
        names = {bound: str(plan) for bound, plan in self.table.items()}
        require(allowed, "a policy's table", f"of plans among {', '.join(map(str, self.plans))}", names)

    def chooser(self, plans: Sequence[Plan] | None = None) -> PlanChooser:
        """Return the chooser that goes on learning, or the table if there is no state.

        Args:
            plans: plans that it may choose, without their learned costs, which fit one engine only; None: `self.plans`.

        Raises:
            ValueError: the chooser's state was not written by this version.
        """
        if self.state is None:
            return PlanTable(self.table)
        chooser = AdaptiveChooser(self.plans if plans is None else plans)
        try:
            if plans is None:
                chooser.load_state_dict(self.state)
            else:
                chooser.survival.load_state_dict(self.state["survival"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"a policy's chooser must be one that this version wrote, but got {error!r}") from error
        return chooser

    def save(self, directory: Path) -> None:
        """Write policy.json."""
        content = {
            "format": _FORMAT,
            "plans": list(map(str, self.plans)),
            "table": {str(bound): str(plan) for bound, plan in sorted(self.table.items())},
            "chooser": self.state,
        }
        (directory / POLICY).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> LearnedPolicy:
        """Read policy.json; raise a ValueError if there is none, or if this version did not write it."""
        path = Path(directory) / POLICY
        if not path.is_file():
            raise ValueError(f"a policy directory must hold {POLICY}, but {str(directory)!r} does not; export one")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            require(content["format"] == _FORMAT, "format", str(_FORMAT), content["format"])
            table = {int(bound): Plan.parse(plan) for bound, plan in content["table"].items()}
            return cls(table, parse_plans(content["plans"]), content["chooser"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} must be a policy that this version wrote, but is not ({error})") from error
