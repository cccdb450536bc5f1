"""Agents of Stable-Baselines3: made from hyperparameters, saved and loaded without pickle.

PPO (Schulman et al., arXiv 1707.06347), DQN (Mnih et al., 2015), and from sb3-contrib RecurrentPPO and MaskablePPO
(Huang & Ontañón, arXiv 2006.14171). A saved policy is read by `specrl.agents.choosers.policy_network`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.policy_network import (
    DESCRIPTION,
    MEAN,
    VARIANCE,
    VISIBLE,
    WEIGHTS,
    NetworkChooser,
    PolicyNetwork,
    read_description,
)
from specrl.core.plan import Plan

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from torch import Tensor

ALGORITHMS = {
    "ppo": "stable_baselines3:PPO",
    "dqn": "stable_baselines3:DQN",
    "recurrent_ppo": "sb3_contrib:RecurrentPPO",
    "maskable_ppo": "sb3_contrib:MaskablePPO",
}
_ACTIVATIONS = {"tanh": "Tanh", "relu": "ReLU"}
_NOT_MODEL_ARGUMENTS = ("n_timesteps", "n_envs", "normalize", "observe")


@dataclass(frozen=True)
class Agent:
    """An agent of Stable-Baselines3 with the description of its policy.

    Attributes:
        model: learns with `model.learn(total_timesteps)`.
        algorithm: its name in `ALGORITHMS`.
        plans: in the order of the actions.
        allowed: for each plan, whether it may be chosen.
        hyperparameters: the hyperparameters that it was made from.
    """

    model: BaseAlgorithm
    algorithm: str
    plans: tuple[Plan, ...]
    allowed: tuple[bool, ...]
    hyperparameters: Mapping[str, Any]

    @property
    def activation(self) -> str:
        """The activation between the layers of its networks."""
        return _activation(self.algorithm, self.hyperparameters)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its policy by Stable-Baselines3's names, and the scale of observations."""
        import torch

        found = {name: t.detach().cpu().clone().contiguous() for name, t in self.model.policy.state_dict().items()}
        scale = _scale(self.model)
        if scale is not None:
            found |= {MEAN: torch.tensor(scale.mean), VARIANCE: torch.tensor(scale.var)}
        visible = _visible_features(self.hyperparameters, self.model.observation_space.shape)
        if visible is not None:
            found[VISIBLE] = torch.tensor(visible)
        return found

    def chooser(self) -> NetworkChooser:
        """Its present policy as a plan chooser in NumPy."""
        network = PolicyNetwork({name: t.numpy() for name, t in self.tensors().items()}, self.activation)
        return NetworkChooser(network, self.plans, self.allowed)

    def save(self, directory: str | Path) -> None:
        """Write policy.safetensors and policy.json (read them with `policy_network.load_chooser`)."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        described = {
            "algorithm": self.algorithm,
            "activation": self.activation,
            "plans": [str(plan) for plan in self.plans],
            "allowed": list(self.allowed),
            "num_timesteps": self.model.num_timesteps,
            "hyperparameters": dict(self.hyperparameters),
        }
        save_file(self.tensors(), folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def load(self, directory: str | Path) -> None:
        """Continue from a saved policy of the same algorithm, plans and network.

        Raises:
            ValueError: there is no policy, or it has another algorithm, other plans or another network.
        """
        from safetensors.torch import load_file

        described, found = read_description(directory), load_file(Path(directory) / WEIGHTS)
        for what, own in (("algorithm", self.algorithm), ("plans", [str(plan) for plan in self.plans])):
            if described[what] != own:
                raise ValueError(f"a policy must have the agent's {what}, {own}, but has {described[what]}")
        visible = _visible_features(self.hyperparameters, self.model.observation_space.shape)
        saved = found.pop(VISIBLE, None)
        if ([] if saved is None else saved.tolist()) != ([] if visible is None else visible.tolist()):
            raise ValueError(
                f"the saved policy in {str(directory)!r} must have the agent's 'observe', but has another; change it"
            )
        mean, variance, scale = found.pop(MEAN, None), found.pop(VARIANCE, None), _scale(self.model)
        if (mean is None) != (scale is None):
            raise ValueError(
                f"the saved policy in {str(directory)!r} must have the agent's 'normalize', but has "
                f"{mean is not None}; change it"
            )
        try:
            self.model.policy.load_state_dict(found)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"the saved policy in {str(directory)!r} must have the agent's network, but has another: {why}"
            ) from error
        if scale is not None:
            assert mean is not None and variance is not None
            scale.mean, scale.var = (np.array(t.numpy(), dtype=np.float64) for t in (mean, variance))
            scale.count = float(described["num_timesteps"])


def make_agent(
    algorithm: str,
    env: gymnasium.vector.VectorEnv[Any, Any, Any],
    hyperparameters: Mapping[str, Any],
    *,
    plans: Sequence[Plan],
    allowed: Sequence[bool] | None = None,
    seed: int = 0,
) -> Agent:
    """An agent on a Gymnasium vector environment (`AutoresetMode.SAME_STEP`).

    Args:
        algorithm: 'ppo', 'dqn', 'recurrent_ppo' or 'maskable_ppo'.
        env: discrete actions.
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
    from stable_baselines3.common.vec_env import VecNormalize

    from specrl.agents.rl.sb3_vector import SB3VectorEnv

    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, but got {algorithm!r}")
    module, _, name = ALGORITHMS[algorithm].partition(":")
    options = {key: value for key, value in hyperparameters.items() if key not in _NOT_MODEL_ARGUMENTS}
    if isinstance(options.get("learning_rate"), str):
        options["learning_rate"] = _falling(options["learning_rate"])
    activation = getattr(importlib.import_module("torch.nn"), _ACTIVATIONS[_activation(algorithm, hyperparameters)])
    known = {key: value for key, value in options.get("policy_kwargs", {}).items() if key != "activation"}
    options["policy_kwargs"] = {**known, "activation_fn": activation}
    venv: Any = SB3VectorEnv(env, _visible_features(hyperparameters, env.single_observation_space.shape))
    if algorithm == "recurrent_ppo" and hyperparameters.get("observe", "all") != "all":
        raise ValueError("observe must be 'all' for recurrent_ppo, which sees earlier rounds, but got another")
    normalize = hyperparameters.get("normalize", False)
    if normalize:
        settings = {"norm_reward": False, **(normalize if isinstance(normalize, Mapping) else {})}
        venv = VecNormalize(venv, gamma=options.get("gamma", 0.99), **settings)
    try:
        model = getattr(importlib.import_module(module), name)(env=venv, seed=seed, device="cpu", **options)
    except TypeError as error:
        raise ValueError(f"hyperparameters must be arguments of {name}, but {error}") from error
    able = tuple(map(bool, allowed)) if allowed is not None else (True,) * len(plans)
    return Agent(model, algorithm, tuple(plans), able, dict(hyperparameters))


