"""Agents of Stable-Baselines3: made from hyperparameters, saved and loaded without pickle.

PPO (Schulman et al., arXiv 1707.06347), DQN (Mnih et al., 2015), and from sb3-contrib RecurrentPPO and MaskablePPO
(Huang & Ontañón, arXiv 2006.14171). A saved policy is read by `specrl.agents.choosers.policy_network`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers import policy_network as saved
from specrl.core.checks import require, require_known
from specrl.core.plan import Plan
from specrl.io.read import read_mapping

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from torch import Tensor

ALGORITHMS = {
    "ppo": "stable_baselines3:PPO",
    "dqn": "stable_baselines3:DQN",
    "recurrent_ppo": "sb3_contrib:RecurrentPPO",
    "maskable_ppo": "sb3_contrib:MaskablePPO",
}
_ACTIVATIONS = {"tanh": "torch.nn:Tanh", "relu": "torch.nn:ReLU"}
_NOT_MODEL_ARGUMENTS = ("n_timesteps", "n_envs", "normalize", "observe")


@dataclass(frozen=True)
class AgentConfig:
    """The agent of Stable-Baselines3.

    Args:
        algo: algorithm of Stable-Baselines3 or sb3-contrib.
        n_timesteps: rounds to learn from, at least 1; by default those of the hyperparameters.
        seconds: stop after this much time if that is sooner.
        hyperparameters: YAML file as RL Baselines3 Zoo writes it, by default a shipped one.
        policy: directory of a saved policy to continue from, of the same algorithm and plans.
    """

    algo: Literal["ppo", "dqn", "recurrent_ppo", "maskable_ppo"] = "maskable_ppo"
    n_timesteps: int | None = None
    seconds: float | None = None
    hyperparameters: Path | None = None
    policy: Path | None = None

    def __post_init__(self) -> None:
        require(self.n_timesteps is None or self.n_timesteps >= 1, "agent.n_timesteps", "at least 1", self.n_timesteps)
        require(self.seconds is None or self.seconds > 0, "agent.seconds", "above 0", self.seconds)

    def read_hyperparameters(self, task: str) -> dict[str, Any]:
        """Read the hyperparameters for the environment with the id `task`; a ValueError if the file has none."""
        path = self.hyperparameters or Path(__file__).parent / "hyperparameters" / f"{self.algo}.yaml"
        if not path.is_file():
            raise ValueError(f"agent.hyperparameters must be a YAML file, but there is no {str(path)!r}")
        hyperparameters = read_mapping(path).get(task)
        if not isinstance(hyperparameters, dict) or "n_timesteps" not in hyperparameters:
            raise ValueError(f"{str(path)!r} must hold hyperparameters under {task!r}, with n_timesteps")
        return hyperparameters


@dataclass(frozen=True)
class Agent:
    """An agent of Stable-Baselines3 with the description of its policy; `model.learn(total_timesteps)` trains it."""

    model: BaseAlgorithm
    algorithm: str  # its name in `ALGORITHMS`
    plans: tuple[Plan, ...]  # in the order of the actions
    allowed: tuple[bool, ...]  # for each plan, whether it may be chosen
    hyperparameters: Mapping[str, Any]
    activation: str  # between the layers of its networks, 'tanh' or 'relu'
    visible: NDArray[np.float32] | None  # [D], 1 for entries of an observation that it sees, else 0; None: it sees all

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of its policy by Stable-Baselines3's names, and the scale of observations."""
        import torch

        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in self.model.policy.state_dict().items()}
        scale = self._observation_scale()
        if scale is not None:
            tensors |= {saved.MEAN: torch.tensor(scale.mean), saved.VARIANCE: torch.tensor(scale.var)}
        if self.visible is not None:
            tensors[saved.VISIBLE] = torch.tensor(self.visible)
        return tensors

    def chooser(self) -> saved.NetworkChooser:
        """Return its present policy as a plan chooser in NumPy."""
        network = saved.PolicyNetwork({name: t.numpy() for name, t in self.tensors().items()}, self.activation)
        return saved.NetworkChooser(network, self.plans, self.allowed)

    def save(self, directory: str | Path) -> None:
        """Write policy.safetensors and policy.json (read them with `policy_network.load_chooser`)."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "algorithm": self.algorithm,
            "activation": self.activation,
            "plans": [str(plan) for plan in self.plans],
            "allowed": list(self.allowed),
            "num_timesteps": self.model.num_timesteps,
            "hyperparameters": dict(self.hyperparameters),
        }
        save_file(self.tensors(), folder / saved.WEIGHTS)
        (folder / saved.DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Continue from a saved policy; raise a ValueError unless it has the same algorithm, plans and network."""
        from safetensors.torch import load_file

        description, tensors = saved.read_description(directory), load_file(Path(directory) / saved.WEIGHTS)
        mean, variance, visible = (tensors.pop(name, None) for name in (saved.MEAN, saved.VARIANCE, saved.VISIBLE))
        scale, plans = self._observation_scale(), [str(plan) for plan in self.plans]
        for name, theirs, ours in (
            ("algorithm", description["algorithm"], self.algorithm),
            ("plans", description["plans"], plans),
            ("observe", "all" if visible is None else "batch_size", "all" if self.visible is None else "batch_size"),
            ("normalize", mean is not None, scale is not None),
        ):
            require(theirs == ours, f"{name} of the policy in {str(directory)!r}", f"the agent's, {ours}", theirs)
        try:
            self.model.policy.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"the policy must have the agent's network, but {' '.join(str(error).split())}") from error
        if mean is not None and variance is not None:
            scale.mean, scale.var = mean.double().numpy(), variance.double().numpy()
            scale.count = float(description["num_timesteps"])

    def _observation_scale(self) -> Any:
        """Return the running mean and variance of observations; None if they are not normalised."""
        from stable_baselines3.common.vec_env import VecNormalize

        env = self.model.get_env()
        return env.obs_rms if isinstance(env, VecNormalize) and env.norm_obs else None


