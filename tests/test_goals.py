"""Goals of the adaptive chooser on few seeds; `benchmarks/choosers.py` has twenty. The seeds are fixed."""

import numpy as np
import pytest
from chooser_scripts import SHIFTS, TABLES, Script, Shift, Table

from specrl.agents.choosers.registry import Known, make_chooser
from specrl.core.statistics import probability_of_improvement

SEEDS, ROUNDS = 3, 3000


def play(script: Script, name: str, seed: int) -> np.ndarray:
    plans = script.table.plans
    known = Known(plans, script.table.costs(), dict(zip(plans, script.tokens[0].tolist(), strict=True)))
    return script.play(make_chooser(name, known, seed))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_adaptive_chooser_learns_from_nothing_and_tolerates_bursts_of_slow_rounds(table: Table) -> None:
    shares: dict[str, list[float]] = {name: [] for name in ("adaptive", "sglang-same", "throughput-eager")}
    settled, quiet, with_bursts = [], [], []
    by_batch: dict[int, list[float]] = {}
    for seed in range(SEEDS):
        script = Script(table, ROUNDS, seed=seed)
        chosen = {name: play(script, name, seed) for name in shares}
        for name, choices in chosen.items():
            shares[name].append(script.share(choices))
        late = script.visits() >= 300
        settled.append(script.share(chosen["adaptive"], late))
        quiet.append(script.share(chosen["adaptive"], slice(ROUNDS // 2, None)))
        for batch in script.loads:
            by_batch.setdefault(batch, []).append(script.share(chosen["adaptive"], late & (script.batches == batch)))
        disturbed = Script(table, ROUNDS, seed=seed, bursts=0.1)
        with_bursts.append(disturbed.share(play(disturbed, "adaptive", seed), slice(ROUNDS // 2, None)))
    assert np.mean(settled) >= 0.985 and np.mean(quiet) >= 0.985
    assert min(np.mean(each) for each in by_batch.values()) >= 0.97
    assert probability_of_improvement(shares["adaptive"], shares["sglang-same"]) >= 0.9
    assert np.mean(shares["adaptive"]) >= np.mean(shares["throughput-eager"]) - 0.005
    assert np.mean(with_bursts) >= np.mean(quiet) - 0.02


@pytest.mark.parametrize("shift", SHIFTS, ids=lambda shift: shift.name)
def test_adaptive_chooser_recovers_500_rounds_after_a_shift(shift: Shift) -> None:
    for table in TABLES[:2]:
        ours, theirs, late = [], [], []
        for seed in range(SEEDS):
            script = Script(table, ROUNDS, seed=seed, shift=shift)
            after, chosen = np.arange(ROUNDS) >= shift.at, play(script, "adaptive", seed)
            ours.append(script.share(chosen, after))
            late.append(script.share(chosen, np.arange(ROUNDS) >= shift.at + 500))
            theirs.append(script.share(play(script, "throughput", seed), after))
        assert np.mean(late) >= 0.98
        assert probability_of_improvement(ours, theirs) >= 0.75  # of three seeds
