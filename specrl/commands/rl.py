"""`specrl rl`: learn to choose plans with deep reinforcement learning, in simulation or on live decoding."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from specrl.agents.choosers.policy_network import NetworkChooser, load_chooser
from specrl.agents.choosers.table import PlanTable
from specrl.agents.rl import sb3
from specrl.agents.rl.distill import distill, tabulate
from specrl.agents.rl.sb3 import Agent, make_agent
from specrl.agents.rl.training_log import Curve
from specrl.cluster.environments import RayVectorEnv
from specrl.core.plan import Plan
from specrl.envs import SIMULATED, SPEC_DECODE
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.evaluation.policy_report import report
from specrl.export.bundle import PLANS, read_plans
from specrl.io.output import OutputDir, environment, show, table
from specrl.simulation.profile import load_profile

HYPERPARAMETERS = Path(sb3.__file__).parent / "hyperparameters"
EPISODE = {SIMULATED: 256, SPEC_DECODE: 128}  # rounds, at one batch size each
LIVE_PLANS = "0,1/1/2,2/1/3,3/1/4,4/1/5"  # on offer, unless it is said otherwise


class World(NamedTuple):
    """What an agent learns in.

    Attributes:
        env: of one environment or many, reset in the step that ends an episode.
        plans: in the order of the actions.
        allowed: which of them are to be had [n] bool.
        off_the_clock: live: a context in which time is not the chooser's.
    """

    env: VectorEnv[Any, Any, Any]
    plans: tuple[Plan, ...]
    allowed: NDArray[np.bool_]
    off_the_clock: Callable[[], AbstractContextManager[None]] | None


def rl(
    *,
    algo: Literal["ppo", "dqn", "recurrent_ppo", "maskable_ppo"] = "maskable_ppo",
    profile: str = "aurora-qwen3-coder-next-fp8",
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32),
    plans: str | None = None,
    reward: str = "differential",
    n_timesteps: int | None = None,
    seconds: float | None = None,
    hyperparameters: Path | None = None,
    policy: Path | None = None,
    ray: str | None = None,
    workers: int = 2,
    live: bool = False,
    engine: Literal["local", "sglang"] = "local",
    target: str = "embedded",
    draft: Path | None = None,
    temperature: float = 0.7,
    sglang_python: Path | None = None,
    sglang_flags: str = "",
    seed: int = 0,
    output_dir: Path | None = None,
) -> Agent:
    """Train an agent of Stable-Baselines3 that chooses the plan of every round.

    It learns in simulation, thousands of environments at once; `--live true` lets it learn on live decoding instead,
    and `--policy DIR` goes on from a policy that was saved, of the same algorithm and plans. Each episode draws one
    of the batch sizes. Written are policy.safetensors and policy.json (the policy; no pickle), plans.json (the plan
    per batch size, which is what serves), curve.csv (what was earned while learning) and results.json.

    Where the hyperparameters say 'observe: batch_size', as those of maskable_ppo do, the policy sees nothing else and
    plans.json is the policy itself, at every batch size up to the largest; this is checked on 1,000 states. With
    'observe: all' plans.json holds the plan it chooses most often in the states that it visits, and what is printed is
    how many of its choices are that table's and what either earns.

    While it learns live, choosing with torch counts as thinking, updates do not; a saved policy chooses in NumPy.

    Args:
        algo: of Stable-Baselines3 or sb3-contrib.
        profile: simulated: a shipped profile or a .json file of `specrl profile`.
        batch_sizes: of which each episode draws one.
        plans: on offer, separated by commas; by default the policy's, else all that the profile knows, and on live
            decoding 0 to 4/1/5.
        reward: by name, as the environments have it.
        n_timesteps: rounds to learn from; by default what the hyperparameters say.
        seconds: to stop after, if that is sooner.
        hyperparameters: YAML as RL Baselines3 Zoo writes it: by environment, arguments of the algorithm.
        policy: directory of a policy to go on from.
        ray: address of a Ray cluster that holds the simulated environments, 'auto' or 'local'.
        workers: with `ray`: actors that share them, of a CPU each.
        live: learn on live decoding of `target`, timed by the clock; let nothing else run meanwhile.
        engine: live: 'local' decodes here; 'sglang' launches SGLang, with speculation and without.
        target: live: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: live: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        temperature: live: of sampling; 0 is greedy.
        sglang_python: Python of an environment with SGLang and this package; by default this one.
        sglang_flags: further flags for sglang.launch_server, both times.
        seed: of weights, exploration and environments.
        output_dir: where results go; by default runs/rl-<time>.

    Raises:
        ValueError: an argument out of range, or a policy that does not fit.

    Example:
        specrl rl --algo maskable_ppo --seconds 60 --output_dir runs/sim
        specrl rl --policy runs/sim --live true --draft runs/quickstart/draft --batch_sizes 1,4 --seconds 120
    """
    if n_timesteps is not None and n_timesteps < 1:
        raise ValueError(f"n_timesteps must be at least 1, but got {n_timesteps}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be above 0, but got {seconds}")
    if live and ray is not None:
        raise ValueError(
            f"--ray is for simulated environments, but got --live and --ray {ray}: timed rounds own their device, and "
            "would slow each other down; leave one of them out"
        )
    if engine != "local" and not live:
        raise ValueError(f"--engine is for live decoding, but got {engine!r} in simulation; add --live true")
    task = SPEC_DECODE if live else SIMULATED
    hyper = read_hyperparameters(hyperparameters or HYPERPARAMETERS / f"{algo}.yaml", task)
    offered = plans or (",".join(map(str, load_chooser(policy).plans)) if policy else None)
    out = OutputDir(output_dir) if output_dir is not None else None
    common: dict[str, Any] = {"batch_size": batch_sizes, "reward": reward, "max_rounds": EPISODE[task]}
    if live:
        common |= {"target": target, "draft": draft, "temperature": temperature, "plans": offered or LIVE_PLANS}
        if engine == "sglang":
            options = {"python": sglang_python, "flags": shlex.split(sglang_flags)}
            common |= {"engine": engine, "engine_options": options}
        decoding = SpecDecodeEnv(**common)
        world = World(as_vector(decoding), decoding.plans, decoding.action_masks(), decoding.off_the_clock)
    else:
        common |= {"profile": profile, "plans": offered, "autoreset_mode": AutoresetMode.SAME_STEP, "stagger": True}
        simulated: SimulatedVectorEnv | RayVectorEnv
        if ray is not None:
            simulated = RayVectorEnv(int(hyper.get("n_envs", 1)), address=ray, workers=workers, **common)
        else:
            simulated = SimulatedVectorEnv(int(hyper.get("n_envs", 1)), **common)
        world = World(simulated, simulated.plans, simulated.action_masks()[0], None)
    if algo != "maskable_ppo" and not world.allowed.all():
        able = ",".join(str(plan) for plan, can in zip(world.plans, world.allowed, strict=True) if can)
        raise ValueError(
            f"{algo} knows no masks, so all plans must be to be had; set plans to {able}, or algo to maskable_ppo"
        )
    agent = make_agent(algo, world.env, hyper, plans=world.plans, allowed=world.allowed.tolist(), seed=seed)
    if policy is not None:
        agent.load(policy)
    curve = Curve(agent, seconds=seconds, off_the_clock=world.off_the_clock)
    agent.model.learn(n_timesteps or int(hyper["n_timesteps"]), callback=curve.callback())
    chooser = agent.chooser()
    results: dict[str, Any] = {"algorithm": algo, "task": task, "timesteps": agent.model.num_timesteps}
    results |= {"seconds": curve.seconds, "environment": environment()}
    if live:
        found = distill(*visit(world.env, chooser), world.plans)
    else:
        told = report(chooser, load_profile(profile), batch_sizes, seed=seed + 1)
        found = told.distilled
        results |= {"share_of_best": told.share, "share_by_batch_size": told.by_batch_size}
        results["share_of_table"] = told.table_share
        results["best"] = told.best.state_dict()
    chosen = {size: found.table.best(size) for size in found.by_batch_size}
    served = tabulate(chooser, max(batch_sizes)) if chooser.network.is_table else found.table
    plans_json = served.state_dict()
    results |= {"plans": plans_json, "agreement": found.agreement, "states": found.states}
    world.env.close()
    rows = [{"batch size": size, "plan": str(plan)} for size, plan in chosen.items()]
    if not live:
        rows = [
            {**row, "best": str(told.best.best(size)), "share of best": told.by_batch_size[size]}
            for row, size in zip(rows, chosen, strict=True)
        ]
        show(f"{told.share:.1%} of the best plan per batch size, in simulation; its table {told.table_share:.1%}")
    show(table(rows), f"{found.agreement:.1%} of its choices are this table's, over {found.states:,} states")
    if out is not None:
        agent.save(out.path)
        out.write_json(PLANS, {"plans": plans_json})
        verify(out.path, agent, served, max(batch_sizes))
        out.write_csv("curve.csv", curve.rows)
        out.write_json("results.json", results)
        show(f"written: {out.path}")
    return agent


def read_hyperparameters(path: Path, task: str) -> dict[str, Any]:
    """The hyperparameters of an environment.

    Raises:
        ValueError: no such file, or nothing for this environment in it.
    """
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise ValueError(f"hyperparameters must be a YAML file, but there is no {str(path)!r}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} must be YAML, but {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not isinstance(found.get(task), dict) or "n_timesteps" not in found[task]:
        raise ValueError(f"{str(path)!r} must hold hyperparameters under {task!r}, n_timesteps among them")
    return dict(found[task])


def as_vector(env: SpecDecodeEnv) -> VectorEnv[Any, Any, Any]:
    """One live environment as a vector of one, reset in the step that ends an episode."""
    return SyncVectorEnv([lambda: env], autoreset_mode=AutoresetMode.SAME_STEP)


def visit(env: VectorEnv[Any, Any, Any], chooser: NetworkChooser) -> tuple[Any, Any]:
    """Batch sizes and choices [S] int64 of 1,024 rounds that a policy plays by itself on a vector environment."""
    vectors, _ = env.reset()
    state = chooser.network.start(len(vectors))
    sizes, choices = [], []
    for _ in range(1024):
        actions, state = chooser.act(vectors, state)
        sizes.append(np.rint(2.0 ** (10.0 * vectors[:, 0])).astype(np.int64))
        choices.append(actions)
        vectors, *_ = env.step(actions)
    return np.concatenate(sizes), np.concatenate(choices)


def verify(directory: Path, agent: Agent, served: PlanTable, most: int) -> None:
    """Read back what was written, and let policy and table choose at 1,000 states of batch sizes 1 .. `most`.

    Raises:
        ValueError: the table or the policy differs from the one written, or they from each other where they must not.
    """
    table, own, saved = PlanTable(dict(read_plans(directory / PLANS))), agent.chooser(), load_chooser(directory)
    if table.state_dict() != served.state_dict():
        raise ValueError(f"the plans written must read back as they were, but {directory} differs; is the disk sound?")
    rng, space = np.random.default_rng(0), agent.model.observation_space
    low, high = (getattr(space, name) for name in ("low", "high"))
    vectors = rng.uniform(low, high, size=(1000, len(low))).astype(np.float32)
    sizes = rng.integers(1, most, size=1000, endpoint=True)
    vectors[:, 0] = np.log2(sizes) / 10.0
    again, actions = (c.act(vectors, c.network.start(1000))[0] for c in (saved, own))
    if (again != actions).any():
        raise ValueError(f"the policy written must choose as it did, but {directory} differs; is the disk sound?")
    if own.network.is_table and any(
        table.best(size) != own.plans[action] for size, action in zip(sizes.tolist(), actions.tolist(), strict=True)
    ):
        raise ValueError(f"a policy that sees the batch size alone must choose as its table, but {directory} differs")
