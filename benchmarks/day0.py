"""From a random draft on live traffic: requests and seconds until it accepts, and until it pays, by training recipe.

    python benchmarks/day0.py run [--arms ours,aurora,card,tuned] [--seeds 5] [--requests 2000] [--output DIR]
    python benchmarks/day0.py tune [--output DIR]      # learning rate and sync interval of 'tuned', on another seed
    python benchmarks/day0.py report [--output DIR]    # the table again, from the raw data

All arms: the embedded target at temperature 0.7, 16 requests at a time, lookahead 5 (5/1/6), the same random draft,
prompts and sampling seeds. Arms:
  ours    the default of `specrl train`
  aurora  Aurora's released code: AdamW 1e-4, betas 0.9/0.999, clip 2.5, 8 requests an update, each used once, five
          passes of forward KL weighted 0.8^k, served every 400 requests
  card    the card of Aurora-Spec-Qwen3-Coder-Next-FP8: 1e-4, five passes, 10 requests an update, next-token loss and
          KL 1.0 each; served every 800 requests as the MiniMax cards say, for this card does not
  tuned   'aurora' with learning rate and sync interval tuned for this target, and each request used four times, so that
          the learner computes at least as much as ours (sequences times passes for every request)

Accept length is that of the last 150 rounds (16 requests each). Where it has reached 1.8, the speedup at batch 1 is
measured with plan 3/1/4 against plain decoding in turns, every 100 requests at most. A run that ends before a mark
is censored there. Raw data: one JSON for each arm and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.config import DraftConfig as NewDraft
from specrl.config import MeasureConfig
from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import DraftLearner
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.core.statistics import probability_of_improvement
from specrl.decoding.engine import LocalEngine
from specrl.measure.machine import environment, keep_large_blocks
from specrl.measure.paired import Arm, measure
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft
from specrl.models.target import load_target
from specrl.training.loop import OnlineLoop
from specrl.training.quickstart import TARGET as TARGET_CONFIG
from specrl.training.quickstart import WORKLOAD
from specrl.training.quickstart import open_requests as _workload

TARGET, PROMPT, NEW = TARGET_CONFIG.name, WORKLOAD.prompt_tokens, WORKLOAD.max_new_tokens
PLAN, PROBED, BATCH = Plan(5), Plan(3), 16
MARKS = (1.5, 2.0, 2.5)
WINDOW, EVERY, WORTH = 150, 100, 1.8  # rounds; requests between two probes; accept length from which a probe is made
AURORA: dict[str, Any] = {
    "learning_rate": 1e-4, "betas": (0.9, 0.999), "max_grad_norm": 2.5, "ttt_steps": 5, "ttt_decay": 0.8,
    "ema_decay": 0.0,
}  # fmt: skip
OURS = "ours"
RATES, SYNCS = (1e-2, 3e-3, 1e-3), (64, 200)  # that 'tuned' is chosen from, at first served every 16 requests


class OncePerTrace(DraftLearner):
    """Learns as the published recipes do: requests are taken in order, so many for each update, and then dropped.

    Args:
        draft, embedding, config: as for `OnlineLearner`, whose updates these are.
        per_update: requests of an update.
        sync: requests between two drafts that serve.
        reuse: updates made of the same requests.
    """

    def __init__(
        self, draft: Draft, embedding: Tensor, config: LearnerConfig, *, per_update: int, sync: int, reuse: int = 1
    ) -> None:
        self._learner, self._assembler = OnlineLearner(draft, embedding, config), Assembler()
        self._per_update, self._sync, self._reuse = per_update, sync, reuse
        self._waiting: list[TrainingSequence] = []
        self._requests, self._serving = 0, (0, self._learner.weights()[1])

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces, make the updates that are due."""
        metrics: Mapping[str, float] = {}
        for sequence in self._assembler.add(traces):
            self._waiting.append(sequence)
            self._requests += 1
            if len(self._waiting) == self._per_update:
                for _ in range(self._reuse):
                    metrics = self._learner.update(self._waiting)
                self._waiting = []
            if self._requests % self._sync == 0:
                self._serving = self._requests // self._sync, self._learner.weights()[1]
        return metrics

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """What serves."""
        return self._serving


