"""What an agent of Stable-Baselines3 earns while it learns; on live decoding, its updates are off the clock."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from specrl.agents.rl.sb3 import Agent
from specrl.core.clock import WallClock

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback

_EVERY_S = 0.25  # least time between two rows


class Curve:
    """What is earned while an agent learns: a row every quarter of a second, and a stop after some seconds.

    Args:
        agent: that learns.
        seconds: to stop after; None: never.
        off_the_clock: of a live environment: what updates take is not the chooser's thinking.
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

        curve, clock = self, WallClock()
        began, source = clock.now(), _source(self._agent)

        class Watch(BaseCallback):
            """Fills the curve."""

            paused: AbstractContextManager[None] | None = None

            def _on_rollout_start(self) -> None:
                if self.paused is not None:
                    self.paused.__exit__(None, None, None)
                    self.paused = None

            def _on_step(self) -> bool:
                return curve._limit is None or clock.now() - began < curve._limit

            def _on_rollout_end(self) -> None:
                if curve._off is not None:
                    self.paused = curve._off()
                    self.paused.__enter__()
                curve.seconds = clock.now() - began
                if not curve.rows or curve.seconds - curve.rows[-1]["seconds"] >= _EVERY_S:
                    row = {"timesteps": float(self.num_timesteps), "seconds": curve.seconds}
                    curve.rows.append({**row, "speedup": source.take_speedup()})

            def _on_training_end(self) -> None:
                self._on_rollout_start()

        return Watch()


def _source(agent: Agent) -> Any:
    """The environment that counts speedups, below what normalises."""
    env = agent.model.get_env()
    return getattr(env, "venv", env)
