"""What our chooser must reach, on few seeds; `benchmarks/choosers.py` has twenty. The seeds are fixed."""

import numpy as np
import pytest
from chooser_worlds import SHIFTS, STEADY, TABLES, Script, Shift, Table

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.core.statistics import probability_of_improvement

SEEDS, ROUNDS = 3, 3000


def known(script: Script) -> Known:
    """What a profile at start-up tells."""
    plans = script.table.plans
    return Known(plans, script.table.costs(), dict(zip(plans, script.tokens[0].tolist(), strict=True)))


def play(script: Script, name: str, seed: int) -> np.ndarray:
    return script.play(make_chooser(name, known(script), seed))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_from_a_cold_start_under_a_moving_load(table: Table) -> None:
    shares: dict[str, list[float]] = {}
    settled, end = [], []
    at: dict[int, list[float]] = {}
    for seed in range(SEEDS):
        script = Script(table, ROUNDS, seed=seed)
        for name in ("adaptive", "sglang-same", "throughput-eager"):
            chosen = play(script, name, seed)
            shares.setdefault(name, []).append(script.share(chosen))
            if name == "adaptive":
                settled.append(script.share(chosen, script.visits() >= 300))
                end.append(script.share(chosen, slice(-600, None)))
            if name == "adaptive":
                late = script.visits() >= 300
                for batch in script.loads:
                    at.setdefault(batch, []).append(script.share(chosen, late & (script.batches == batch)))
    assert np.mean(settled) >= 0.985 and np.mean(end) >= 0.985
    assert min(np.mean(found) for found in at.values()) >= 0.97
    assert probability_of_improvement(shares["adaptive"], shares["sglang-same"]) >= 0.9
    assert np.mean(shares["adaptive"]) >= np.mean(shares["throughput-eager"]) - 0.005


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_no_constant_plan_would_pass(table: Table) -> None:
    """Each loses too much at some batch size: the test above asks for all of them."""
    script = Script(table, 1200, seed=0)
    for plan in table.plans:
        chosen = script.play(FixedPlan(plan))
        assert min(script.share(chosen, script.batches == batch) for batch in script.loads) < 0.97


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
def test_500_rounds_after_a_shift_it_is_back_and_ahead_of_costs_profiled_once(shift: Shift) -> None:
    for table in TABLES[:2]:
        ours, theirs, late = [], [], []
        for seed in range(SEEDS):
            script = Script(table, ROUNDS, seed=seed, shift=shift)
            after = np.arange(ROUNDS) >= shift.at
            chosen = play(script, "adaptive", seed)
            ours.append(script.share(chosen, after))
            late.append(script.share(chosen, np.arange(ROUNDS) >= shift.at + 500))
            theirs.append(script.share(play(script, "throughput", seed), after))
        assert np.mean(late) >= 0.98
        assert probability_of_improvement(ours, theirs) >= 0.75  # of three seeds


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_bursts_of_slow_rounds_change_little(table: Table) -> None:
    """Every tenth round in a burst of five that take half as long again."""
    quiet, stuttering = (
        np.mean(
            [
                script.share(play(script, "adaptive", seed), slice(ROUNDS // 2, None))
                for seed in range(SEEDS)
                for script in [Script(table, ROUNDS, seed=seed, shift=STEADY, bursts=bursts)]
            ]
        )
        for bursts in (0.0, 0.1)
    )
    assert stuttering >= quiet - 0.02
