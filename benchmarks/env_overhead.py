"""What the environment adds to a round outside the engine, at batch 1.

    python benchmarks/env_overhead.py [--rounds 600] [--plan 3]

Overhead = time of `env.step` - the round's own seconds - what measuring plain decoding took. Prefill and first
rounds are left out. Prints a line and, last, one line of JSON; the aim is under 2 % of the round.
"""

from __future__ import annotations

import argparse
import json

import gymnasium as gym
import numpy as np

import specrl  # noqa: F401  (registers the environment)
from specrl.core.interfaces import Session
from specrl.measure.machine import keep_large_blocks


class Stopwatch:
    """Adds up the seconds spent in a method of a session."""

    def __init__(self, session: Session, name: str, clock) -> None:  # type: ignore[no-untyped-def]
        self.seconds = 0.0
        method = getattr(session, name)

        def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
            began = clock.now()
            result = method(*args, **kwargs)
            self.seconds += clock.now() - began
            return result

        setattr(session, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--plan", type=int, default=3, help="index of the plan (3: 3/1/4)")
    args = parser.parse_args()
    keep_large_blocks()
    env = gym.make("SpecRL/SpecDecode-v0", batch_size=1, max_rounds=args.rounds + 50, ignore_eos=True).unwrapped
    env.reset(seed=0)
    clock = env.engine.clock
    inside = [Stopwatch(env._session, name, clock) for name in ("round", "measure_plain")]
    added, rounds = [], []
    for index in range(args.rounds + 50):
        for watch in inside:
            watch.seconds = 0.0
        began = clock.now()
        *_, info = env.step(args.plan)
        step_s = clock.now() - began
        if index >= 50 and info["prefill_s"] == 0.0:
            added.append(step_s - sum(watch.seconds for watch in inside))
            rounds.append(info["round"].seconds)
    env.close()
    overhead_s, round_s = float(np.median(added)), float(np.median(rounds))
    print(f"round {round_s * 1e3:.3f} ms, environment {overhead_s * 1e6:.0f} us: {overhead_s / round_s:.2%}")
    print(json.dumps({"round_ms": round_s * 1e3, "overhead_us": overhead_s * 1e6, "share": overhead_s / round_s}))


if __name__ == "__main__":
    main()
