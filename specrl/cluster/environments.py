"""Simulated environments as Ray actors: one vector environment whose parts are stepped on several nodes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specrl.cluster.connect import connected, need_resource
from specrl.core.plan import Plan
from specrl.envs.simulated_vector import SimulatedVectorEnv

_SEEDS = 1_000_003  # between two workers' seeds


class Part:
    """A worker's environments, for `ray.remote`; takes the arguments of `SimulatedVectorEnv`."""

    def __init__(self, num_envs: int, **options: Any) -> None:
        self._env = SimulatedVectorEnv(num_envs, **options)

    def reset(self, seed: int | None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode everywhere."""
        return self._env.reset(seed=seed)

    def step(self, actions: NDArray[Any]) -> tuple[Any, ...]:
        """One round everywhere."""
        return self._env.step(actions)

    def told(self) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any], tuple[Plan, ...], NDArray[np.bool_], str]:
        """Spaces, plans, which of them are to be had [n, plans], and the node that it runs on."""
        import ray

        env = self._env
        node = ray.get_runtime_context().get_node_id()
        return env.single_observation_space, env.single_action_space, env.plans, env.action_masks(), node


class RayVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments of `SpecRL/Simulated-v0` in `workers` Ray actors; to a learner as `SimulatedVectorEnv`.

    Only simulated ones: a live round is timed, and timed rounds own their device.

    Args:
        num_envs: N, at least one for each worker.
        address: of the cluster (see `connected`).
        workers: actors, spread over it.
        options: of `SimulatedVectorEnv`; episodes end and begin in the same step.

    Raises:
        ValueError: more workers than environments, or than the cluster has CPUs.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int, *, address: str, workers: int, **options: Any) -> None:
        if not 1 <= workers <= num_envs:
            raise ValueError(f"workers must be at least 1 and at most the {num_envs} environments, but got {workers}")
        self._connection = ExitStack()
        self._connection.enter_context(connected(address))
        need_resource("CPU", workers, "workers")
        import ray

        given = {**options, "autoreset_mode": AutoresetMode.SAME_STEP}
        make = ray.remote(Part).options(num_cpus=1, scheduling_strategy="SPREAD")
        sizes = [len(part) for part in np.array_split(np.arange(num_envs), workers)]
        self._sizes, self._ends = sizes, np.cumsum(sizes)[:-1]
        self._parts = [make.remote(size, **given) for size in sizes]
        told = ray.get([part.told.remote() for part in self._parts])
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space, self.plans = told[0][:3]
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._masks = np.concatenate([masks for *_, masks, _ in told])
        self.nodes = tuple(node for *_, node in told)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which plans are to be had: [N, plans]."""
        return self._masks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode everywhere; the same seed, workers and options give the same episodes."""
        import ray

        seeds = [None if seed is None else seed + _SEEDS * number for number in range(len(self._parts))]
        found = ray.get([part.reset.remote(s) for part, s in zip(self._parts, seeds, strict=True)])
        return np.concatenate([seen for seen, _ in found]), _joined([info for _, info in found], self._sizes)

    def step(self, actions: NDArray[Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One round everywhere."""
        import ray

        shares = np.split(np.asarray(actions), self._ends)
        found = ray.get([part.step.remote(share) for part, share in zip(self._parts, shares, strict=True)])
        observations, rewards, terminated, truncated = (
            np.concatenate([answer[i] for answer in found]) for i in range(4)
        )
        return observations, rewards, terminated, truncated, _joined([answer[4] for answer in found], self._sizes)

    def close_extras(self, **kwargs: Any) -> None:
        """End the workers, and leave the cluster."""
        import ray

        for part in self._parts:
            ray.kill(part)
        self._parts = []
        self._connection.close()


def _joined(infos: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """Infos of the parts side by side; where a part has no array of a name, zeros [its size, ...]."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(key for info in infos for key in info):
        like = next(info[name] for info in infos if name in info)
        empty = (np.zeros((size, *like.shape[1:]), like.dtype) for size in sizes)
        out[name] = np.concatenate([info.get(name, zeros) for info, zeros in zip(infos, empty, strict=True)])
    return out
