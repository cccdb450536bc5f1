"""Rounds a second of `SpecRL/Simulated-v0`, one environment and vectorised, on one core.

    python benchmarks/simulated.py [--num_envs 2048] [--batch_size 1,8,16,32] [--profile ...]

Random actions, drawn beforehand; the median over slices of 50 steps, and the slowest and fastest. Prints a line for
each form and, last, one line of JSON; the aim is 2,000,000 rounds a second vectorised, and at least 500,000.
"""

from __future__ import annotations

import argparse
import json
import os

import gymnasium as gym
import numpy as np

import specrl  # noqa: F401  (registers the environment)
from specrl.core.clock import WallClock


def vectorised(num_envs: int, slices: int, **kwargs) -> list[float]:  # type: ignore[no-untyped-def]
    env = gym.make_vec("SpecRL/Simulated-v0", num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    env.reset(seed=0)
    rng, clock = np.random.default_rng(0), WallClock()
    rates = []
    for _ in range(slices + 1):
        actions = rng.integers(env.single_action_space.n, size=(50, num_envs))
        began = clock.now()
        for action in actions:
            env.step(action)
        rates.append(50 * num_envs / (clock.now() - began))
    return rates[1:]


def single(rounds: int, **kwargs) -> float:  # type: ignore[no-untyped-def]
    env = gym.make("SpecRL/Simulated-v0", max_rounds=rounds + 1, **kwargs)
    env.reset(seed=0)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=rounds)
    clock = WallClock()
    began = clock.now()
    for action in actions:
        env.step(action)
    return rounds / (clock.now() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_envs", type=int, default=2048)
    parser.add_argument("--slices", type=int, default=20)
    parser.add_argument("--batch_size", default="1,8,16,32", help="drawn by each episode")
    parser.add_argument("--profile", default="aurora-qwen3-coder-next-fp8")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kwargs = {"profile": args.profile, "batch_size": [int(part) for part in args.batch_size.split(",")]}
    rates = vectorised(args.num_envs, args.slices, **kwargs)
    median = float(np.median(rates))
    alone = single(2000, **kwargs)
    print(f"vectorised, {args.num_envs} environments: {median:,.0f} rounds/s ({min(rates):,.0f} .. {max(rates):,.0f})")
    print(f"one environment: {alone:,.0f} rounds/s")
    print(json.dumps({"vectorised": median, "low": min(rates), "high": max(rates), "single": alone}))


if __name__ == "__main__":
    main()
