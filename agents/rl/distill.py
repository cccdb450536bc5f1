"""Turns a policy into a table: the plan that it chooses most often at each batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.policy_network import NetworkChooser
from specrl.agents.choosers.table import PlanTable
from specrl.core.observation import Observer
from specrl.core.plan import Plan


class Distilled(NamedTuple):
    """A table, and how well it agrees with the policy."""

    table: PlanTable
    agreement: float  # share of the states in which the policy chose the table's plan
    by_batch_size: dict[int, float]  # the same for each batch size
    states: int  # number of states


def distill(batch_sizes: NDArray[np.int64], actions: NDArray[np.int64], plans: Sequence[Plan]) -> Distilled:
    """Tabulate the plans chosen most often at each batch size; ties go to the plan that is first in `plans`.

    Args:
        batch_sizes: of the states, [S] int64, S at least 1.
        actions: the policy's choice in each state, as an index into `plans`, [S] int64.
        plans: in the order of the actions.
    """
    table: dict[int, Plan | str] = {}
    shares: dict[int, float] = {}
    for size in np.unique(batch_sizes).tolist():
        counts = np.bincount(actions[batch_sizes == size], minlength=len(plans))
        table[size], shares[size] = plans[int(counts.argmax())], float(counts.max() / counts.sum())
    agreement = sum(shares[size] * float((batch_sizes == size).mean()) for size in shares)
    return Distilled(PlanTable(table), agreement, shares, len(actions))


def tabulate(chooser: NetworkChooser, max_batch_size: int) -> PlanTable:
    """Return the exact table, up to a batch size, of a policy that sees the batch size only (else a ValueError)."""
    network = chooser.network
    if not network.is_table:
        raise ValueError("a table's policy must see the batch size only; train it with 'observe: batch_size'")
    sizes = range(1, max_batch_size + 1)
    vectors = np.zeros((max_batch_size, network.inputs), dtype=np.float32)
    vectors[:, 0] = [Observer(chooser.plans).observe(size, 1.0).values[0] for size in sizes]
    actions = chooser.act(vectors, network.start(max_batch_size))[0].tolist()
    changes = [size for size in sizes if size == 1 or actions[size - 1] != actions[size - 2]]
    return PlanTable({size: chooser.plans[actions[size - 1]] for size in changes})
