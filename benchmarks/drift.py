"""After a shift of traffic: a draft that goes on learning, against the same draft frozen, by the clock.

    python benchmarks/drift.py run [--shifts ...] [--seeds 3] [--before 400] [--after 400] [--output DIR] [--drafts DIR]
    python benchmarks/drift.py train [...]             # only what takes no timings, for a busy machine; then 'run'
    python benchmarks/drift.py report [--output DIR]

The draft learns from random initialisation on `--before` requests of the first traffic (embedded target, temperature
0.7, 16 at a time, 5/1/6, the default learner). Then the traffic shifts. One copy goes on learning from it, the other is
frozen. Every so many requests both are measured at batch 1 on held-out prompts of the new traffic, in turns in one
process with plain decoding, each with lookahead 1, 3 and 5: the ratio is that of the adapting draft's best lookahead
over the frozen draft's best lookahead, from paired blocks, with its 95 % interval. Learning itself is off this clock,
as on a machine of its own; its seconds are printed beside it.

Traffic: stdlib (what the target was trained on), pydoc_data (prose), encodings (tables), tests. Raw data: one JSON for
each shift and seed.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.config import DraftConfig as NewDraft
from specrl.config import MeasureConfig
from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.core.statistics import Interval, mean_interval, paired_speedup
from specrl.decoding.engine import LocalEngine
from specrl.measure.machine import environment, keep_large_blocks
from specrl.measure.paired import Arm, ArmResult, measure, seconds_per_token
from specrl.models.draft import Draft, load_draft
from specrl.models.target import Target, load_target
from specrl.training.loop import OnlineLoop
from specrl.training.quickstart import TARGET as TARGET_CONFIG
from specrl.training.quickstart import WORKLOAD
from specrl.workloads.stream import open_stream
from specrl.workloads.text import Split

TARGET, PROMPT, NEW = TARGET_CONFIG.name, WORKLOAD.prompt_tokens, WORKLOAD.max_new_tokens
SHIFTS = ("stdlib,encodings", "stdlib,pydoc_data", "encodings,stdlib", "pydoc_data,stdlib", "encodings,pydoc_data")
SERVED, TIMED, BATCH = Plan(5), (Plan(1), Plan(3), Plan(5)), 16
PROBES = (0, 50, 100, 200, 400)  # requests after the shift


def workload(name: str, split: Split) -> Workload:
    """Traffic by name."""
    return open_stream(
        name,
        TARGET,
        prompt_tokens=PROMPT,
        max_new_tokens=NEW,
        temperature=0.7,
        ignore_eos=True,
        split=split,
    )


def loop_on(engine: LocalEngine, learner: OnlineLearner, traffic: Workload, seed: int) -> OnlineLoop:
    """Serves and learns."""
    return OnlineLoop(engine, traffic, FixedPlan(SERVED), learner, [Phase(BATCH)], seed=seed)


def trained(shift: str, seed: int, before: int, after: int, kept: Path) -> tuple[list[Draft], dict[str, Any]]:
    """The draft as it was at every probe, and the course of it; what is kept in the directory is not learnt again."""
    place, names = kept / name_of(shift, seed), [str(probe) for probe in PROBES if probe <= after]
    path = place / "course.json"
    if not path.exists():
        first, then = (name.strip() for name in shift.split(","))
        target = load_target(TARGET)
        draft = NewDraft().load(target, seed=seed)
        learner = OnlineLearner(draft, target.embedding, LearnerConfig(), seed=seed)
        engine = LocalEngine(target, draft, max_context=PROMPT + NEW)
        loop = loop_on(engine, learner, workload(first, "train"), seed)
        while loop.requests < before:
            loop.step()
        loop.close()
        course, probes, recent = [], [], deque[float](maxlen=60)
        loop = loop_on(engine, learner, workload(then, "train"), seed + 100)
        for due in names:
            while loop.requests < int(due):
                recent.append(loop.step().round.accept_length)
                if loop.rounds % 30 == 0:
                    course.append([loop.requests, sum(recent) / len(recent)])
            probes.append({"requests": loop.requests, "learn_s": loop.learn_s})
            place.mkdir(parents=True, exist_ok=True)
            Draft(draft.config, dict(learner.weights()[1])).save(place / due)
            print(f"  {shift} seed {seed}: {due} requests after the shift", flush=True)
        loop.close()
        engine.close()
        path.write_text(json.dumps({"before": before, "course": course, "probes": probes}))
    return [load_draft(place / due) for due in names], json.loads(path.read_text())


def run(shift: str, seed: int, before: int, after: int, seconds: float, kept: Path) -> dict[str, Any]:
    """One shift: at every probe the draft as it was then against the first of them, which was frozen."""
    drafts, course = trained(shift, seed, before, after, kept)
    target, traffic = load_target(TARGET), shift.split(",")[1].strip()
    for draft, probe in zip(drafts, course["probes"], strict=True):
        probe |= compare(target, drafts[0], draft, traffic, seconds)
        print(f"  {shift} seed {seed}, {probe['requests']} requests after: {probe['ratio']}", flush=True)
    return {"shift": shift, "seed": seed, **course, "environment": environment()}


def name_of(shift: str, seed: int) -> str:
    """Of its files."""
    return f"{shift.replace(',', '-to-')}-seed{seed}"


def compare(target: Target, frozen: Draft, now: Draft, traffic: str, seconds: float) -> dict[str, Any]:
    """Both drafts and plain decoding at batch 1, in turns."""
    plain = LocalEngine(target, max_context=PROMPT + NEW)
    arms = [Arm("plain", plain, None)]
    for name, draft in (("frozen", frozen), ("adapting", now)):
        engine = LocalEngine(target, draft, max_context=PROMPT + NEW)
        arms += [Arm(f"{name} {plan}", engine, plan) for plan in TIMED]
    until = MeasureConfig(precision=0.005, seconds=seconds)
    prompts = workload(traffic, "held_out")
    results = measure(arms, prompts, batch_size=1, block_tokens=NEW, until=until, seed=11)
    of_frozen, of_adapting = (
        max((m for m in results if m.name.startswith(name)), key=lambda m: m.total_tps)
        for name in ("frozen", "adapting")
    )
    times = [seconds_per_token(m.blocks) for m in (of_frozen, of_adapting)]
    ratio: Interval = paired_speedup(times[0], times[1], rng=np.random.default_rng(0))
    return {
        "ratio": [ratio.value, ratio.low, ratio.high],
        "frozen": _told(of_frozen),
        "adapting": _told(of_adapting),
        "all": [_told(m) for m in results],
    }


def _told(m: ArmResult) -> dict[str, Any]:
    speedup = None if m.speedup is None else [m.speedup.value, m.speedup.low, m.speedup.high]
    return {"name": m.name, "tps": m.total_tps, "speedup": speedup, "accept_length": m.accept_length}


def report(directory: Path) -> None:
    """The table of all runs in a directory."""
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    rng, summary = np.random.default_rng(0), []
    for shift in dict.fromkeys(r["shift"] for r in runs):
        mine = [r for r in runs if r["shift"] == shift]
        print(f"{shift}: {len(mine)} seeds; adapting over frozen, batch 1")
        for at, probe in enumerate(PROBES[: len(mine[0]["probes"])]):
            ratios = [r["probes"][at]["ratio"] for r in mine]
            logs = np.log([ratio[0] for ratio in ratios])
            spread = mean_interval(logs, rng=rng) if len(logs) > 1 else None
            over = f"[{np.exp(spread.low):.3f}, {np.exp(spread.high):.3f}] over seeds" if spread else ""
            each = ", ".join(f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in ratios)
            lengths = [[r["probes"][at][k]["accept_length"] for r in mine] for k in ("frozen", "adapting")]
            taus = " -> ".join(f"{np.mean(x):.2f}" for x in lengths)
            print(f"  {probe:4d} requests: {np.exp(logs.mean()):.3f} {over}  accept length {taus}  each: {each}")
            never_below = all(ratio[2] >= 1.0 for ratio in ratios)
            summary.append(
                {"shift": shift, "requests": probe, "ratio": float(np.exp(logs.mean())), "never_below": never_below}
            )
    print(json.dumps(summary))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "train", "report"))
    parser.add_argument("--shifts", nargs="+", default=SHIFTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=400)
    parser.add_argument("--after", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each probe")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "drift")
    parser.add_argument("--drafts", type=Path, default=Path("runs") / "drift", help="where drafts are kept")
    args = parser.parse_args()
    keep_large_blocks()
    for seed in range(args.seeds if args.what != "report" else 0):
        for shift in args.shifts:
            if args.what == "train":
                trained(shift, seed, args.before, args.after, args.drafts)
                continue
            args.output.mkdir(parents=True, exist_ok=True)
            path = args.output / f"{name_of(shift, seed)}.json"
            if not path.exists():
                found = run(shift, seed, args.before, args.after, args.seconds, args.drafts)
                path.write_text(json.dumps(found) + "\n")
    if args.what == "train":
        return
    report(args.output)


if __name__ == "__main__":
    main()
