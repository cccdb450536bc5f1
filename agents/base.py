"""The seams of those who decide and those who learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from specrl.observation import Observation
from specrl.plan import Plan
from specrl.rounds import Round, Trace

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class PlanChooser(Protocol):
    """Chooses the plan of each round. NumPy only: the same code runs inside a serving engine."""

    plans: tuple[Plan, ...]

    def choose(self, observation: Observation) -> Plan:
        """One of `plans` for the next round."""
        ...

    def learn(self, done: Round) -> None:
        """Take a finished round, maybe some rounds after the next ones were chosen."""
        ...


@runtime_checkable
class DraftLearner(Protocol):
    """Learns draft weights from traces."""

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces and learn; metrics by name."""
        ...

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Version and weights to serve, by SGLang's names."""
        ...