def _activation(algorithm: str, hyperparameters: Mapping[str, Any]) -> str:
    usual = "relu" if algorithm == "dqn" else "tanh"  # Stable-Baselines3's defaults
    name = str(hyperparameters.get("policy_kwargs", {}).get("activation", usual))
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, but got {name!r}")
    return name


def _visible_features(hyperparameters: Mapping[str, Any], shape: tuple[int, ...] | None) -> NDArray[np.float32] | None:
    """[D] float32, 1 for entries of an observation that the policy sees, else 0; None: it sees all."""
    observe = hyperparameters.get("observe", "all")
    if observe not in ("all", "batch_size"):
        raise ValueError(f"observe must be 'all' or 'batch_size', but got {observe!r}")
    if observe == "all":
        return None
    assert shape is not None
    return np.eye(1, shape[0], dtype=np.float32)[0]  # the batch size is the first entry


def _falling(rate: str) -> Any:
    """'lin_0.001': a schedule from 0.001 to 0 over the training."""
    from stable_baselines3.common.utils import LinearSchedule

    try:
        return LinearSchedule(float(rate.removeprefix("lin_")), 0.0, 1.0)
    except ValueError:
        raise ValueError(f"learning_rate must be a number or 'lin_<number>', but got {rate!r}") from None


def _scale(model: BaseAlgorithm) -> Any:
    """The running mean and variance of observations; None if they are not normalised."""
    from stable_baselines3.common.vec_env import VecNormalize

    env = model.get_env()
    return env.obs_rms if isinstance(env, VecNormalize) and env.norm_obs else None
