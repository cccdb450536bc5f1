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
from specrl.agents.choosers.table import PlanTable
from specrl.agents.rl.distill import Distilled, distill, tabulate
from specrl.agents.rl.sb3 import Agent, AgentConfig, make_agent
from specrl.config import EngineConfig
from specrl.core.plan import Plan
from specrl.envs import SIMULATED, SPEC_DECODE
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.evaluation.policy_report import Report, report
from specrl.export.bundle import PLANS, read_plans
from specrl.io.output import OutputDir, show, table
from specrl.measure.machine import environment
from specrl.simulation.profile import load_profile

EPISODE_ROUNDS = {SIMULATED: 256, SPEC_DECODE: 128}  # each episode has one batch size
LIVE_PLANS = "0,1/1/2,2/1/3,3/1/4,4/1/5"
_VISITED_ROUNDS = 1024  # from which a table is made on live decoding


class World(NamedTuple):
    """What an agent learns in."""

    task: str  # id of the environment
    env: VectorEnv[Any, Any, Any]  # one environment or many, reset in the step that ends an episode
    plans: tuple[Plan, ...]  # in the order of the actions
    allowed: NDArray[np.bool_]  # [n], plans that can be run at every batch size
    paused_timer: Callable[[], AbstractContextManager[None]] | None  # on live decoding: time not charged to the chooser
    hyperparameters: dict[str, Any]  # of the agent, for this task


def simulated_world(
    agent: AgentConfig, *, profile: str, batch_sizes: Sequence[int], plans: str | None, reward: str
) -> World:
    """Many simulated environments on one profile; by default with the plans of the agent's policy or the profile."""
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
    return World(SIMULATED, env, env.plans, env.action_masks()[0], None, hyperparameters)


def live_world(agent: AgentConfig, *, engine: EngineConfig, plans: str | None, **settings: Any) -> World:
    """One environment on live decoding; by default with the plans of the agent's policy, or `LIVE_PLANS`.

    Args:
        agent: settings of the agent.
        engine: where it decodes.
        plans: on offer, separated by commas.
        **settings: of the environment (`specrl.envs.spec_decode.SpecDecodeEnv`).
    """
    hyperparameters = agent.read_hyperparameters(SPEC_DECODE)
    env = SpecDecodeEnv(
        engine=engine.name,
        engine_options=engine.options() or None,
        plans=plans or _plans_of(agent.policy) or LIVE_PLANS,
        max_rounds=EPISODE_ROUNDS[SPEC_DECODE],
        **settings,
    )
    return World(SPEC_DECODE, as_vector(env), env.plans, env.action_masks(), env.off_the_clock, hyperparameters)


def as_vector(env: SpecDecodeEnv) -> VectorEnv[Any, Any, Any]:
    """One live environment as a vector of one, reset in the step that ends an episode."""
    return SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)


