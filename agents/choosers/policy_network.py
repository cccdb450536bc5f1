"""A learned policy as a plan chooser: the network of an agent of Stable-Baselines3, run with NumPy.

A policy is a directory: policy.safetensors holds the tensors by Stable-Baselines3's names, with the mean and variance
of observations if it normalises them; policy.json names the algorithm and the plans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.core.checks import require, require_known
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan, parse_plans

Array = NDArray[np.float32]
WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
MEAN, VARIANCE, VISIBLE = "observation.mean", "observation.variance", "observation.seen"
_EPSILON, _CLIP = 1e-8, 10.0  # of VecNormalize
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, np.float32(0.0))}
_LAYERS = r"(?:mlp_extractor\.policy_net|q_net\.q_net)\.(\d+)\.weight"


@dataclass(frozen=True, slots=True)
class State:
    """The LSTM state of N sequences: `hidden` and `cell`, [N, H] float32; H is 0 without an LSTM."""

    hidden: Array
    cell: Array


class PolicyNetwork:
    """Scores plans: masks and normalises the observation, then applies the LSTM, if there is one, and the layers.

    Args:
        tensors: by Stable-Baselines3's names, float32, with at least one layer that scores plans; those of critics and
            target networks are ignored.
        activation: between layers, 'tanh' or 'relu'.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], activation: str = "tanh") -> None:
        require_known("activation", activation, _ACTIVATIONS)
        self._activation = _ACTIVATIONS[activation]
        weights = {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
        numbered = sorted((int(match[1]), name) for name in weights if (match := re.fullmatch(_LAYERS, name)))
        names = [name for _, name in numbered] + [name for name in ("action_net.weight",) if name in weights]
        require(len(names) > 0, "tensors", "those of a policy, with layers that score plans", sorted(weights))
        self._layers = [(weights[name].T.copy(), weights[name.removesuffix("weight") + "bias"]) for name in names]
        if "lstm_actor.weight_ih_l1" in weights:
            raise ValueError("a recurrent policy must have one LSTM layer, but got more; set n_lstm_layers: 1")
        self._lstm = None
        if "lstm_actor.weight_ih_l0" in weights:
            w_input, w_hidden = (weights[f"lstm_actor.weight_{kind}_l0"].T.copy() for kind in ("ih", "hh"))
            self._lstm = w_input, w_hidden, weights["lstm_actor.bias_ih_l0"] + weights["lstm_actor.bias_hh_l0"]
        self.hidden_size = self._lstm[1].shape[0] if self._lstm else 0
        first = self._lstm[0] if self._lstm else self._layers[0][0]
        self.inputs, self.outputs = first.shape[0], self._layers[-1][0].shape[1]
        self._visible = weights.get(VISIBLE)
        self._mean = weights.get(MEAN, np.zeros(self.inputs, dtype=np.float32))
        self._scale = np.sqrt(weights[VARIANCE] + np.float32(_EPSILON)) if VARIANCE in weights else np.float32(1.0)
        self._clip = _CLIP if MEAN in weights else np.inf

    @property
    def is_table(self) -> bool:
        """Whether its choice depends on the batch size only: all other entries are masked, and it has no LSTM."""
        return self._visible is not None and not self._visible[1:].any() and self._lstm is None

    def start(self, count: int = 1) -> State:
        """Return the LSTM state before the first round of `count` sequences."""
        return State(*(np.zeros((count, self.hidden_size), dtype=np.float32) for _ in range(2)))

    def scores(self, vectors: Array, state: State) -> tuple[Array, State]:
        """Return scores [N, plans] float32 of observations [N, D] float32, and the next LSTM state."""
        vectors = vectors if self._visible is None else vectors * self._visible
        x = np.clip((vectors - self._mean) / self._scale, -self._clip, self._clip)
        if self._lstm is not None:
            x, state = self._lstm_step(x, state)
        for index, (weight, bias) in enumerate(self._layers):
            x = (self._activation(x) if index else x) @ weight + bias
        return x, state

    def _lstm_step(self, x: Array, state: State) -> tuple[Array, State]:
        """One step of an LSTM (Hochreiter & Schmidhuber, 1997), gates in torch's order: input, forget, cell, output."""
        assert self._lstm is not None
        w_input, w_hidden, bias = self._lstm
        gates = np.split(x @ w_input + state.hidden @ w_hidden + bias, 4, axis=1)
        enter, keep, output = (_sigmoid(gates[index]) for index in (0, 1, 3))
        cell = keep * state.cell + enter * np.tanh(gates[2])
        hidden = output * np.tanh(cell)
        return hidden, State(hidden, cell)


class NetworkChooser(PlanChooser):
    """Chooses the plan that a learned policy scores highest. NumPy only.

    Args:
        network: the network that scores `plans`.
        plans: in the order of the actions that the policy was trained with.
        allowed: [n] bool, the plans that may be chosen, at least one; None: all.
    """

    def __init__(
        self, network: PolicyNetwork, plans: Sequence[Plan], allowed: Sequence[bool] | NDArray[np.bool_] | None = None
    ) -> None:
        self.plans, self.network = tuple(plans), network
        self.allowed = np.array([True] * len(self.plans) if allowed is None else allowed, dtype=np.bool_)
        require(network.outputs == len(self.plans), "plans", f"the {network.outputs} that the policy scores", plans)
        valid = self.allowed.shape == (len(self.plans),) and bool(self.allowed.any())
        require(valid, "allowed", "a boolean for each plan, one of them True", allowed)
        self._state = network.start()

    def choose(self, observation: Observation) -> Plan:
        vector, inputs = observation.vector(), self.network.inputs
        rule = f"of {inputs} entries (observe the plans {', '.join(map(str, self.plans))})"
        require(len(vector) == inputs, "an observation", rule, len(vector))
        actions, self._state = self.act(vector[None], self._state)
        return self.plans[int(actions[0])]

    def act(self, vectors: Array, state: State) -> tuple[NDArray[np.int64], State]:
        """Return indices of plans [N] int64 for observations [N, D] float32, and the next LSTM state."""
        scores, state = self.network.scores(vectors, state)
        actions: NDArray[np.int64] = np.where(self.allowed, scores, -np.inf).argmax(1)
        return actions, state

    def state_dict(self) -> dict[str, Any]:
        return {"hidden": self._state.hidden.tolist(), "cell": self._state.cell.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        hidden, cell = (np.array(state[name], dtype=np.float32) for name in ("hidden", "cell"))
        self._state = State(hidden.reshape(1, -1), cell.reshape(1, -1))


def load_chooser(directory: str | Path) -> NetworkChooser:
    """Load a chooser from a directory; raises ValueError if it does not hold a policy."""
    from safetensors.numpy import load_file

    description = read_description(directory)
    network = PolicyNetwork(load_file(Path(directory) / WEIGHTS), description["activation"])
    return NetworkChooser(network, parse_plans(description["plans"]), description["allowed"])


def read_description(directory: str | Path) -> dict[str, Any]:
    """Read policy.json; errors are those of `load_chooser`."""
    folder = Path(directory)
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"a policy must hold {WEIGHTS} and {DESCRIPTION}, but {str(folder)!r} has no {name}")
    description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    missing = sorted({"algorithm", "plans", "allowed", "activation"} - set(description))
    if missing:
        raise ValueError(f"{DESCRIPTION} must name algorithm, plans, allowed and activation, but lacks {missing[0]!r}")
    return description


def _sigmoid(x: Array) -> Array:
    out: Array = np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1.0))
    return out
