"""Reinforcement learning of a policy that chooses the plan of every round, in simulation or on live decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from specrl.agents.choosers.policy_network import NetworkChooser, load_chooser
from specrl.agents.rl.distill import Distilled, distill, tabulate
from specrl.agents.rl.sb3 import Agent, AgentConfig, make_agent
from specrl.config import EngineConfig
from specrl.core.plan import Plan
from specrl.envs import SIMULATED, SPEC_DECODE
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.evaluation.policy_report import Report, report
from specrl.export.bundle import PLANS
from specrl.io.output import OutputDir, show, table
from specrl.measure.machine import environment
from specrl.simulation.profile import load_profile

EPISODE_ROUNDS = {SIMULATED: 256, SPEC_DECODE: 128}  # each episode has one batch size
LIVE_PLANS = "0,1/1/2,2/1/3,3/1/4,4/1/5"
_DISTILLED_ROUNDS = 1024  # of live decoding, from which a table is made


class Task(NamedTuple):
    """The environment of an agent."""

    name: str  # id of the environment
    env: VectorEnv[Any, Any, Any]  # one environment or many, reset in the step that ends an episode
    plans: tuple[Plan, ...]  # in the order of the actions
    allowed: NDArray[np.bool_]  # [n], plans that can run at every batch size
    paused_timer: Callable[[], AbstractContextManager[None]] | None  # on live decoding: its time is not charged
    hyperparameters: dict[str, Any]  # of the agent, for this environment


def simulated_task(
    agent: AgentConfig, *, profile: str, batch_sizes: Sequence[int], plans: str | None, reward: str
) -> Task:
    """Make many simulated environments on one profile; by default with the plans of the policy or the profile."""
    hyperparameters = agent.read_hyperparameters(SIMULATED)
    env = SimulatedVectorEnv(
        int(hyperparameters.get("n_envs", 1)),
        profile=profile,
        batch_size=batch_sizes,
        plans=plans or _plans_of(agent.policy),
        reward=reward,
        max_rounds=EPISODE_ROUNDS[SIMULATED],
        autoreset_mode=AutoresetMode.SAME_STEP,
        stagger=True,
    )
    return Task(SIMULATED, env, env.plans, env.action_masks()[0], None, hyperparameters)


def live_task(agent: AgentConfig, *, engine: EngineConfig, plans: str | None, **settings: Any) -> Task:
    """Make one environment on live decoding; by default with the plans of the agent's policy, or `LIVE_PLANS`.

    `settings` are arguments of `specrl.envs.spec_decode.SpecDecodeEnv`.
    """
    hyperparameters = agent.read_hyperparameters(SPEC_DECODE)
    env = SpecDecodeEnv(
        engine=engine.name,
        engine_options=engine.options() or None,
        plans=plans or _plans_of(agent.policy) or LIVE_PLANS,
        max_rounds=EPISODE_ROUNDS[SPEC_DECODE],
        **settings,
    )
    return Task(SPEC_DECODE, as_vector(env), env.plans, env.action_masks(), env.paused_timer, hyperparameters)


def as_vector(env: SpecDecodeEnv) -> VectorEnv[Any, Any, Any]:
    """Make a vector of one environment, which is reset in the step that ends an episode."""
    return SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)


def train_policy(
    config: AgentConfig,
    task: Task,
    *,
    batch_sizes: Sequence[int],
    profile: str | None = None,
    seed: int = 0,
    directory: OutputDir | None = None,
) -> Agent:
    """Train an agent, print the plans that it chooses, and write the policy to `directory` if there is one.

    The task is closed. The policy is compared with the best plans in a simulation of `profile`, if there is one.

    Raises:
        ValueError: plans that the algorithm cannot handle, or a policy that does not fit.
    """
    from specrl.agents.rl.sb3_vector import RLTrainingLog

    if config.algo != "maskable_ppo" and not task.allowed.all():
        able = ",".join(str(plan) for plan, can in zip(task.plans, task.allowed, strict=True) if can)
        raise ValueError(
            f"plans must be valid at every batch size for {config.algo}, which has no action masks; set plans to "
            f"{able}, or agent.algo to maskable_ppo"
        )
    hyper = task.hyperparameters
    agent = make_agent(config.algo, task.env, hyper, plans=task.plans, allowed=task.allowed.tolist(), seed=seed)
    if config.policy is not None:
        agent.load(config.policy)
    curve = RLTrainingLog(config.seconds, task.paused_timer)
    agent.model.learn(config.n_timesteps or int(hyper["n_timesteps"]), callback=curve)
    chooser, compared = agent.chooser(), None
    if profile is None:
        distilled = distill(*_run_policy(task.env, chooser), task.plans)
    else:
        compared = report(chooser, load_profile(profile), batch_sizes, seed=seed + 1)
        distilled = compared.distilled
    task.env.close()
    _show(distilled, compared)
    if directory is not None:
        plans = tabulate(chooser, max(batch_sizes)) if chooser.network.is_table else distilled.table
        agent.save(directory.path)
        directory.write_json(PLANS, {"plans": plans.state_dict()})
        directory.write_csv("curve.csv", curve.rows)
        results: dict[str, Any] = {"algorithm": config.algo, "task": task.name, "seconds": curve.seconds}
        results |= {"timesteps": agent.model.num_timesteps, "environment": environment()}
        if compared is not None:
            results |= {"share_of_best": compared.share, "share_by_batch_size": compared.by_batch_size}
            results |= {"share_of_table": compared.table_share, "best": compared.best.state_dict()}
        results |= {"plans": plans.state_dict(), "agreement": distilled.agreement, "states": distilled.states}
        directory.write_json("results.json", results)
        show(f"written: {directory.path}")
    return agent


def _show(distilled: Distilled, compared: Report | None) -> None:
    rows: list[dict[str, object]] = []
    for size in distilled.by_batch_size:
        row: dict[str, object] = {"batch size": size, "plan": str(distilled.table.best(size))}
        if compared is not None:
            row |= {"best": str(compared.best.best(size)), "share of best": compared.by_batch_size[size]}
        rows.append(row)
    if compared is not None:
        share, table_share = compared.share, compared.table_share
        show(f"{share:.1%} of the speed of the best plans in simulation; as a table {table_share:.1%}")
    agreement, states = distilled.agreement, distilled.states
    show(table(rows), f"{agreement:.1%} of its choices are those of this table, in {states:,} states")


def _plans_of(policy: Path | None) -> str | None:
    return None if policy is None else ",".join(map(str, load_chooser(policy).plans))


def _run_policy(env: VectorEnv[Any, Any, Any], chooser: NetworkChooser) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Run a policy; return batch sizes and actions, [S] int64 each."""
    vectors, _ = env.reset()
    state = chooser.network.start(len(vectors))
    sizes, choices = [], []
    for _ in range(_DISTILLED_ROUNDS):
        actions, state = chooser.act(vectors, state)
        sizes.append(np.rint(2.0 ** (10.0 * vectors[:, 0])).astype(np.int64))
        choices.append(actions)
        vectors, *_ = env.step(actions)
    return np.concatenate(sizes), np.concatenate(choices)