def train_policy(
    agent: AgentConfig,
    world: World,
    *,
    batch_sizes: Sequence[int],
    profile: str | None = None,
    seed: int = 0,
    directory: OutputDir | None = None,
) -> Agent:
    """Train an agent, print the plans that it chooses, and write the policy.

    Args:
        agent: its settings.
        world: to learn in; it is closed.
        batch_sizes: of the episodes.
        profile: on which the policy is compared with the best plans; None: it is not compared.
        seed: of weights, exploration and the comparison.
        directory: where the policy is written; None: nowhere.

    Raises:
        ValueError: plans that the algorithm cannot handle, or a policy that does not fit.
    """
    from specrl.agents.rl.sb3_vector import RLTrainingLog

    if agent.algo != "maskable_ppo" and not world.allowed.all():
        able = ",".join(str(plan) for plan, can in zip(world.plans, world.allowed, strict=True) if can)
        raise ValueError(
            f"plans must be valid at every batch size for {agent.algo}, which has no action masks; set plans to "
            f"{able}, or agent.algo to maskable_ppo"
        )
    hyper = world.hyperparameters
    learning = make_agent(agent.algo, world.env, hyper, plans=world.plans, allowed=world.allowed.tolist(), seed=seed)
    if agent.policy is not None:
        learning.load(agent.policy)
    curve = RLTrainingLog(agent.seconds, world.paused_timer)
    learning.model.learn(agent.n_timesteps or int(hyper["n_timesteps"]), callback=curve)
    chooser, compared = learning.chooser(), None
    if profile is None:
        found = distill(*_visit(world.env, chooser), world.plans)
    else:
        compared = report(chooser, load_profile(profile), batch_sizes, seed=seed + 1)
        found = compared.distilled
    world.env.close()
    _show(found, compared)
    if directory is not None:
        served = tabulate(chooser, max(batch_sizes)) if chooser.network.is_table else found.table
        learning.save(directory.path)
        directory.write_json(PLANS, {"plans": served.state_dict()})
        _verify(directory.path, learning, served, max(batch_sizes))
        directory.write_csv("curve.csv", curve.rows)
        results: dict[str, Any] = {"algorithm": agent.algo, "task": world.task, "seconds": curve.seconds}
        results |= {"timesteps": learning.model.num_timesteps, "environment": environment()}
        if compared is not None:
            results |= {"share_of_best": compared.share, "share_by_batch_size": compared.by_batch_size}
            results |= {"share_of_table": compared.table_share, "best": compared.best.state_dict()}
        results |= {"plans": served.state_dict(), "agreement": found.agreement, "states": found.states}
        directory.write_json("results.json", results)
        show(f"written: {directory.path}")
    return learning


def _show(found: Distilled, compared: Report | None) -> None:
    rows: list[dict[str, object]] = []
    for size in found.by_batch_size:
        row: dict[str, object] = {"batch size": size, "plan": str(found.table.best(size))}
        if compared is not None:
            row |= {"best": str(compared.best.best(size)), "share of best": compared.by_batch_size[size]}
        rows.append(row)
    if compared is not None:
        show(
            f"{compared.share:.1%} of the speed of the best plans in simulation; as a table {compared.table_share:.1%}"
        )
    show(table(rows), f"{found.agreement:.1%} of its choices are those of this table, in {found.states:,} states")


def _plans_of(policy: Path | None) -> str | None:
    return None if policy is None else ",".join(map(str, load_chooser(policy).plans))


def _visit(env: VectorEnv[Any, Any, Any], chooser: NetworkChooser) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Batch sizes and choices, [S] int64 each, of rounds in which a policy chooses the plans."""
    vectors, _ = env.reset()
    state = chooser.network.start(len(vectors))
    sizes, choices = [], []
    for _ in range(_VISITED_ROUNDS):
        actions, state = chooser.act(vectors, state)
        sizes.append(np.rint(2.0 ** (10.0 * vectors[:, 0])).astype(np.int64))
        choices.append(actions)
        vectors, *_ = env.step(actions)
    return np.concatenate(sizes), np.concatenate(choices)


def _verify(directory: Path, agent: Agent, served: PlanTable, max_batch_size: int) -> None:
    """Read back what was written, and compare the choices of policy and table in 1,000 random states.

    Raises:
        ValueError: they differ from what was written, or a policy that sees only the batch size from its table.
    """
    rng, space = np.random.default_rng(0), agent.model.observation_space
    low, high = (getattr(space, name) for name in ("low", "high"))
    vectors = rng.uniform(low, high, size=(1000, len(low))).astype(np.float32)
    sizes = rng.integers(1, max_batch_size, size=1000, endpoint=True)
    vectors[:, 0] = np.log2(sizes) / 10.0
    own, saved, table = agent.chooser(), load_chooser(directory), PlanTable(dict(read_plans(directory / PLANS)))
    actions, again = (c.act(vectors, c.network.start(1000))[0] for c in (own, saved))
    same = table.state_dict() == served.state_dict() and (again == actions).all()
    if own.network.is_table:
        same = same and [own.plans[action] for action in actions] == [table.best(size) for size in sizes.tolist()]
    if not same:
        raise ValueError(f"policy and plans must choose as before they were written, but {directory} differs; check it")
