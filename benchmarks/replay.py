"""Whether a recorded profile predicts the live speedup of plans that it was not fitted to.

    python benchmarks/replay.py --draft DIR [--seconds 100] [--output DIR]

Blocks of 8 rounds of every plan and of plain steps take turns, as in `specrl profile`. The profile is fitted to plans
0, 1/1/2, 3/1/4 and 5/1/6 alone; 2/1/3 and 4/1/5 ran in the same minutes, because the speed of a shared machine
changes from one minute to the next. Prints, for each plan and batch size, the live speedup with its 95 % interval and
the profile's. The last line is JSON; with --output the profile is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from specrl.apps.malloc import keep_large_blocks
from specrl.apps.output import environment
from specrl.apps.profile import record
from specrl.apps.quickstart import NEW, PROMPT, TARGET, _workload
from specrl.engines.fit_recording import Block, fit_recording
from specrl.engines.local import LocalEngine
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.plan import Plan
from specrl.rounds import Round
from specrl.statistics import ratio_of_sums

FITTED, HELD_OUT, BATCHES = (Plan(0), Plan(1), Plan(3), Plan(5)), (Plan(2), Plan(4)), (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keep_large_blocks()
    engine = LocalEngine(load_target(TARGET), load_draft(args.draft), max_context=PROMPT + NEW)
    plans = sorted((*FITTED, *HELD_OUT))
    blocks = record(engine, _workload("held_out"), BATCHES, plans, seconds=args.seconds, seed=0)
    pairs = list(zip(blocks[::2], blocks[1::2], strict=True))  # a plan's rounds, and the plain steps after them
    kept = [block for pair in pairs if _plan(pair[0]) in FITTED for block in pair]
    source = {"kind": "recording", "source": "benchmarks/replay.py", "environment": environment()}
    profile = fit_recording("replay", source, kept, prompt_tokens=PROMPT, max_new_tokens=NEW)
    rows, rng = [], np.random.default_rng(0)
    print(f"{'batch':>5} {'plan':7}{'fitted':>8}{'live [95 %]':>26}{'profile':>9}")
    for batch in BATCHES:
        for plan in plans[1:]:
            mine = [p for p in pairs if _plan(p[0]) == plan and p[0].rounds[0].batch_size == batch]
            plain_s = [float(np.mean([step.seconds for step in plain.rounds])) for _, plain in mine]
            tokens = [sum(r.tokens.sum() / batch for r in b.rounds) for b, _ in mine]
            spent = [sum(r.seconds for r in b.rounds) for b, _ in mine]
            live = ratio_of_sums(np.multiply(plain_s, tokens), spent, rng=rng)  # means, as the profile's are
            told = profile.speedup(batch, plan, extrapolate=True)
            inside = live.low <= told <= live.high
            print(
                f"{batch:5} {plan!s:7}{'yes' if plan in FITTED else 'no':>8}{live!s:>26}{told:9.3f}"
                + ("" if inside else "  outside")
            )
            rows.append(
                {
                    "batch_size": batch,
                    "plan": str(plan),
                    "fitted": plan in FITTED,
                    "live": [live.value, live.low, live.high],
                    "profile": told,
                    "inside": inside,
                }
            )
    engine.close()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "profile.json").write_text(profile.to_json())
    print(json.dumps(rows))


def _plan(block: Block) -> Plan:
    first = block.rounds[0]
    assert isinstance(first, Round)
    return first.plan


if __name__ == "__main__":
    main()
