"""A draft that guesses on `SpecRL/DraftTokens-v0`: the least that an agent can do, and what guessing costs.

The output is the target's own whatever is drafted; only the clock tells. Run it: python examples/draft_random.py
"""

from __future__ import annotations

import argparse

import gymnasium as gym

import specrl  # noqa: F401  registers the environments


def main(rounds: int = 64, batch_size: int = 4, allow_parallel: bool = False) -> dict[str, float]:
    env = gym.make(
        "SpecRL/DraftTokens-v0", batch_size=batch_size, max_rounds=rounds, num_steps=4, allow_parallel=allow_parallel
    )
    env.action_space.seed(0)
    env.reset(seed=0)
    over, accepted = False, 0.0
    while not over:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        accepted += info["accept_length"] / rounds
        over = terminated or truncated
    env.close()
    print(f"random: {accepted:.2f} tokens a round, {info['episode_speedup']:.2f} times as fast as plain decoding")
    return {"accept_length": accepted, "speedup": info["episode_speedup"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    main(**vars(parser.parse_args()))