def make_agent(
    algorithm: str,
    env: gymnasium.vector.VectorEnv[Any, Any, Any],
    hyperparameters: Mapping[str, Any],
    *,
    plans: Sequence[Plan],
    allowed: Sequence[bool] | None = None,
    seed: int = 0,
) -> Agent:
    """Make an agent on a Gymnasium vector environment.

    Args:
        algorithm: 'ppo', 'dqn', 'recurrent_ppo' or 'maskable_ppo'.
        env: discrete actions, `AutoresetMode.SAME_STEP`.
        hyperparameters: arguments of the algorithm as RL Baselines3 Zoo writes them: `policy`, `n_steps`, ...;
            `observe: batch_size` masks everything else, so that the policy is a table ('all': no mask);
            `normalize: true` scales observations (and `normalize: {norm_reward: true}` rewards too); a
            `learning_rate` 'lin_0.001' decreases to 0; `policy_kwargs` may have an `activation`, 'tanh' or 'relu'.
        plans: in the order of the actions.
        allowed: for each plan, whether it may be chosen; None: all.
        seed: of the weights, the exploration and the environment.

    Raises:
        ValueError: an unknown algorithm, or hyperparameters that it does not have.
    """
    from stable_baselines3.common.utils import LinearSchedule
    from stable_baselines3.common.vec_env import VecNormalize

    from specrl.agents.rl.sb3_vector import SB3VectorEnv

    require_known("algorithm", algorithm, ALGORITHMS)
    options = {key: value for key, value in hyperparameters.items() if key not in _NOT_MODEL_ARGUMENTS}
    rate = options.get("learning_rate")
    if isinstance(rate, str):
        form = re.fullmatch(r"lin_\d*\.?\d+(e-?\d+)?", rate)
        require(form is not None, "learning_rate", "a number or 'lin_<number>'", rate)
        options["learning_rate"] = LinearSchedule(float(rate.removeprefix("lin_")), 0.0, 1.0)
    policy_kwargs = dict(options.get("policy_kwargs", {}))
    activation = str(policy_kwargs.pop("activation", "relu" if algorithm == "dqn" else "tanh"))  # SB3's defaults
    require_known("activation", activation, _ACTIVATIONS)
    options["policy_kwargs"] = {**policy_kwargs, "activation_fn": resolve_name(_ACTIVATIONS[activation])}
    observe, visible = hyperparameters.get("observe", "all"), None
    if observe != "all":
        possible = observe == "batch_size" and algorithm != "recurrent_ppo"
        require(possible, "observe", "'all', or 'batch_size' unless with recurrent_ppo", observe)
        size = gymnasium.spaces.flatdim(env.single_observation_space)
        visible = np.eye(1, size, dtype=np.float32)[0]  # the batch size is the first entry
    venv: Any = SB3VectorEnv(env, visible)
    if normalize := hyperparameters.get("normalize", False):
        settings = {"norm_reward": False, **(normalize if isinstance(normalize, Mapping) else {})}
        venv = VecNormalize(venv, gamma=options.get("gamma", 0.99), **settings)
    model_class = resolve_name(ALGORITHMS[algorithm])
    try:
        model = model_class(env=venv, seed=seed, device="cpu", **options)
    except TypeError as error:
        raise ValueError(f"hyperparameters must be arguments of {model_class.__name__}, but {error}") from error
    able = tuple(map(bool, allowed)) if allowed is not None else (True,) * len(plans)
    return Agent(model, algorithm, tuple(plans), able, dict(hyperparameters), activation, visible)
