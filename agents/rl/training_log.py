"""The speedup of an agent of Stable-Baselines3 while it learns. This module imports torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from specrl.core.clock import WallClock

_INTERVAL_S = 0.25  # smallest time between two rows


class RLTrainingLog(BaseCallback):
    """A callback for `model.learn` that logs the speedup, and stops after some seconds.

    Args:
        max_seconds: to stop after; None: never.
        off_the_clock: of a live environment, so that updates do not count as the agent's time.

    Attributes:
        rows: timesteps, seconds and speedup, a row every quarter of a second.
        seconds: of learning so far.
    """

    def __init__(
        self, max_seconds: float | None, off_the_clock: Callable[[], AbstractContextManager[None]] | None
    ) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._max_seconds, self._off_the_clock = max_seconds, off_the_clock
        self._clock, self._update = WallClock(), ExitStack()

    def _on_training_start(self) -> None:
        self._began = self._clock.now()

    def _on_rollout_start(self) -> None:
        self._update.close()

    def _on_step(self) -> bool:
        return self._max_seconds is None or self._clock.now() - self._began < self._max_seconds

    def _on_rollout_end(self) -> None:
        if self._off_the_clock is not None:
            self._update.enter_context(self._off_the_clock())
        self.seconds = self._clock.now() - self._began
        if not self.rows or self.seconds - self.rows[-1]["seconds"] >= _INTERVAL_S:
            env: Any = getattr(self.training_env, "venv", self.training_env)  # without its normalisation
            row = {"timesteps": float(self.num_timesteps), "seconds": self.seconds}
            self.rows.append({**row, "speedup": env.take_speedup()})

    def _on_training_end(self) -> None:
        self._update.close()
