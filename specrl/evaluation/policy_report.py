"""Evaluation of a learned policy in simulation: against the best plan per batch size, and as a table of plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.policy_network import NetworkChooser
from specrl.agents.choosers.table import PlanTable
from specrl.agents.rl.distill import Distilled, distill
from specrl.core.plan import Plan
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.simulation.profile import Profile

Act = Callable[[NDArray[np.float32]], NDArray[np.int64]]
PHASE = 64  # rounds at one batch size
_WARM_UP_PASSES = 1  # over the batch sizes, in which the policy sees costs


class PolicyRounds(NamedTuple):
    """Rounds of a policy; [S] each, S = rounds x environments."""

    batch_sizes: NDArray[np.int64]
    actions: NDArray[np.int64]
    tokens: NDArray[np.float64]  # per request
    seconds: NDArray[np.float64]


class Report(NamedTuple):
    """A policy against the best plan per batch size.

    Attributes:
        share: seconds that the best plans need for the same tokens, over the seconds of the policy, both simulated.
        by_batch_size: tokens per second and request over those of the best plan, at each batch size.
        table_share: the share of the distilled table, which an export serves.
        best: the best plan of the profile at each batch size.
        distilled: the table of the policy's most frequent plans, over the states visited.
    """

    share: float
    by_batch_size: dict[int, float]
    table_share: float
    best: PlanTable
    distilled: Distilled


def best_plans(profile: Profile, batch_sizes: Sequence[int], plans: Sequence[Plan]) -> PlanTable:
    """argmax E[τ] / T(B, plan) at each batch size, from the profile."""
    return PlanTable({b: max(plans, key=lambda plan: profile.tokens_per_second(b, plan)) for b in batch_sizes})


def report(
    chooser: NetworkChooser,
    profile: Profile,
    batch_sizes: Sequence[int],
    *,
    passes: int = 3,
    num_envs: int = 64,
    seed: int = 0,
) -> Report:
    """Simulate a policy and the best plans under a load that moves between small and large batch sizes.

    The load stays 64 rounds at each batch size, in an order that goes up and down. One pass over all batch sizes is a
    warm-up. The policy and the best plans have the same seed.

    Args:
        chooser: the policy.
        profile: to simulate.
        batch_sizes: of the load.
        passes: over the batch sizes, after the warm-up.
        num_envs: environments side by side.
        seed: of the random numbers.
    """
    allowed = [plan for plan, able in zip(chooser.plans, chooser.allowed, strict=True) if able]
    best = best_plans(profile, batch_sizes, allowed)
    kwargs: dict[str, Any] = {"passes": passes, "num_envs": num_envs, "seed": seed}
    state = chooser.network.start(num_envs)

    def greedy(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        nonlocal state
        actions, state = chooser.act(vectors, state)
        return actions

    own = simulate(greedy, profile, chooser.plans, batch_sizes, **kwargs)
    distilled = distill(own.batch_sizes, own.actions, chooser.plans)
    top, served = (
        simulate(table_policy(table, chooser.plans, batch_sizes), profile, chooser.plans, batch_sizes, **kwargs)
        for table in (best, distilled.table)
    )
    (share, by_size), (table_share, _) = (_shares(one, top) for one in (own, served))
    return Report(share, by_size, table_share, best, distilled)


def table_policy(table: PlanTable, plans: Sequence[Plan], batch_sizes: Sequence[int]) -> Act:
    """A table of plans as actions from observations."""
    index = np.zeros(max(batch_sizes) + 1, dtype=np.int64)
    for size in batch_sizes:
        index[size] = list(plans).index(table.best(size))
    return lambda vectors: index[np.rint(2.0 ** (10.0 * vectors[:, 0])).astype(np.int64)]


def _shares(own: PolicyRounds, top: PolicyRounds) -> tuple[float, dict[int, float]]:
    """Share of the best plans' speed, over all rounds and by batch size."""
    shares, needed = {}, 0.0
    for size in np.unique(own.batch_sizes).tolist():
        here, there = own.batch_sizes == size, top.batch_sizes == size
        speed = top.tokens[there].sum() / top.seconds[there].sum()
        shares[size] = float(own.tokens[here].sum() / own.seconds[here].sum() / speed)
        needed += own.tokens[here].sum() / speed
    return float(needed / own.seconds.sum()), shares


def simulate(
    act: Act,
    profile: Profile,
    plans: Sequence[Plan],
    batch_sizes: Sequence[int],
    *,
    passes: int,
    num_envs: int,
    seed: int,
) -> PolicyRounds:
    """Rounds of `act`, from observations [N, D] to actions [N], after the warm-up."""
    sizes = sorted(set(batch_sizes))
    order = [size for pair in zip(sizes, reversed(sizes), strict=True) for size in pair][: len(sizes)]
    trace = ",".join(f"{size}x{PHASE}" for size in order)
    skipped = _WARM_UP_PASSES * PHASE * len(order)
    rounds = skipped + passes * PHASE * len(order)
    env = SimulatedVectorEnv(num_envs, profile=profile, batch_size=trace, plans=list(plans), max_rounds=rounds + 1)
    vectors, _ = env.reset(seed=seed)
    parts = []
    for number in range(rounds):
        actions = act(vectors)
        vectors, *_, info = env.step(actions)
        if number >= skipped:
            size = info["batch_size"]
            parts.append((size.copy(), actions, info["tokens"] / size, info["seconds"]))
    env.close()
    return PolicyRounds(*(np.concatenate(column) for column in zip(*parts, strict=True)))
