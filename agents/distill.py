"""From a policy to a table: the plan per batch size that it chooses most often. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.agents.fixed import PlanTable
from specrl.plan import Plan


class Distilled(NamedTuple):
    """A table, and how well it tells what the policy does.

    Attributes:
        table: lower bound of batch size -> plan.
        agreement: share of the states at which the policy chose the table's plan.
        by_batch_size: the same at each batch size.
        states: how many there were.
    """

    table: PlanTable
    agreement: float
    by_batch_size: dict[int, float]
    states: int


def distill(batch_sizes: NDArray[np.int64], actions: NDArray[np.int64], plans: Sequence[Plan]) -> Distilled:
    """The majority rule: at each batch size, the plan chosen at most of the states visited there.

    Of plans chosen equally often, the one that comes first in `plans` counts.

    Args:
        batch_sizes: of the states [S] int64.
        actions: the policy's choice at each, as an index into `plans` [S] int64.
        plans: in the order of the actions.

    Raises:
        ValueError: no states, or not as many choices.
    """
    if batch_sizes.ndim != 1 or batch_sizes.shape != actions.shape or not len(actions):
        raise ValueError(f"distill needs a choice for each state, but got {batch_sizes.shape} and {actions.shape}")
    table: dict[int, Plan | str] = {}
    shares: dict[int, float] = {}
    for size in np.unique(batch_sizes).tolist():
        counts = np.bincount(actions[batch_sizes == size], minlength=len(plans))
        table[size], shares[size] = plans[int(counts.argmax())], float(counts.max() / counts.sum())
    agreement = sum(shares[size] * float((batch_sizes == size).mean()) for size in shares)
    return Distilled(PlanTable(table), agreement, shares, len(actions))
