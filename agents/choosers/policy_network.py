"""A learned policy as a plan chooser: the network of an agent of Stable-Baselines3, run with NumPy.

A policy is a directory: policy.safetensors holds the tensors by Stable-Baselines3's names, and the mean and variance of
observations if it normalises them; policy.json names the algorithm and the plans.
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

from specrl.core.checks import require_known
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan, parse_plans

Array = NDArray[np.float32]
WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
MEAN, VARIANCE, VISIBLE = "observation.mean", "observation.variance", "observation.seen"
_EPSILON, _CLIP = 1e-8, 10.0  # of VecNormalize
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, np.float32(0.0))}
_LAYERS = r"(?:mlp_extractor\.policy_net|q_net\.q_net)\.(\d+)\.weight"
_SAME_PER_LAYER = r"lstm_actor\.weight_ih_l([1-9])"


@dataclass(frozen=True, slots=True)
class State:
    """The LSTM state of N sequences: `hidden` and `cell`, [N, H] float32; H is 0 without an LSTM."""

    hidden: Array
    cell: Array


class PolicyNetwork:
    """Computes scores of plans from observations: mask, normalisation, LSTM if there is one, layers.

    Args:
        tensors: by Stable-Baselines3's names, float32; those of critics and target networks are ignored.
        activation: between layers, 'tanh' or 'relu'.

    Raises:
        ValueError: no layers that score plans, or another activation.
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], activation: str = "tanh") -> None:
        require_known("activation", activation, _ACTIVATIONS)
        self._activation = _ACTIVATIONS[activation]
        own = {name: np.asarray(tensor, dtype=np.float32) for name, tensor in tensors.items()}
        numbered = sorted((int(match[1]), name) for name in own if (match := re.fullmatch(_LAYERS, name)))
        names = [name for _, name in numbered] + [name for name in ("action_net.weight",) if name in own]
        if not names:
            raise ValueError(f"a policy must have layers that score plans, but got tensors {', '.join(sorted(own))}")
        self._layers = [(own[name].T.copy(), own[name.removesuffix("weight") + "bias"]) for name in names]
        deep = [name for name in own if re.match(_SAME_PER_LAYER, name)]
        if deep:
            raise ValueError(f"a recurrent policy must have one LSTM layer, but got {deep[0]}; set n_lstm_layers: 1")
        self._lstm = None
        if "lstm_actor.weight_ih_l0" in own:
            into, onto = (own[f"lstm_actor.weight_{way}_l0"].T.copy() for way in ("ih", "hh"))
            self._lstm = into, onto, own["lstm_actor.bias_ih_l0"] + own["lstm_actor.bias_hh_l0"]
        self.hidden_size = self._lstm[1].shape[0] if self._lstm else 0
        first = self._lstm[0] if self._lstm else self._layers[0][0]
        self.inputs, self.outputs = first.shape[0], self._layers[-1][0].shape[1]
        self._visible = own.get(VISIBLE)
        self._mean = own.get(MEAN, np.zeros(self.inputs, dtype=np.float32))
        self._scale = np.sqrt(own[VARIANCE] + np.float32(_EPSILON)) if VARIANCE in own else np.float32(1.0)
        self._clip = _CLIP if MEAN in own else np.inf

    @property
    def is_table(self) -> bool:
        """Whether its choice depends on the batch size only: all else is masked, and it has no LSTM."""
        return self._visible is not None and not self._visible[1:].any() and self._lstm is None

    def start(self, count: int = 1) -> State:
        """The LSTM state before the first round of `count` sequences."""
        return State(*(np.zeros((count, self.hidden_size), dtype=np.float32) for _ in range(2)))

    def scores(self, vectors: Array, state: State) -> tuple[Array, State]:
        """Scores [N, plans] float32 of observations [N, D] float32, and the next LSTM state."""
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
        into, onto, bias = self._lstm
        enter, keep, new, out = np.split(x @ into + state.hidden @ onto + bias, 4, axis=1)
        cell = _sigmoid(keep) * state.cell + _sigmoid(enter) * np.tanh(new)
        hidden = _sigmoid(out) * np.tanh(cell)
        return hidden, State(hidden, cell)


class NetworkChooser(PlanChooser):
    """Chooses the plan that a learned policy scores highest. NumPy only.

    Args:
        network: scores `plans`.
        plans: in the order of the actions that the policy was trained with.
        allowed: [n] bool, the plans that may be chosen; None: all.

    Raises:
        ValueError: the network scores another number of plans, or no plan is allowed.
    """

    def __init__(
        self, network: PolicyNetwork, plans: Sequence[Plan], allowed: Sequence[bool] | NDArray[np.bool_] | None = None
    ) -> None:
        self.plans, self.network = tuple(plans), network
        self.allowed = np.array([True] * len(self.plans) if allowed is None else allowed, dtype=np.bool_)
        if network.outputs != len(self.plans) or self.allowed.shape != (len(self.plans),) or not self.allowed.any():
            raise ValueError(
                f"a policy must score every plan, and one must be allowed, but got {network.outputs} scores, "
                f"{len(self.plans)} plans and allowed={self.allowed.tolist()}"
            )
        self._state = network.start()

    def choose(self, observation: Observation) -> Plan:
        """The plan for the next round.

        Raises:
            ValueError: the observation is of other plans than the policy's.
        """
        vector = observation.vector()
        if vector.shape != (self.network.inputs,):
            raise ValueError(
                f"the observation must have the policy's {self.network.inputs} entries, but got {len(vector)}; "
                f"observe the plans {', '.join(map(str, self.plans))}"
            )
        actions, self._state = self.act(vector[None], self._state)
        return self.plans[int(actions[0])]

    def act(self, vectors: Array, state: State) -> tuple[NDArray[np.int64], State]:
        """Indices of plans [N] int64 for observations [N, D] float32, and the next LSTM state."""
        scores, state = self.network.scores(vectors, state)
        actions: NDArray[np.int64] = np.where(self.allowed, scores, -np.inf).argmax(1)
        return actions, state

    def state_dict(self) -> dict[str, Any]:
        """The LSTM state, JSON-able."""
        return {"hidden": self._state.hidden.tolist(), "cell": self._state.cell.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        hidden, cell = (np.array(state[name], dtype=np.float32) for name in ("hidden", "cell"))
        self._state = State(hidden.reshape(1, -1), cell.reshape(1, -1))


def load_chooser(directory: str | Path) -> NetworkChooser:
    """A chooser from the directory of a policy.

    Raises:
        ValueError: there is no policy.
    """
    from safetensors.numpy import load_file

    described = read_description(directory)
    network = PolicyNetwork(load_file(Path(directory) / WEIGHTS), described["activation"])
    return NetworkChooser(network, parse_plans(described["plans"]), described["allowed"])


def read_description(directory: str | Path) -> dict[str, Any]:
    """The content of policy.json.

    Raises:
        ValueError: there is no policy.
    """
    folder = Path(directory)
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise ValueError(f"a policy must hold {WEIGHTS} and {DESCRIPTION}, but {str(folder)!r} has no {name}")
    described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    missing = sorted({"algorithm", "plans", "allowed", "activation"} - set(described))
    if missing:
        raise ValueError(f"{DESCRIPTION} must name algorithm, plans, allowed and activation, but lacks {missing[0]!r}")
    return dict(described)


def _sigmoid(x: Array) -> Array:
    out: Array = np.float32(0.5) * (np.tanh(np.float32(0.5) * x) + np.float32(1.0))
    return out
