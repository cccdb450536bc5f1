"""Evaluation of a learned policy in simulation, compared with the best plan per batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class PolicyRounds(NamedTuple):
    """S rounds of a policy, over all environments; every field is [S]."""

    batch_sizes: NDArray[np.int64]
    actions: NDArray[np.int64]
    tokens: NDArray[np.float64]  # mean per request
    seconds: NDArray[np.float64]


class Report(NamedTuple):
    """A policy compared with the best plan per batch size.

    Attributes:
        share: seconds that the best plans need for the same tokens, over the seconds of the policy, both simulated.
        by_batch_size: tokens per second and request over those of the best plan, at each batch size.
        table_share: the share of the distilled table, which an export serves.
        best: the best plan of the profile at each batch size.
        distilled: the table of the plans that the policy selected most often.
    """

    share: float
    by_batch_size: dict[int, float]
    table_share: float
    best: PlanTable
    distilled: Distilled


def best_plans(profile: Profile, batch_sizes: Sequence[int], plans: Sequence[Plan]) -> PlanTable:
    """Return the plan with the highest E[τ] / T(B, plan) of the profile at each batch size."""
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
    """Simulate a policy, its table and the best plans under a load that alternates small and large batch sizes.

    The load stays 64 rounds at each batch size. `passes` over all batch sizes follow one that is a warm-up. All
    have the same seed.
    """
    allowed = [plan for plan, can in zip(chooser.plans, chooser.allowed, strict=True) if can]
    best = best_plans(profile, batch_sizes, allowed)
    state = chooser.network.start(num_envs)

    def greedy(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        nonlocal state
        actions, state = chooser.act(vectors, state)
        return actions

    sizes = sorted(set(batch_sizes))
    order = [size for pair in zip(sizes, reversed(sizes), strict=True) for size in pair][: len(sizes)]
    load, pass_rounds, plans = ",".join(f"{size}x{PHASE}" for size in order), PHASE * len(order), chooser.plans
    rounds = (1 + passes) * pass_rounds
    env = SimulatedVectorEnv(num_envs, profile=profile, batch_size=load, plans=plans, max_rounds=rounds + 1)

    def run(act: Act) -> PolicyRounds:
        vectors, _ = env.reset(seed=seed)
        parts = []
        for number in range(rounds):
            actions = act(vectors)
            vectors, *_, info = env.step(actions)
            if number >= pass_rounds:
                size = info["batch_size"]
                parts.append((size.copy(), actions, info["tokens"] / size, info["seconds"]))
        return PolicyRounds(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    policy_rounds = run(greedy)
    distilled = distill(policy_rounds.batch_sizes, policy_rounds.actions, plans)
    best_rounds, table_rounds = (run(table_policy(table, plans, sizes)) for table in (best, distilled.table))
    env.close()
    share, by_size = _shares(policy_rounds, best_rounds)
    return Report(share, by_size, _shares(table_rounds, best_rounds)[0], best, distilled)


def table_policy(table: PlanTable, plans: Sequence[Plan], batch_sizes: Sequence[int]) -> Act:
    """Return a function from observations to the actions of a table of plans."""
    index = np.zeros(max(batch_sizes) + 1, dtype=np.int64)
    for size in batch_sizes:
        index[size] = list(plans).index(table.best(size))
    return lambda vectors: index[np.rint(2.0 ** (10.0 * vectors[:, 0])).astype(np.int64)]


def _shares(rounds: PolicyRounds, best: PolicyRounds) -> tuple[float, dict[int, float]]:
    """Return the share of the best plans' speed, over all rounds and by batch size."""
    shares, needed_s = {}, 0.0
    for size in np.unique(rounds.batch_sizes).tolist():
        at, best_at = rounds.batch_sizes == size, best.batch_sizes == size
        best_speed = best.tokens[best_at].sum() / best.seconds[best_at].sum()
        tokens = rounds.tokens[at].sum()
        shares[size] = float(tokens / rounds.seconds[at].sum() / best_speed)
        needed_s += tokens / best_speed
    return float(needed_s / rounds.seconds.sum()), shares
