"""Gymnasium's vector environments for Stable-Baselines3, and a log of their speedup. This module imports torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from specrl.core.checks import require
from specrl.core.clock import WallClock

_INTERVAL_S = 0.25  # smallest time between two rows of a log
_SUMMED = ("tokens", "t0_s", "batch_size", "seconds")


class SB3VectorEnv(VecEnv):
    """A Gymnasium vector environment as a `VecEnv`. Only the ends of episodes have infos.

    Args:
        env: with `AutoresetMode.SAME_STEP`; another mode raises a ValueError.
        visible_features: [D] float32, 1 for entries of an observation to show, else 0; None: all are shown.
    """

    def __init__(
        self, env: gymnasium.vector.VectorEnv[Any, Any, Any], visible_features: NDArray[np.float32] | None = None
    ) -> None:
        mode = env.metadata.get("autoreset_mode")
        require(mode == AutoresetMode.SAME_STEP, "autoreset_mode", "AutoresetMode.SAME_STEP", mode)
        self.env: Any = env
        self._visible = np.float32(1.0) if visible_features is None else visible_features
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self._plain_s = self._spent_s = 0.0

    def reset(self) -> NDArray[np.float32]:
        """Begin an episode in every environment."""
        observations, _ = self.env.reset(seed=self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observations * self._visible)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Set the actions [N] of the next step."""
        self._actions: NDArray[Any] = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Return observations, rewards, whether an episode ended, and infos."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        for part in (info, info.get("final_info", {})):  # final_info: environments that were reset in this step
            if all(key in part for key in _SUMMED):
                tokens, t0, size, seconds = (np.asarray(part[key], dtype=np.float64) for key in _SUMMED)
                ran = seconds > 0
                self._plain_s += float((tokens[ran] * t0[ran] / size[ran]).sum())
                self._spent_s += float(seconds.sum())
        done = terminated | truncated
        infos: list[dict[str, Any]] = [{}] * self.num_envs
        for index in np.flatnonzero(done):
            infos[index] = {
                "terminal_observation": info["final_obs"][index] * self._visible,
                "TimeLimit.truncated": bool(truncated[index] and not terminated[index]),
            }
        return observations * self._visible, np.asarray(rewards, dtype=np.float32), done, infos

    def take_speedup(self) -> float:
        """Return ΣN·t0/B ÷ ΣΔt over all rounds since the last call; nan if there were none."""
        speedup = self._plain_s / self._spent_s if self._spent_s else float("nan")
        self._plain_s = self._spent_s = 0.0
        return speedup

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method, such as `action_masks`, which returns a row for each environment."""
        method = getattr(self.env, method_name, None) or partial(self.env.call, method_name)
        rows = method(*method_args, **method_kwargs)
        return [rows[index] for index in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return the attribute of the vector environment, or of each environment."""
        if hasattr(self.env, attr_name):
            return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]
        values = self.env.get_attr(attr_name)
        return [values[index] for index in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not supported: raises a ValueError."""
        raise ValueError(f"attributes must be set when the environments are made, but got {attr_name!r}; make new ones")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Any = None) -> list[bool]:
        """Return False for each environment."""
        return [False] * len(list(self._get_indices(indices)))


class PausedUpdates(BaseCallback):
    """A callback for `model.learn`: the agent's updates do not count as part of a round.

    `paused_timer` is the method of a live environment; None: the environment is simulated, and nothing is paused.
    """

    def __init__(self, paused_timer: Callable[[], AbstractContextManager[None]] | None) -> None:
        super().__init__()
        self._paused_timer, self._update = paused_timer, ExitStack()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._update.close()

    def _on_rollout_end(self) -> None:
        if self._paused_timer is not None:
            self._update.enter_context(self._paused_timer())

    def _on_training_end(self) -> None:
        self._update.close()


class RLTrainingLog(PausedUpdates):
    """A callback for `model.learn` that also logs the speedup, and stops after `max_seconds` unless it is None.

    `rows` has timesteps, seconds and speedup every quarter of a second, `seconds` those of learning so far.
    """

    def __init__(
        self, max_seconds: float | None, paused_timer: Callable[[], AbstractContextManager[None]] | None
    ) -> None:
        super().__init__(paused_timer)
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._max_seconds, self._clock = max_seconds, WallClock()

    def _on_training_start(self) -> None:
        self._began = self._clock.now()

    def _on_step(self) -> bool:
        return self._max_seconds is None or self._clock.now() - self._began < self._max_seconds

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        self.seconds = self._clock.now() - self._began
        if not self.rows or self.seconds - self.rows[-1]["seconds"] >= _INTERVAL_S:
            env: Any = getattr(self.training_env, "venv", self.training_env)  # without its normalisation
            row = {"timesteps": float(self.num_timesteps), "seconds": self.seconds}
            self.rows.append({**row, "speedup": env.take_speedup()})
