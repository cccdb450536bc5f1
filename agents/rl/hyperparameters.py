"""The agent's settings, and hyperparameters as RL Baselines3 Zoo writes them: YAML by environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class AgentConfig:
    """The agent of Stable-Baselines3.

    Args:
        algo: algorithm of Stable-Baselines3 or sb3-contrib.
        n_timesteps: rounds to learn from; by default those of the hyperparameters.
        seconds: stop after this much time if that is sooner.
        hyperparameters: YAML file as RL Baselines3 Zoo writes it, by default a shipped one.
        policy: directory of a saved policy to continue from, of the same algorithm and plans.

    Raises:
        ValueError: a number out of range.
    """

    algo: Literal["ppo", "dqn", "recurrent_ppo", "maskable_ppo"] = "maskable_ppo"
    n_timesteps: int | None = None
    seconds: float | None = None
    hyperparameters: Path | None = None
    policy: Path | None = None

    def __post_init__(self) -> None:
        if self.n_timesteps is not None and self.n_timesteps < 1:
            raise ValueError(f"agent.n_timesteps must be at least 1, but got {self.n_timesteps}")
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"agent.seconds must be above 0, but got {self.seconds}")

    def read_hyperparameters(self, task: str) -> dict[str, Any]:
        """The hyperparameters for the environment with the id `task`.

        Raises:
            ValueError: no such file, or nothing for this environment in it.
        """
        import yaml  # type: ignore[import-untyped]

        path = self.hyperparameters or Path(__file__).parent / "hyperparameters" / f"{self.algo}.yaml"
        if not path.is_file():
            raise ValueError(f"hyperparameters must be a YAML file, but there is no {str(path)!r}")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{str(path)!r} must be YAML, but {' '.join(str(error).split())}") from error
        if not isinstance(found, dict) or not isinstance(found.get(task), dict) or "n_timesteps" not in found[task]:
            raise ValueError(f"{str(path)!r} must hold hyperparameters under {task!r}, with n_timesteps")
        return dict(found[task])
