"""The speedup of an agent of Stable-Baselines3 while it learns; on live decoding its updates are not timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from specrl.agents.rl.sb3 import Agent
from specrl.core.clock import WallClock

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

_INTERVAL_S = 0.25  # smallest time between two rows


class RLTrainingLog:
    """Logs the speedup while an agent learns, and stops after some seconds.

    Args:
        agent: the agent that learns.
        seconds: to stop after; None: never.
        off_the_clock: of a live environment, so that updates do not count as the agent's time.

    Attributes:
        rows: timesteps, seconds and speedup, a row every quarter of a second.
        seconds: of learning so far.
    """

    def __init__(
        self, agent: Agent, *, seconds: float | None, off_the_clock: Callable[[], AbstractContextManager[None]] | None
    ) -> None:
        self.rows: list[dict[str, float]] = []
        self.seconds = 0.0
        self._agent, self._limit, self._off = agent, seconds, off_the_clock

    def callback(self) -> BaseCallback:
        """For `model.learn`."""
        from stable_baselines3.common.callbacks import BaseCallback

        log, clock = self, WallClock()
        began, source = clock.now(), _source(self._agent)

        class Watch(BaseCallback):
            """Fills the log."""

            paused: AbstractContextManager[None] | None = None

            def _on_rollout_start(self) -> None:
                if self.paused is not None:
                    self.paused.__exit__(None, None, None)
                    self.paused = None

            def _on_step(self) -> bool:
                return log._limit is None or clock.now() - began < log._limit

            def _on_rollout_end(self) -> None:
                if log._off is not None:
                    self.paused = log._off()
                    self.paused.__enter__()
                log.seconds = clock.now() - began
                if not log.rows or log.seconds - log.rows[-1]["seconds"] >= _INTERVAL_S:
                    row = {"timesteps": float(self.num_timesteps), "seconds": log.seconds}
                    log.rows.append({**row, "speedup": source.take_speedup()})

            def _on_training_end(self) -> None:
                self._on_rollout_start()

        return Watch()


def _source(agent: Agent) -> Any:
    """The environment that counts speedups, without its normalisation."""
    env = agent.model.get_env()
    return getattr(env, "venv", env)
