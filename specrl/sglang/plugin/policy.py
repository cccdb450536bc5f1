"""A learned policy as files: the plan per batch size, and the chooser that goes on learning, where there was one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import PlanTable
from specrl.core.interfaces import PlanChooser
from specrl.core.plan import Plan, parse_plans

POLICY = "policy.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LearnedPolicy:
    """What was learned of plans.

    Args:
        table: lower bound of the batch size -> plan.
        plans: that the chooser may choose.
        state: of our `AdaptiveChooser` for them, JSON-able; None: the table is all there is.

    Raises:
        ValueError: the table is empty, or names a plan that is not among `plans`.
    """

    table: Mapping[int, Plan]
    plans: tuple[Plan, ...]
    state: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        strange = sorted(set(self.table.values()) - set(self.plans))
        if not self.table or strange:
            got = ", ".join(map(str, strange)) or "none at all"
            raise ValueError(f"a policy's table must hold plans among {', '.join(map(str, self.plans))}, but got {got}")

    def chooser(self, plans: Sequence[Plan] | None = None, *, costs: bool = True) -> PlanChooser:
        """The chooser that goes on learning, or the table where there was none.

        Args:
            plans: that it may choose; None: those it was made for.
            costs: believe the costs as they were learned; False where another engine or machine serves. How far drafts
                survive is believed in any case.

        Raises:
            ValueError: the chooser's state is not one that this version reads.
        """
        if self.state is None:
            return PlanTable(self.table)
        chooser = AdaptiveChooser(self.plans if plans is None else plans)
        try:
            if costs and plans is None:
                chooser.load_state_dict(self.state)
            else:
                chooser.survival.load_state_dict(self.state["survival"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"a policy's chooser must be one that this version wrote, but got {error!r}") from error
        return chooser

    def save(self, directory: Path) -> None:
        """Write policy.json."""
        said = {
            "format": _FORMAT,
            "plans": list(map(str, self.plans)),
            "table": {str(bound): str(plan) for bound, plan in sorted(self.table.items())},
            "chooser": self.state,
        }
        (directory / POLICY).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> LearnedPolicy:
        """Read policy.json.

        Raises:
            ValueError: there is none, or it is not one that this version wrote.
        """
        path = Path(directory) / POLICY
        if not path.is_file():
            raise ValueError(f"a policy directory must hold {POLICY}, but {str(directory)!r} does not; export one")
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            if said["format"] != _FORMAT:
                raise ValueError(f"format must be {_FORMAT}, but got {said['format']!r}")
            table = {int(bound): Plan.parse(plan) for bound, plan in said["table"].items()}
            return cls(table, parse_plans(said["plans"]), said["chooser"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} must be a policy that this version wrote, but it is not ({error})"
            ) from error