def learner_of(arm: str, draft: Draft, embedding: Tensor, seed: int, tuned: Mapping[str, float]) -> Any:
    """The learner of an arm, and how many requests the loop gathers before it asks it."""
    if arm == OURS:
        return OnlineLearner(draft, embedding, LearnerConfig(), seed=seed), 16
    if arm == "aurora":
        return OncePerTrace(draft, embedding, LearnerConfig(**AURORA), per_update=8, sync=400), 8
    if arm == "card":
        config = LearnerConfig(**{**AURORA, "loss": "next_token:1.0+forward_kl:1.0"})
        return OncePerTrace(draft, embedding, config, per_update=10, sync=800), 10
    config = LearnerConfig(**{**AURORA, "learning_rate": tuned["learning_rate"]})
    return OncePerTrace(draft, embedding, config, per_update=8, sync=int(tuned["sync"]), reuse=4), 8


def run(arm: str, seed: int, requests: int, tuned: Mapping[str, float], *, probe: bool = True) -> dict[str, Any]:
    """One run: when each mark was reached, and the course of it all."""
    target, workload = load_target(TARGET), _workload("train")
    draft = NewDraft().load(target, seed=seed)
    learner, every = learner_of(arm, draft, target.embedding, seed, tuned)
    engine = LocalEngine(target, draft, max_context=PROMPT + NEW)
    loop = OnlineLoop(
        engine, workload, FixedPlan(PLAN), learner, [Phase(BATCH)], weight_sync_interval=every, seed=1000 + seed
    )
    recent: deque[float] = deque(maxlen=WINDOW)
    reached: dict[str, dict[str, float]] = {}
    course: list[dict[str, float]] = []
    probes: list[dict[str, float]] = []
    probed, probing_cpu = -EVERY, 0.0

    def now() -> dict[str, float]:
        cpu_s = time.process_time() - probing_cpu
        return {"requests": loop.requests, "cpu_s": cpu_s, "serve_s": loop.serve_s, "learn_s": loop.learn_s}

    began = time.process_time()
    probing_cpu = began
    while loop.requests < requests and len(reached) < len(MARKS) + probe:
        recent.append(loop.step().round.accept_length)
        length = sum(recent) / len(recent)
        for mark in MARKS:
            if length >= mark and len(recent) == WINDOW:
                reached.setdefault(str(mark), now())
        if loop.rounds % 50 == 0:
            course.append({**now(), "accept_length": length})
        if probe and "speedup" not in reached and length >= WORTH and loop.requests >= probed + EVERY:
            probed, before = loop.requests, time.process_time()
            found = speedup_now(target, draft.config, learner)
            probes.append({"requests": loop.requests, **found})
            probing_cpu += time.process_time() - before
            if found["low"] > 1.0:
                reached["speedup"] = now()
    loop.close()
    ended = now()
    engine.close()
    return {
        "arm": arm, "seed": seed, "reached": reached, "ended": ended, "course": course, "probes": probes,
        "tuned": dict(tuned) if arm == "tuned" else None, "environment": environment(),
    }  # fmt: skip


def speedup_now(target: Any, shape: DraftArchitecture, learner: Any) -> dict[str, float]:
    """Speedup of the draft that serves, at batch 1 on held-out prompts."""
    draft = Draft(shape, dict(learner.weights()[1]))
    fast, plain = LocalEngine(target, draft, max_context=PROMPT + NEW), LocalEngine(target, max_context=PROMPT + NEW)
    arms = [Arm("plain", plain, None), Arm("draft", fast, PROBED)]
    until = MeasureConfig(precision=0.03, seconds=10.0)
    found = measure(arms, _workload("held_out"), batch_size=1, block_tokens=NEW, until=until, seed=7)[1].speedup
    fast.close()
    plain.close()
    return {"speedup": found.value, "low": found.low, "high": found.high}


