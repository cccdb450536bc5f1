"""Whether a recorded profile, replayed in simulation, predicts the live speedup of plans that it was not fitted to.

    python benchmarks/replay.py --draft DIR [--seconds 240] [--seed 0] [--output DIR]

Blocks of 8 rounds of every plan and of plain steps take turns, as in `specrl profile`. The profile is fitted to the
plain steps and plans 0, 1/1/2, 3/1/4 and 5/1/6; 2/1/3 and 4/1/5 ran in the same minutes, because the speed of a shared
machine changes from one minute to the next. Then the simulated engine replays these turns from the profile, ten times
as long. Live or replayed, a speedup is the geometric mean of paired blocks, as in `specrl bench`.

Prints, for each plan and batch size, the live speedup with its 95 % interval, and the replay's. One in twenty of exact
predictions lies outside such an interval, so 'joint' is the interval that holds for all plans not in the fit at once,
95 times in a hundred (Bonferroni). The last line is JSON; --output keeps it, the profile and the blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specrl.config import TargetConfig, WorkloadConfig
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.core.statistics import Interval, paired_speedup
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.measure.machine import environment, keep_large_blocks
from specrl.measure.recording import record_blocks
from specrl.models.draft import load_draft
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.fit import Block, fit_recording

FITTED, HELD_OUT, BATCHES = (Plan(0), Plan(1), Plan(3), Plan(5)), (Plan(2), Plan(4)), (1, 4, 16)
PLANS = sorted((*FITTED, *HELD_OUT))
LONGER = 10  # times the live run, so that the replay's own error is small beside it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    output = OutputDir(args.output) if args.output else None  # before anything is measured that could be lost
    keep_large_blocks()
    target, workload = TargetConfig(), WorkloadConfig()
    live = LocalEngine(target.load(), load_draft(args.draft), max_context=workload.max_context)
    prompts = workload.open(target.name, "held_out")
    blocks = record_blocks(live, prompts, BATCHES, PLANS, seconds=args.seconds, seed=args.seed)
    live.close()
    kept = [block for block in blocks if block.kind[1] not in HELD_OUT]
    source = {"kind": "recording", "source": "benchmarks/replay.py", "environment": environment()}
    profile = fit_recording(
        "replay", source, kept, prompt_tokens=workload.prompt_tokens, max_new_tokens=workload.max_new_tokens
    )
    simulated = SimulatedEngine(profile, extrapolate=True)
    requests = Requests((workload.prompt_tokens,) * 2, (workload.max_new_tokens,) * 2)
    replayed = record_blocks(simulated, requests, BATCHES, PLANS, seconds=LONGER * args.seconds, seed=args.seed)
    rows = [compare(blocks, replayed, batch, plan) for batch in BATCHES for plan in PLANS]
    print(f"{'batch':>5} {'plan':7}{'fitted':>7}{'live [95 %]':>23}{'joint':>17}{'replay':>8}{'difference':>12}")
    for row in rows:
        predicted, (_, low, high), (wide_low, wide_high) = row["replay"], row["live"], row["joint"]
        outside = (
            "" if low <= predicted <= high else "  outside" if wide_low <= predicted <= wide_high else "  outside both"
        )
        print(
            f"{row['batch_size']:5} {row['plan']:7}{'yes' if row['fitted'] else 'no':>7}"
            f"{Interval(*row['live'])!s:>23}{f'[{wide_low:.3f}, {wide_high:.3f}]':>17}{predicted:8.3f}"
            f"{predicted / row['live'][0] - 1.0:12.1%}{outside}"
        )
    results = {"seed": args.seed, "passes": len(blocks) // (2 * len(rows)), "draft": str(args.draft), "rows": rows}
    if output:
        output.write_text("profile.json", profile.to_json())
        output.write_text("replay.json", json.dumps(results | {"environment": environment()}, indent=1) + "\n")
        arrays = {"seconds": [b.seconds for b in blocks], "batch_size": [b.kind[0] for b in blocks]}
        plans = [str(b.kind[1] or "plain") for b in blocks]
        tokens = [[int(r.tokens.sum()) if isinstance(r, Round) else 1 for r in b.rounds] for b in blocks]
        np.savez_compressed(output.path / "blocks.npz", plan=plans, tokens=tokens, **arrays)
    print(json.dumps(results))


def compare(live: Sequence[Block], replayed: Sequence[Block], batch: int, plan: Plan) -> dict[str, object]:
    """The live speedup of a plan at a batch size, and the replay's."""
    measured = speedup(live, batch, plan, 0.95)
    joint = speedup(live, batch, plan, 1.0 - 0.05 / (len(HELD_OUT) * len(BATCHES)))
    return {
        "batch_size": batch,
        "plan": str(plan),
        "fitted": plan in FITTED,
        "live": [measured.value, measured.low, measured.high],
        "joint": [joint.low, joint.high],
        "replay": speedup(replayed, batch, plan, 0.95).value,
    }


def speedup(blocks: Sequence[Block], batch: int, plan: Plan, level: float) -> Interval:
    """Of the plan's blocks over the plain steps after each."""
    pairs = [(b, after) for b, after in zip(blocks[::2], blocks[1::2], strict=True) if b.kind == (batch, plan)]
    plain_s = [float(after.seconds.mean()) for _, after in pairs]  # per token of each request
    tokens = [sum(int(r.tokens.sum()) for r in b.rounds if isinstance(r, Round)) / batch for b, _ in pairs]
    spent_s = [float(b.seconds.sum()) / n for (b, _), n in zip(pairs, tokens, strict=True)]
    return paired_speedup(plain_s, spent_s, level=level, rng=np.random.default_rng(0))


if __name__ == "__main__":
    main()
