"""Environments in actors on two nodes are those of one process, and Stable-Baselines3 learns on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from specrl.cluster.environments import _SEEDS, RayVectorEnv
from specrl.commands.rl import rl
from specrl.envs.simulated_vector import SimulatedVectorEnv

OPTIONS = {"batch_size": (1, 8), "max_rounds": 6, "stagger": True}


def test_they_are_those_of_one_process_part_by_part(two_nodes: str) -> None:
    env = RayVectorEnv(5, address=two_nodes, workers=2, **OPTIONS)
    own = [SimulatedVectorEnv(n, autoreset_mode=AutoresetMode.SAME_STEP, **OPTIONS) for n in (3, 2)]  # type: ignore[arg-type]
    assert len(set(env.nodes)) == 2
    assert env.plans == own[0].plans and env.action_masks().shape == (5, len(env.plans))
    seen, _ = env.reset(seed=7)
    expected = np.concatenate([part.reset(seed=7 + _SEEDS * n)[0] for n, part in enumerate(own)])
    assert np.array_equal(seen, expected)
    allowed, rng, ended = np.flatnonzero(env.action_masks()[0]), np.random.default_rng(0), 0
    for _ in range(20):
        actions = rng.choice(allowed, size=5)
        *found, info = env.step(actions)
        *parts, infos = zip(*(part.step(a) for part, a in zip(own, np.split(actions, [3]), strict=True)), strict=True)
        for one, several in zip(found, parts, strict=True):
            assert np.array_equal(one, np.concatenate(several))
        assert np.array_equal(info["seconds"], np.concatenate([i["seconds"] for i in infos]))
        over = found[2] | found[3]
        ended += int(over.sum())
        if over.any():
            assert np.array_equal(info["_final_obs"], over)
            last = np.concatenate(
                [i.get("final_obs", np.zeros((n, 1))) for i, n in zip(infos, (3, 2), strict=True) if "final_obs" in i]
            )
            kept = np.concatenate([np.full(n, "final_obs" in i) for i, n in zip(infos, (3, 2), strict=True)])
            assert np.array_equal(info["final_obs"][kept], last)
    assert ended >= 10
    env.close()


def test_an_agent_learns_on_them_and_live_ones_are_refused(two_nodes: str, tmp_path: Path) -> None:
    agent = rl(n_timesteps=1, batch_sizes=(1, 8), ray=two_nodes, workers=2, output_dir=tmp_path)
    assert agent.model.num_timesteps > 0 and (tmp_path / "policy.safetensors").is_file()
    with pytest.raises(ValueError, match="--ray is for simulated environments"):
        rl(live=True, ray=two_nodes)
