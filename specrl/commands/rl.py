"""`specrl rl`: train a policy that chooses plans with deep reinforcement learning, in simulation or live."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.rl.sb3 import Agent, AgentConfig
from specrl.config import EngineConfig, check_batch_sizes
from specrl.io.output import OutputDir
from specrl.training.rl import live_task, simulated_task, train_policy

BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32)


def rl(
    *,
    agent: AgentConfig = AgentConfig(),
    profile: str = "aurora-qwen3-coder-next-fp8",
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    plans: str | None = None,
    reward: str = "differential",
    seed: int = 0,
    output_dir: Path | None = None,
) -> Agent:
    """Train an agent of Stable-Baselines3 that chooses the plan of every round, in simulation.

    Writes policy.safetensors and policy.json (the policy; no pickle), plans.json (a plan per batch size, for serving),
    curve.csv (speedup while learning) and results.json.

    With 'observe: batch_size' in the hyperparameters, as for maskable_ppo, the policy sees the batch size only, and
    plans.json is the policy at every batch size up to the largest. With 'observe: all' plans.json holds the plan that
    the policy chooses most often, and the share of its choices that agree is printed.

    Args:
        agent: algorithm and length of the training.
        profile: a shipped profile or a .json file of `specrl profile`.
        batch_sizes: of which each episode draws one.
        plans: on offer, separated by commas; by default the policy's, else all of the profile.
        reward: by name, as the environments have it.
        seed: of weights, exploration and environments.
        output_dir: where results go; by default runs/rl-<time>.

    Example:
        specrl rl --agent maskable_ppo --agent.seconds 60 --output_dir runs/sim
        specrl rl live --agent.policy runs/sim --draft runs/quickstart/draft --batch_sizes 1,4 --agent.seconds 120
    """
    sizes = check_batch_sizes(batch_sizes)
    task = simulated_task(agent, profile=profile, batch_sizes=sizes, plans=plans, reward=reward)
    directory = None if output_dir is None else OutputDir(output_dir)
    return train_policy(agent, task, batch_sizes=sizes, profile=profile, seed=seed, directory=directory)


def rl_live(
    *,
    agent: AgentConfig = AgentConfig(),
    engine: EngineConfig = EngineConfig(),
    target: str = "embedded",
    draft: Path | None = None,
    temperature: float = 0.7,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
    plans: str | None = None,
    reward: str = "differential",
    seed: int = 0,
    output_dir: Path | None = None,
) -> Agent:
    """Train an agent of Stable-Baselines3 that chooses the plan of every round, on live decoding.

    Rounds are timed, so run nothing else meanwhile. Choosing with torch counts as the chooser's time, updates of the
    agent do not. Files are those of `specrl rl`.

    Args:
        agent: algorithm and length of the training.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, of which almost no token is accepted.
        temperature: of sampling; 0 is greedy.
        batch_sizes: of which each episode draws one.
        plans: on offer, separated by commas; by default the policy's, else 0 to 4/1/5.
        reward: by name, as the environments have it.
        seed: of weights, exploration and environments.
        output_dir: where results go; by default runs/rl-live-<time>.

    Example:
        specrl rl live --agent.policy runs/sim --draft runs/quickstart/draft --batch_sizes 1,4 --agent.seconds 120
    """
    sizes = check_batch_sizes(batch_sizes)
    task = live_task(
        agent,
        engine=engine,
        target=target,
        draft=draft,
        temperature=temperature,
        batch_size=sizes,
        plans=plans,
        reward=reward,
    )
    directory = None if output_dir is None else OutputDir(output_dir)
    return train_policy(agent, task, batch_sizes=sizes, seed=seed, directory=directory)
