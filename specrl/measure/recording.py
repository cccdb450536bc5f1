"""Records rounds of every plan and plain decoding steps in turns, for a simulation profile."""

from __future__ import annotations

from collections.abc import Sequence

from specrl.core.interfaces import Engine, Workload
from specrl.core.plan import Plan
from specrl.io.output import progress
from specrl.simulation.fit import Block
from specrl.simulation.profile import Profile

_BLOCK_ROUNDS, _UNCOUNTED_ROUNDS = 8, 2  # the uncounted ones come first
_MIN_PASSES = 4


def record_blocks(
    engine: Engine,
    workload: Workload,
    batch_sizes: Sequence[int],
    plans: Sequence[Plan],
    *,
    seconds: float,
    seed: int,
) -> list[Block]:
    """Record interleaved blocks of every plan and of plain steps at every batch size, after one uncounted pass.

    `batch_sizes` are ascending. At least four passes are made, even if they take longer than `seconds`.

    Raises:
        ValueError: the engine cannot run a plan, or does not measure plain decoding between rounds.
    """
    session = engine.start(workload, batch_size=batch_sizes[0], max_batch_size=batch_sizes[-1], seed=seed)
    blocks: list[Block] = []
    turns = [(batch_size, plan) for batch_size in batch_sizes for plan in plans]
    passes, clock = 0, engine.clock
    with progress("recording", seconds) as advance:
        began = clock.now()
        while passes <= _MIN_PASSES or clock.now() - began < seconds:
            for batch_size, plan in turns:
                session.resize(batch_size)
                rounds = [session.round(plan) for _ in range(_UNCOUNTED_ROUNDS + _BLOCK_ROUNDS)]
                steps = session.plain_steps(_BLOCK_ROUNDS)
                if passes:
                    blocks += [Block(tuple(rounds[_UNCOUNTED_ROUNDS:])), Block(tuple(steps))]
            turns.reverse()
            passes += 1
            advance(clock.now() - began)
    session.close()
    return blocks


def profile_rows(profile: Profile) -> list[dict[str, object]]:
    """Return costs, accept length and speedup of every plan and batch size as rows of a table."""
    return [
        {
            "batch_size": cost.batch_size,
            "plan": str(cost.plan),
            "round ms": cost.seconds * 1e3,
            "jitter": cost.jitter,
            "accept length": profile.accept_length(cost.plan),
            "speedup": profile.speedup(cost.batch_size, cost.plan),
        }
        for cost in profile.costs
        if cost.plan is not None
    ]
