"""Plan choosers against each other on simulated rounds: tables x shifts x seeds, every chooser on the same luck.

    python benchmarks/choosers.py [--seeds 20] [--rounds 3600] [--only adaptive,sglang] [--output_dir DIR]

Prints, for each table and shift, the share of the best plan per batch size that each chooser had (interquartile mean
over seeds and its bootstrap interval), the regret, and the probability that ours does better; then a line for each
bar, with its figure, that says PASS or FAIL. Writes the share of every seed to shares.csv and the bars to bars.json in
`output_dir`. The last line is JSON. Nothing here is timed, so the machine may do other work meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specrl.agents.choosers.registry import CHOOSERS, Known, make_chooser
from specrl.agents.choosers.table import ClairvoyantLength, FixedPlan
from specrl.core.clock import WallClock
from specrl.core.interfaces import PlanChooser
from specrl.core.statistics import mean_interval, probability_of_improvement, stratified_iqm
from specrl.measure.machine import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chooser_scripts import FLAT, SHIFTS, STEADY, TABLES, Script, Shift, Table

OURS = "adaptive"
Make = Callable[[Script, int], PlanChooser]
Shares = dict[str, dict[str, list[float]]]  # chooser -> window -> one per seed


class Bar(NamedTuple):
    """Something that must hold: `value` at least `limit`, or below it where `what` says so."""

    what: str
    value: float
    limit: float
    holds: bool


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
RULES = ("throughput", "throughput-0", "throughput-eager")  # as proposed, and made stronger by us


def windows(script: Script) -> dict[str, np.ndarray]:
    """Which rounds count: all; from the 300th of each batch size on; 500 after the shift; the last 600."""
    rounds, at = np.arange(script.rounds), script.shift.at
    out = {"all": rounds >= at, "end": rounds >= script.rounds - 600}
    out["settled"] = (rounds >= at + 500) if at else (script.visits() >= 300)
    return out


def play(
    table: Table, shift: Shift, names: list[str], rounds: int, bursts: float, seed: int
) -> dict[str, dict[str, float]]:
    """Shares by chooser and window; 'at B' is that of the settled rounds at batch size B."""
    script = Script(table, rounds, seed=seed, shift=shift, bursts=bursts)
    parts = windows(script)
    for batch in script.loads:
        parts[f"at {batch}"] = parts["settled"] & (script.batches == batch)
    out: dict[str, dict[str, float]] = {}
    for name in names:
        chosen = script.play(MAKERS[name](script, seed))
        lucky = name == "clairvoyant"
        out[name] = {part: script.share(chosen, where, lucky=lucky) for part, where in parts.items() if where.any()}
    return out


def worst(shares: dict[str, list[float]]) -> float:
    """The least mean share at a batch size."""
    return min(float(np.mean(found)) for part, found in shares.items() if part.startswith("at "))


def constant(table: Table) -> float:
    """The least share at a batch size of the single plan that has the highest such."""
    script = Script(table, 600, seed=0)
    runs = [script.play(FixedPlan(plan)) for plan in table.plans]
    return max(min(script.share(chosen, script.batches == b) for b in script.loads) for chosen in runs)


def bars(table: Table, shift: Shift, shares: Shares) -> list[Bar]:
    """What must show on a table under a shift, of the choosers that played."""
    ours, out = shares[OURS], []

    def least(what: str, value: float, limit: float) -> None:
        out.append(Bar(f"{table.name}, {shift.name}: {what}", value, limit, value >= limit))

    if shift is STEADY:
        alone = constant(table)
        what = f"{table.name}: the best constant plan's share at its worst batch size, below"
        out.append(Bar(what, alone, 0.98, alone < 0.98))
        least("share after 300 rounds of each batch size", float(np.mean(ours["settled"])), 0.98)
        least("the same at the worst batch size", worst(ours), 0.98)
        least("share at the end", float(np.mean(ours["end"])), 0.99)
        if "sglang-same" in shares:
            better = probability_of_improvement(ours["all"], shares["sglang-same"]["all"])
            least("P(better than SGLang's rule with the same plans)", better, 0.9)
        for name in (n for n in RULES if n in shares):
            least(f"share less that of {name}", float(np.mean(ours["all"]) - np.mean(shares[name]["all"])), -0.005)
    else:
        least("share from 500 rounds after the shift on", float(np.mean(ours["settled"])), 0.98)
        for name in (n for n in RULES if n in shares):
            least(f"P(better than {name})", probability_of_improvement(ours["all"], shares[name]["all"]), 0.9)
    return out


def show(table: Table, shift: Shift, shares: Shares, rng: np.random.Generator) -> list[dict[str, object]]:
    """Print the table of choosers; the same as rows."""
    print(f"\n{table.name}, {shift.name}: share of the best plan per batch size")
    heads = f"{'settled':>9}{'end':>8}{'worst B':>9}{'regret':>9}"
    print(f"  {'chooser':17}{'all (IQM, 95 %)':25}{heads}  P(ours better)")
    rows: list[dict[str, object]] = []
    for name, found in shares.items():
        every = np.array(found["all"])
        spread, lost = stratified_iqm(every[:, None], rng=rng), mean_interval(1.0 - every, rng=rng)
        settled, end = (float(np.mean(found[part])) for part in ("settled", "end"))
        better = probability_of_improvement(shares[OURS]["all"], every) if name != OURS else None
        paired = float(np.mean(np.array(shares[OURS]["all"]) > every))
        print(
            f"  {name:17}{spread!s:25}{settled:9.4f}{end:8.4f}{worst(found):9.4f}{lost.value:9.4f}"
            + ("" if better is None else f"  {better:.2f} (paired {paired:.2f})"),
            flush=True,
        )
        row = {
            "table": table.name,
            "shift": shift.name,
            "chooser": name,
            "iqm": [spread.value, spread.low, spread.high],
        }
        rows.append({**row, "settled": settled, "end": end, "worst": worst(found), "ours_better": better})
    return rows


def write(directory: Path, every: dict[tuple[str, str], Shares], found: list[Bar], results: dict[str, Any]) -> None:
    """shares.csv, a row per table, shift, chooser and window; bars.json."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "shares.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["table", "shift", "chooser", "window", *(f"seed {seed}" for seed in results["seeds"])])
        for (table, shift), shares in every.items():
            for name, parts in shares.items():
                for part in ("all", "settled", "end"):
                    writer.writerow([table, shift, name, part, *(f"{value:.5f}" for value in parts[part])])
    results |= {"bars": [bar._asdict() for bar in found]}
    (directory / "bars.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first_seed", type=int, default=0, help="develop on others than those of the result")
    parser.add_argument("--rounds", type=int, default=3600, help="of a run; six batch sizes share them")
    parser.add_argument("--only", default="", help="choosers, separated by commas; ours is always there")
    parser.add_argument("--shift", default="", help="one of steady, costlier, worse, better; all by default")
    parser.add_argument("--table", default="", help="one of the tables; all by default")
    parser.add_argument("--bursts", type=float, default=0.0, help="share of rounds in bursts of five 1.5x slower ones")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output_dir", type=Path, help="where shares.csv and bars.json go")
    args = parser.parse_args()
    clock = WallClock()
    began = clock.now()
    wanted = [OURS, *(n for n in args.only.split(",") if n and n != OURS)] if args.only else list(MAKERS)
    rng, summary = np.random.default_rng(0), []
    every: dict[tuple[str, str], Shares] = {}
    found: list[Bar] = []
    with multiprocessing.Pool(args.workers) as pool:
        for shift in (s for s in (STEADY, *SHIFTS) if args.shift in ("", s.name)):
            for table in (t for t in (*TABLES, FLAT) if args.table in ("", t.name)):
                names = [n for n in wanted if shift is STEADY or n in ON_SHIFTS]
                job = partial(play, table, shift, names, args.rounds, args.bursts)
                runs = pool.map(job, range(args.first_seed, args.first_seed + args.seeds))
                shares = {name: {part: [p[name][part] for p in runs] for part in runs[0][name]} for name in names}
                every[table.name, shift.name] = shares
                summary += show(table, shift, shares, rng)
                if table is not FLAT:
                    found += bars(table, shift, shares)
    print(f"\nNo bars are held on {FLAT.name}: a single plan is nearly best at all of its batch sizes but 1.")
    for bar in found:
        print(f"{'PASS' if bar.holds else 'FAIL'}  {bar.what}: {bar.value:.4f} (bar {bar.limit})")
    seconds = clock.now() - began
    print(f"{sum(bar.holds for bar in found)} of {len(found)} bars hold; {seconds:.0f} s with {args.workers} processes")
    if args.output_dir is not None:
        seeds = list(range(args.first_seed, args.first_seed + args.seeds))
        results = {"seeds": seeds, "rounds": args.rounds, "seconds": round(seconds), "environment": environment()}
        write(args.output_dir, every, found, results)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
