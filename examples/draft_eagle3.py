"""An EAGLE3 draft on `SpecRL/DraftTokens-v0`, verified by rejection sampling, and learnt by REINFORCE if asked to.

Without --draft it starts at random and stands for nothing; `make quickstart` learns one. Run it:
python examples/draft_eagle3.py --draft runs/quickstart-.../draft
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym

import specrl
from specrl.agents.draft.actor import DraftActor
from specrl.agents.draft.reinforce import Reinforce
from specrl.envs.draft_tokens import DraftTokensEnv
from specrl.models.draft import Draft

NUM_STEPS, TEMPERATURE = 4, 0.7


def play(env: DraftTokensEnv, actor: DraftActor, learner: Reinforce | None, seed: int) -> dict[str, float]:
    """One episode. A learner draws its drafts itself, to be verified by the target's choices alone."""
    observation, info = env.reset(seed=seed)
    over, lengths = False, []
    while not over:
        with env.paused_timer():  # prefill, and learning
            actor.read(info["prefills"])
            if learner is not None:
                learner.see(observation, info)
        tokens, _ = actor.act(observation, draw=env.draw if learner is None else None)
        ids = info["request_ids"]
        observation, reward, terminated, truncated, info = env.step(tokens.numpy())
        if learner is not None:
            with env.paused_timer():
                learner.record(ids.tolist(), tokens, info["round"].correct_drafts.tolist(), reward)
        lengths.append(info["accept_length"])
        over = terminated or truncated
    return {"accept_length": sum(lengths) / len(lengths), "speedup": info["episode_speedup"]}


def main(
    draft: str | Path | None = None,
    rounds: int = 64,
    batch_size: int = 4,
    episodes: int = 0,
    allow_parallel: bool = False,
) -> dict[str, float]:
    made = gym.make(
        "SpecRL/DraftTokens-v0",
        batch_size=batch_size,
        temperature=TEMPERATURE,
        max_rounds=rounds,
        num_steps=NUM_STEPS,
        allow_parallel=allow_parallel,
    )
    env = made.unwrapped
    assert isinstance(env, DraftTokensEnv)
    target = env.engine.target
    weights: Draft = specrl.load_draft(draft) if draft else specrl.new_draft(target, intermediate_size=256)
    actor = DraftActor(
        weights,
        target,
        rows=batch_size,
        num_steps=NUM_STEPS,
        max_context=env.engine.max_context,
        temperature=TEMPERATURE,
    )
    learner = Reinforce(weights, target.embedding, num_steps=NUM_STEPS, temperature=TEMPERATURE)
    for episode in range(episodes):
        found = play(env, actor, learner, seed=episode + 1)
        print(f"episode {episode + 1}: {found['accept_length']:.2f} tokens a round", learner.update())
        version, learnt = learner.weights()
        actor.load(learnt, version=version)
    found = play(env, actor, None, seed=0)
    print(
        f"EAGLE3: {found['accept_length']:.2f} tokens a round, {found['speedup']:.2f} times as fast as plain decoding"
    )
    made.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", default=None, help="a directory in SGLang's EAGLE3 layout")
    parser.add_argument("--rounds", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--episodes", type=int, default=0, help="to learn from before")
    main(**vars(parser.parse_args()))