def tune(directory: Path, requests: int = 500) -> dict[str, float]:
    """Learning rate, then sync interval of 'tuned': those that first reach 2.0, or else come furthest."""
    table: list[dict[str, Any]] = []

    def tried(rate: float, sync: int) -> None:
        result = run("tuned", 100, requests, {"learning_rate": rate, "sync": sync}, probe=False)
        length = max((at["accept_length"] for at in result["course"]), default=1.0)
        to_2 = result["reached"].get("2.0", {}).get("requests")
        table.append({"learning_rate": rate, "sync": sync, "accept_length": length, "requests_to_2": to_2})
        print(table[-1], flush=True)

    def best() -> dict[str, Any]:
        return min(table, key=lambda row: (row["requests_to_2"] or 1e9, -row["accept_length"]))

    for rate in RATES:
        tried(rate, 16)
    for sync in SYNCS:
        tried(best()["learning_rate"], sync)
    (directory / "tuned.json").write_text(json.dumps({"best": best(), "grid": table}, indent=1) + "\n")
    return best()


def report(directory: Path) -> None:
    """The table of all runs in a directory."""
    runs = [json.loads(path.read_text()) for path in sorted(directory.glob("*-seed*.json"))]
    arms = list(dict.fromkeys(r["arm"] for r in runs))
    print(f"{'arm':8}{'mark':>9}{'reached':>9}{'requests: median [least, most]':>34}{'CPU s':>9}{'learner s':>11}")
    medians: dict[tuple[str, str], list[float]] = {}
    for arm in arms:
        mine = [r for r in runs if r["arm"] == arm]
        for mark in (*map(str, MARKS), "speedup"):
            ends = [r["reached"].get(mark, {"requests": np.inf, "cpu_s": np.inf, "learn_s": np.inf}) for r in mine]
            needed = [e["requests"] for e in ends]
            medians[arm, mark] = needed
            at, least, most = np.median(needed), min(needed), max(needed)
            censored = _censored(mine, mark)
            text = f"{_count(at, censored)} [{_count(least, censored)}, {_count(most, censored)}]"
            cpu, learn = (float(np.median([e[k] for e in ends])) for k in ("cpu_s", "learn_s"))
            print(f"{arm:8}{mark:>9}{sum(np.isfinite(needed)):>6}/{len(mine)}{text:>34}{cpu:9.0f}{learn:11.0f}")
    if OURS in arms:
        for arm in arms:
            if arm != OURS and medians[OURS, "2.0"] and medians[arm, "2.0"]:
                ours, theirs = ([min(x, 1e12) for x in medians[a, "2.0"]] for a in (OURS, arm))
                censored = _censored([r for r in runs if r["arm"] == arm], "2.0")
                ratio = np.median(ours) / min(float(np.median(theirs)), censored)
                bound = "at most " if np.median(theirs) > 1e9 else ""
                better = 1.0 - probability_of_improvement(ours, theirs)
                print(f"to 2.0: ours needs {bound}{ratio:.2f} of {arm}'s requests; P(fewer) = {better:.2f}")
    summary = {f"{arm} {mark}": [x if np.isfinite(x) else None for x in xs] for (arm, mark), xs in medians.items()}
    print(json.dumps(summary))


def _censored(runs: list[dict[str, Any]], mark: str) -> float:
    """Requests up to which no run had reached the mark, among those that never did."""
    return min((r["ended"]["requests"] for r in runs if mark not in r["reached"]), default=np.inf)


def _count(value: float, censored: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else f">{censored:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "tune", "report"))
    parser.add_argument("--arms", default="ours,aurora,card,tuned")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "day0")
    args = parser.parse_args()
    keep_large_blocks()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.what == "tune":
        print("best:", tune(args.output))
    if args.what == "run":
        wanted = args.arms.split(",")
        known = args.output / "tuned.json"
        if "tuned" in wanted and not known.exists():
            parser.error(f"'tuned' needs {known}: run '{os.path.basename(__file__)} tune' first")
        tuned = json.loads(known.read_text())["best"] if known.exists() else {}
        for seed in range(args.seeds):
            for arm in wanted:
                path = args.output / f"{arm}-seed{seed}.json"
                if path.exists():
                    continue
                result = run(arm, seed, args.requests, tuned)
                path.write_text(json.dumps(result) + "\n")
                marks = {mark: at["requests"] for mark, at in result["reached"].items()}
                print(f"{arm} seed {seed}: {marks}, ended after {result['ended']['requests']} requests", flush=True)
    if args.what in ("run", "report"):
        report(args.output)


if __name__ == "__main__":
    main()
