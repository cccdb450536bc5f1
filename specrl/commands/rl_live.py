"""`specrl rl live`: train a policy that chooses plans with deep reinforcement learning, on live decoding."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.rl.sb3 import Agent, AgentConfig
from specrl.config import EngineConfig, check_batch_sizes
from specrl.io.output import OutputDir
from specrl.training.rl import live_world, train_policy


def rl_live(
    *,
    agent: AgentConfig = AgentConfig(),
    engine: EngineConfig = EngineConfig(),
    target: str = "embedded",
    draft: Path | None = None,
    temperature: float = 0.7,
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32),
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
        engine: where it decodes.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, of which almost no token is accepted.
        temperature: of sampling; 0 is greedy.
        batch_sizes: of which each episode draws one.
        plans: on offer, separated by commas; by default the policy's, else 0 to 4/1/5.
        reward: by name, as the environments have it.
        seed: of weights, exploration and environments.
        output_dir: where results go; by default runs/rl-live-<time>.

    Raises:
        ValueError: an argument out of range, or a policy that does not fit.

    Example:
        specrl rl live --agent.policy runs/sim --draft runs/quickstart/draft --batch_sizes 1,4 --agent.seconds 120
    """
    sizes = check_batch_sizes(batch_sizes)
    world = live_world(
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
    return train_policy(agent, world, batch_sizes=sizes, seed=seed, directory=directory)
