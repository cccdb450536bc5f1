"""An n-gram draft on `SpecRL/DraftTokens-v0`: it goes on as the request's own text went on before.

Prompt lookup: find where the last two tokens (or the last one) stood before, and draft what followed; draft nothing
where they never stood. It costs no model, only the time of a search. Run it: python examples/draft_ngram.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

import specrl  # noqa: F401  registers the environments


class NgramDraft:
    """Remembers each request's tokens, and where every pair and every token last stood in it."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.tokens: dict[int, list[int]] = {}
        self.after: dict[int, dict[tuple[int, ...], int]] = {}  # by request: n-gram -> position that followed it

    def see(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Remember what is new."""
        for prefill in info["prefills"]:
            self.tokens[prefill.request_id], self.after[prefill.request_id] = [], {}
            self._extend(prefill.request_id, prefill.tokens.tolist())
        for row, request in enumerate(info["request_ids"].tolist()):
            here = (observation["mask"][row] == 1) & (observation["positions"][row] >= len(self.tokens[request]))
            self._extend(request, observation["tokens"][row][here].tolist())

    def _extend(self, request: int, new: list[int]) -> None:
        tokens, after = self.tokens[request], self.after[request]
        for token in new:
            for n in (1, 2):  # the n-gram that ends before this token is known to be followed by it
                if len(tokens) >= n:
                    after[tuple(tokens[-n:])] = len(tokens)
            tokens.append(token)

    def act(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> NDArray[np.int64]:
        """Drafts [B, K] of the live requests, -1 where there are none."""
        action = np.full((len(observation["live"]), self.num_steps), -1)
        for row, request in enumerate(info["request_ids"].tolist()):
            tokens, after = self.tokens[request], self.after[request]
            at = after.get(tuple(tokens[-2:]), after.get(tuple(tokens[-1:])))
            if at is not None:
                found = tokens[at : at + self.num_steps]
                action[row, : len(found)] = found
        return action


def main(rounds: int = 64, batch_size: int = 4, allow_parallel: bool = False) -> dict[str, float]:
    env = gym.make(
        "SpecRL/DraftTokens-v0", batch_size=batch_size, max_rounds=rounds, num_steps=4, allow_parallel=allow_parallel
    )
    agent = NgramDraft(num_steps=4)
    observation, info = env.reset(seed=0)
    over, accepted = False, 0.0
    while not over:
        agent.see(observation, info)
        observation, _, terminated, truncated, info = env.step(agent.act(observation, info))
        accepted += info["accept_length"] / rounds
        over = terminated or truncated
    env.close()
    print(f"n-gram: {accepted:.2f} tokens a round, {info['episode_speedup']:.2f} times as fast as plain decoding")
    return {"accept_length": accepted, "speedup": info["episode_speedup"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    main(**vars(parser.parse_args()))
