"""Every loss on the same recorded traffic and budget, then against the clock.

    python benchmarks/losses.py run [--seeds 5] [--updates 500] [--requests 400] [--output DIR] [--drafts DIR]
    python benchmarks/losses.py train [...]            # only what takes no timings, for a busy machine; then 'run'
    python benchmarks/losses.py report [--output DIR]

Traffic: the embedded target at temperature 0.7 serves with a draft that has learnt from 300 requests (5/1/6, sampled
drafts), so that it holds rejected drafts too; the next `--requests` of them are recorded once for each seed. Every
loss then trains a draft from the same random initialisation, with the default learner's settings otherwise and the same
draws of 4 requests. The drafts are measured in turns with plain decoding on held-out prompts, plan 3/1/4, at batch
sizes 1, 4 and 16. `seconds_saved` counts with the costs of the recorded profile `embedded-fp32`; `seconds_saved, unit
costs` with the same formula and every round at the cost of a plain one (what the clock contributes is the difference).

P(better): the probability that a seed's speedup at batch 1 is above forward KL's on the same traffic, in pairs of a
seed (ties count half) and between any two seeds. Raw data: one JSON for each seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.config import DraftConfig as NewDraft
from specrl.config import MeasureConfig
from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import PlanCost
from specrl.core.plan import Plan
from specrl.core.statistics import mean_interval, probability_of_improvement
from specrl.decoding.engine import LocalEngine
from specrl.measure.machine import environment, keep_large_blocks
from specrl.measure.paired import Arm, measure
from specrl.models.draft import Draft, load_draft
from specrl.models.target import Target, load_target
from specrl.simulation.profile import load_profile
from specrl.training.loop import OnlineLoop
from specrl.training.quickstart import TARGET as TARGET_CONFIG
from specrl.training.quickstart import WORKLOAD
from specrl.training.quickstart import open_requests as _workload

TARGET, PROMPT, NEW = TARGET_CONFIG.name, WORKLOAD.prompt_tokens, WORKLOAD.max_new_tokens
PROFILE = "embedded-fp32"
SERVED, TIMED, BATCHES = Plan(5), Plan(3), (1, 4, 16)
REFERENCE = "forward_kl"
ARMS: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "forward_kl at 0.7": {"temperature": None},
    "reverse_kl": {"loss": "reverse_kl"},
    "next_token": {"loss": "next_token"},
    "total_variation at 0.7": {"loss": "total_variation", "temperature": None},
    "lk at 0.7": {"loss": "lk", "temperature": None},
    "forward_kl + lk": {"loss": "forward_kl:0.5+lk:0.5", "temperature": None},
    "forward_kl + rejected": {"rejected_weight": 0.5},
    "accept_length": {"loss": "accept_length", "temperature": None},
    "seconds_saved": {"loss": "seconds_saved", "temperature": None},
    "seconds_saved, unit costs": {"loss": "seconds_saved", "temperature": None},
    "forward_kl + seconds_saved": {"loss": "forward_kl:0.5+seconds_saved:0.5", "temperature": None},
}


def recorded(target: Target, seed: int, requests: int) -> list[TrainingSequence]:
    """Traffic served with a draft that has learnt a little."""
    draft = NewDraft().load(target, seed=50 + seed)
    learner = OnlineLearner(draft, target.embedding, LearnerConfig(), seed=seed)
    engine = LocalEngine(target, draft, max_context=PROMPT + NEW)
    loop = OnlineLoop(engine, _workload("train"), FixedPlan(SERVED), learner, [Phase(16)], seed=seed)
    while loop.requests < 300:
        loop.step()
    loop.close()
    session = engine.start(_workload("train"), batch_size=16, seed=10_000 + seed, trace=True)
    assembler, kept = Assembler(keep_rejected=True), list[TrainingSequence]()
    while len(kept) < requests:
        session.round(SERVED)
        kept += assembler.add(session.drain())
    engine.close()
    return kept[:requests]


def plan_costs(*, unit: bool) -> list[PlanCost]:
    """t0 and T of plain decoding and of the chains that were recorded, at every batch size."""
    profile = load_profile(PROFILE)
    chains = [plan for plan in profile.plans if plan.topk == 1]
    return [
        PlanCost(batch, plan.num_steps, 1.0, 1.0)
        if unit
        else PlanCost(batch, plan.num_steps, profile.cost(batch, None).seconds, profile.cost(batch, plan).seconds)
        for batch in BATCHES
        for plan in chains
    ]


def train(
    target: Target, seed: int, arm: str, traffic: list[TrainingSequence], updates: int
) -> tuple[Draft, list[float]]:
    """A draft learnt by one loss; and the mean odds of a first draft to stand, over each tenth of the updates."""
    draft = NewDraft().load(target, seed=seed)
    learner = OnlineLearner(draft, target.embedding, LearnerConfig(**ARMS[arm]), seed=seed)
    if "seconds_saved" in learner.config.loss:
        learner.set_plan_costs(plan_costs(unit="unit" in arm))
    rng, alphas = np.random.default_rng(seed), []
    for _ in range(updates):
        drawn = [traffic[i] for i in rng.choice(len(traffic), 4, replace=False)]
        alphas.append(learner.update(drawn).get("alpha_1", float("nan")))
    return Draft(draft.config, dict(learner.weights()[1])), np.array(alphas).reshape(10, -1).mean(1).tolist()


def trained(seed: int, updates: int, requests: int, kept: Path) -> tuple[dict[str, Draft], dict[str, list[float]]]:
    """The drafts of all losses, and the course of each; those kept in the directory are not learnt again."""
    course = kept / f"seed{seed}.json"
    places = {arm: kept / f"seed{seed}" / arm.replace(" ", "_") for arm in ARMS}
    if course.exists():
        return {arm: load_draft(place) for arm, place in places.items()}, json.loads(course.read_text())
    target = load_target(TARGET)
    traffic = recorded(target, seed, requests)
    courses = {}
    for arm, place in places.items():
        draft, courses[arm] = train(target, seed, arm, traffic, updates)
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.save(place)
        print(f"  seed {seed} {arm}: alpha {courses[arm][-1]:.3f}", flush=True)
    course.write_text(json.dumps(courses))
    return {arm: load_draft(place) for arm, place in places.items()}, courses


def run(seed: int, updates: int, requests: int, seconds: float, kept: Path) -> dict[str, Any]:
    """All losses on one recording, timed."""
    drafts, courses = trained(seed, updates, requests, kept)
    target = load_target(TARGET)
    plain = LocalEngine(target, max_context=PROMPT + NEW)
    engines = {arm: LocalEngine(target, draft, max_context=PROMPT + NEW) for arm, draft in drafts.items()}
    rows = []
    for batch in BATCHES:
        arms = [Arm("plain", plain, None)]
        arms += [Arm(arm, engine, TIMED) for arm, engine in engines.items()]
        until = MeasureConfig(precision=0.01, seconds=seconds)
        found = measure(arms, _workload("held_out"), batch_size=batch, block_tokens=NEW, until=until, seed=seed)
        for each in found[1:]:
            assert each.speedup is not None
            interval = [each.speedup.value, each.speedup.low, each.speedup.high]
            rows.append(
                {"loss": each.name, "batch_size": batch, "accept_length": each.accept_length, "speedup": interval}
            )
    return {
        "seed": seed, "updates": updates, "requests": requests, "rows": rows, "alpha": courses,
        "environment": environment(),
    }  # fmt: skip


def report(directory: Path) -> None:
    """The table of all seeds in a directory."""
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("seed*.json"))]
    rng, summary = np.random.default_rng(0), []

    def of(arm: str, batch: int, key: str) -> np.ndarray:
        found = [r[key] for one in runs for r in one["rows"] if r["loss"] == arm and r["batch_size"] == batch]
        return np.array([x[0] if isinstance(x, list) else x for x in found])

    print(f"{len(runs)} seeds, {runs[0]['updates']} updates of 4 requests, plan {TIMED}; mean over seeds [95 %]")
    heads = "".join(f"{f'speedup, batch {b}':>26}" for b in BATCHES)
    print(f"{'loss':28}{'accept length':>24}{heads}{'P(better), paired':>20}")
    for arm in ARMS:
        cells = []
        for values in (of(arm, 1, "accept_length"), *(of(arm, batch, "speedup") for batch in BATCHES)):
            cells.append(mean_interval(values, rng=rng) if len(values) > 1 else values[0])
        ours, theirs = of(arm, 1, "speedup"), of(REFERENCE, 1, "speedup")
        better, paired = probability_of_improvement(ours, theirs), float(np.mean(ours > theirs))
        shown = "" if arm == REFERENCE else f"{better:.2f}, {paired:.2f}"
        print(f"{arm:28}{cells[0]!s:>24}" + "".join(f"{c!s:>26}" for c in cells[1:]) + f"{shown:>20}")
        summary.append({"loss": arm, "better": None if arm == REFERENCE else better, "cells": [str(c) for c in cells]})
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "train", "report"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=40.0, help="of measuring, for each batch size")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "losses")
    parser.add_argument("--drafts", type=Path, default=Path("runs") / "losses", help="where drafts are kept")
    args = parser.parse_args()
    keep_large_blocks()
    if args.what == "train":
        for seed in range(args.seeds):
            trained(seed, args.updates, args.requests, args.drafts)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds if args.what == "run" else 0):
        path = args.output / f"seed{seed}.json"
        if not path.exists():
            path.write_text(json.dumps(run(seed, args.updates, args.requests, args.seconds, args.drafts)) + "\n")
    report(args.output)


if __name__ == "__main__":
    main()
