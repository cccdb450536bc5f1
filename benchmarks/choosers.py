"""Plan choosers against each other on simulated rounds: tables x shifts x seeds, every chooser on the same luck.

    python benchmarks/choosers.py [--seeds 20] [--rounds 3600] [--only adaptive,sglang]

Prints, for each table and shift, the share of the best plan per batch size that each chooser had (interquartile mean
over seeds and its bootstrap interval), the regret, and the probability that ours does better. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from specrl.agents.base import PlanChooser
from specrl.agents.choosers import CHOOSERS, Known, make_chooser
from specrl.agents.fixed import ClairvoyantLength
from specrl.statistics import mean_interval, probability_of_improvement, stratified_iqm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chooser_worlds import SHIFTS, STEADY, TABLES, Script, Shift, Table

OURS = "adaptive"
Make = Callable[[Script, int], PlanChooser]


def known(script: Script) -> Known:
    """What a profile at start-up tells."""
    plans = script.table.plans
    return Known(plans, script.table.costs(), dict(zip(plans, script.tokens[0].tolist(), strict=True)))


def catalogued(name: str) -> Make:
    return lambda script, seed: make_chooser(name, known(script), seed)


MAKERS: dict[str, Make] = {
    **{name: catalogued(name) for name in CHOOSERS},
    "clairvoyant": lambda s, seed: ClairvoyantLength(s.table.plans, s.table.costs(), lambda: s.foresee().tolist()),
}
ON_SHIFTS = (OURS, "throughput", "throughput-0", "throughput-eager", "sglang", "sglang-same", "best-table")


def windows(script: Script) -> dict[str, np.ndarray]:
    """Which rounds count: all; from the 300th of each batch size on; 500 after the shift; the last 600."""
    rounds, at = np.arange(script.rounds), script.shift.at
    out = {"all": rounds >= at, "end": rounds >= script.rounds - 600}
    out["settled"] = (rounds >= at + 500) if at else (script.visits() >= 300)
    return out


def measure(
    table: Table, shift: Shift, names: list[str], seeds: int, rounds: int, bursts: float
) -> dict[str, dict[str, list[float]]]:
    """Shares by chooser and window, one per seed; and per batch size over the settled rounds of all seeds."""
    out: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for seed in range(seeds):
        script = Script(table, rounds, seed=seed, shift=shift, bursts=bursts)
        parts = windows(script)
        for batch in script.loads:
            parts[f"at {batch}"] = parts["settled"] & (script.batches == batch)
        for name in names:
            chosen = script.play(MAKERS[name](script, seed))
            for part, where in parts.items():
                if where.any():
                    out[name].setdefault(part, []).append(script.share(chosen, where, lucky=name == "clairvoyant"))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3600, help="of a run; six batch sizes share them")
    parser.add_argument("--only", default="", help="choosers, separated by commas; ours is always there")
    parser.add_argument("--shift", default="", help="one of steady, dearer, worse, better; all by default")
    parser.add_argument("--bursts", type=float, default=0.0, help="share of rounds in bursts of five 1.5x slower ones")
    args = parser.parse_args()
    wanted = [OURS, *(n for n in args.only.split(",") if n and n != OURS)] if args.only else list(MAKERS)
    rng, summary = np.random.default_rng(0), []
    for shift in (STEADY, *SHIFTS):
        if args.shift and shift.name != args.shift:
            continue
        for table in TABLES:
            names = [n for n in wanted if shift is STEADY or n in ON_SHIFTS]
            shares = measure(table, shift, names, args.seeds, args.rounds, args.bursts)
            print(f"\n{table.name}, {shift.name}: share of the best plan per batch size")
            heads = f"{'settled':>9}{'end':>8}{'worst B':>9}{'regret':>9}"
            print(f"  {'chooser':17}{'all (IQM, 95 %)':25}{heads}  P(ours better)")
            for name in names:
                every = np.array(shares[name]["all"])
                spread = stratified_iqm(every[:, None], rng=rng)
                lost = mean_interval(1.0 - every, rng=rng)
                settled, end = (float(np.mean(shares[name][part])) for part in ("settled", "end"))
                worst = min(float(np.mean(v)) for part, v in shares[name].items() if part.startswith("at "))
                better = probability_of_improvement(shares[OURS]["all"], every) if name != OURS else float("nan")
                paired = float(np.mean(np.array(shares[OURS]["all"]) > every))
                print(
                    f"  {name:17}{spread!s:25}{settled:9.4f}{end:8.4f}{worst:9.4f}{lost.value:9.4f}"
                    + ("" if name == OURS else f"  {better:.2f} (paired {paired:.2f})")
                )
                summary.append(
                    {
                        "table": table.name,
                        "shift": shift.name,
                        "chooser": name,
                        "iqm": [spread.value, spread.low, spread.high],
                        "settled": settled,
                        "end": end,
                        "worst": worst,
                        "ours_better": None if name == OURS else better,
                    }
                )
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
