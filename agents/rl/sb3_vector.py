"""Gymnasium's vector environments as Stable-Baselines3 takes them. Import it where it is used: it imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

_SUMMED = ("tokens", "t0_s", "batch_size", "seconds")


class SB3VectorEnv(VecEnv):
    """A Gymnasium vector environment whose steps reset at once, simulated or live, as a `VecEnv`.

    Infos are empty but at the end of an episode, since thousands of mappings a step would cost more than the steps.

    Args:
        env: with `AutoresetMode.SAME_STEP`.
        seen: entries of an observation that are shown [D] float32, 1 or 0; None: all.

    Raises:
        ValueError: another mode.
    """

    def __init__(self, env: gymnasium.vector.VectorEnv[Any, Any, Any], seen: NDArray[np.float32] | None = None) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"Stable-Baselines3 takes environments that reset in the step that ends an episode, but got {mode}; "
                "make it with autoreset_mode=AutoresetMode.SAME_STEP"
            )
        self.env: Any = env
        self._seen = np.float32(1.0) if seen is None else seen
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._actions: NDArray[Any] = np.zeros(env.num_envs, dtype=np.int64)
        self._plain = self._spent = 0.0

    def reset(self) -> NDArray[np.float32]:
        """Begin an episode everywhere."""
        observations, _ = self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observations * self._seen)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Take the actions [N]."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Run them: observations, rewards, whether an episode ended, infos."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        self._count(info)
        over = terminated | truncated
        infos: list[dict[str, Any]] = [{}] * self.num_envs
        for index in np.flatnonzero(over):
            infos[index] = {
                "terminal_observation": info["final_obs"][index] * self._seen,
                "TimeLimit.truncated": bool(truncated[index] and not terminated[index]),
            }
        return observations * self._seen, np.asarray(rewards, dtype=np.float32), over, infos

    def take_speedup(self) -> float:
        """ΣN·t0/B ÷ ΣΔt over all rounds since the last call; NaN where there were none."""
        plain, spent = self._plain, self._spent
        self._plain = self._spent = 0.0
        return plain / spent if spent else float("nan")

    def _count(self, info: Mapping[str, Any]) -> None:
        """Add the rounds of a step; of an environment reset in it, they stand in 'final_info' (Gymnasium's own)."""
        for part in (info, info.get("final_info", {})):
            if all(key in part for key in _SUMMED):
                tokens, t0, size, seconds = (np.asarray(part[key], dtype=np.float64) for key in _SUMMED)
                ran = seconds > 0
                self._plain += float((tokens[ran] * t0[ran] / size[ran]).sum())
                self._spent += float(seconds.sum())

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """`action_masks`, which is all that is asked for: a row per environment."""
        if hasattr(self.env, method_name):
            found = getattr(self.env, method_name)(*method_args, **method_kwargs)
        else:
            found = self.env.call(method_name, *method_args, **method_kwargs)
        return [found[index] for index in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute for each environment, from the whole of them or one by one."""
        if hasattr(self.env, attr_name):
            return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]
        if hasattr(self.env, "get_attr"):
            found = self.env.get_attr(attr_name)
            return [found[index] for index in self._get_indices(indices)]
        raise AttributeError(attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refuse.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"environments are configured when they are made, but {attr_name!r} was to be set; remake them"
        )

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Never."""
        return [False for _ in self._get_indices(indices)]
