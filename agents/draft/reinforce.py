"""REINFORCE for a draft that acts on `SpecRL/DraftTokens-v0`.

The policy is the draft: chains x_1 … x_K sampled from q_θ, which are accepted if they are the target's own tokens. The
gradient of a round's expected reward r is (Williams, 1992, "Simple statistical gradient-following algorithms for
connectionist reinforcement learning", equation 11)

    ∇ E[r] = E[ (r - b) Σ_requests Σ_{k ≤ tested} ∇ log q_θ(x_k | x_1 … x_{k-1}) ]

for any baseline b that was known before the round; here the running mean of the rewards at its batch size. Drafts after
the first rejected one are left out: r does not depend on them, so their terms have mean 0.

The estimate is unbiased under three conditions. Drafts are verified without q: with rejection sampling, r depends on
q_θ itself. The weights are those that drafted, so there is one update per episode. And the effect of accepted drafts on
later rounds is part of the reward (`differential` charges each round for its time).

If x_k was tested, x_1 … x_{k-1} were accepted and are tokens of the request. So log q_θ(x_k) is computed in step k - 1
of the training-time test (`unroll`) on the request's own tokens, at the slot that the chain had reached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from specrl.agents.draft.unroll import unroll
from specrl.core.checks import require
from specrl.models.draft import Draft


class _Request(NamedTuple):
    """A request so far: L tokens, and the features of slots 0 .. L - 2."""

    tokens: list[int]
    features: list[NDArray[np.float32]]


class _Tested(NamedTuple):
    """A draft that was accepted, or the first rejected one of its chain; `slot` predicts it."""

    request: int
    slot: int
    draft_id: int
    advantage: float


class Reinforce:
    """Learns a draft by policy gradient from the rewards of an environment (see the module's docstring).

    Args:
        draft: the draft to start from.
        embedding: [V, H] the target's.
        num_steps: K of the environment, above 0.
        temperature: of sampling drafts, above 0.
        learning_rate: of Adam, above 0.
        max_grad_norm: gradients are clipped to this norm, above 0.
        forget: factor of the baseline's weight per round, in [0, 1). A number out of range raises a ValueError.
    """

    def __init__(
        self,
        draft: Draft,
        embedding: Tensor,
        *,
        num_steps: int,
        temperature: float = 1.0,
        learning_rate: float = 3e-4,
        max_grad_norm: float = 1.0,
        forget: float = 0.98,
    ) -> None:
        numbers = {"num_steps": num_steps, "temperature": temperature, "learning_rate": learning_rate}
        for name, number in {**numbers, "max_grad_norm": max_grad_norm}.items():
            require(number > 0, name, "above 0", number)
        require(0 <= forget < 1, "forget", "in [0, 1)", forget)
        self.config = draft.config
        self._vocabulary_maps = {n: t for n, t in draft.tensors.items() if not t.is_floating_point()}
        self.parameters = {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if t.is_floating_point()}
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=learning_rate)
        self.version = 0
        self._embedding = embedding.detach().float().cpu()
        self._num_steps, self._temperature, self._max_grad_norm = num_steps, temperature, max_grad_norm
        self._forget, self._baselines = forget, dict[int, tuple[float, float]]()  # mean and weight, by batch size
        ids = torch.arange(self.config.vocab_size) if draft.target_ids is None else draft.target_ids
        self._draft_id = {token: i for i, token in enumerate(ids.tolist())}
        self.begin()

    def begin(self) -> None:
        """Discard the episode so far; request ids start again."""
        self._requests: dict[int, _Request] = {}
        self._tested: list[list[_Tested]] = [[] for _ in range(self._num_steps)]  # by step
        self._rounds = 0

    def see(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Read an observation, before acting on it."""
        for prefill in info["prefills"]:
            self._requests[prefill.request_id] = _Request(prefill.tokens.tolist(), list(prefill.features))
        for row, request_id in enumerate(info["request_ids"].tolist()):
            request, count = self._requests[request_id], int(observation["mask"][row].sum())
            position = int(observation["positions"][row, 0])
            request.tokens[position:] = observation["tokens"][row, :count].tolist()
            request.features[position - 1 :] = list(observation["features"][row, :count])

    def record(
        self, request_ids: Iterable[int], drafted: Tensor, correct: Sequence[int], reward: float | NDArray[Any]
    ) -> None:
        """Record the result of a round.

        Args:
            request_ids: of the b requests with drafts.
            drafted: [>= b, K] int64, their drafts; -1: none.
            correct: [b], number of accepted drafts.
            reward: of the round; or [b], one for each request, whose mean is the reward of the round. The variance is
                smaller with the latter, if each depends on the drafts of its request only.
        """
        batch = len(correct)
        mean, weight = self._baselines.get(batch, (0.0, 0.0))
        if weight:  # the first round at a batch size only sets the baseline
            self._rounds += 1
            advantages = np.broadcast_to(np.asarray(reward) - mean, batch) / (batch if np.ndim(reward) else 1)
            rows = zip(request_ids, drafted[:batch].tolist(), correct, advantages.tolist(), strict=True)
            for request, row, accepted, advantage in rows:
                chain = [token for token in row if token >= 0][: int(accepted) + 1]
                tokens = self._requests[request].tokens
                for k, token in enumerate(chain):
                    self._tested[k].append(_Tested(request, len(tokens) - 2 + k, self._draft_id[token], advantage))
                tokens.extend(chain[: int(accepted)])  # observed again unless the request has ended
        weight = self._forget * weight + 1.0
        self._baselines[batch] = (mean + (float(np.mean(reward)) - mean) / weight, weight)

    def update(self) -> dict[str, float]:
        """Make one optimiser step on the rounds since `begin`, discard them, and return metrics (updates 0: none)."""
        metrics = dict.fromkeys(("drafts", "log_prob", "gradient_norm", "updates"), 0.0)
        if self._tested[0]:
            logp, advantages = self.log_probabilities()
            self.optimizer.zero_grad(set_to_none=True)
            (-(advantages * logp).sum() / self._rounds).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._max_grad_norm))
            if np.isfinite(norm):
                self.optimizer.step()
                self.version += 1
                metrics = {"drafts": float(len(logp)), "log_prob": float(logp.detach().mean())}
                metrics |= {"gradient_norm": norm, "updates": 1.0}
        self.begin()
        return metrics

    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        """Return log q_θ with gradients, and the advantages, of the drafts tested since `begin`, [N] float32 each."""
        row = {request: i for i, request in enumerate(dict.fromkeys(t.request for t in self._tested[0]))}
        length = max(len(self._requests[request].tokens) for request in row) - 1  # slots
        tokens = torch.zeros(len(row), length, dtype=torch.int64)
        features = torch.zeros(len(row), length, 3 * self.config.target_hidden_size)
        for request_id, i in row.items():
            request = self._requests[request_id]
            tokens[i, : len(request.tokens) - 1] = torch.tensor(request.tokens[1:])
            features[i, : len(request.features)] = torch.from_numpy(np.stack(request.features))
        passes = sum(len(tested) > 0 for tested in self._tested)
        states = unroll(self.parameters, self.config, self._embedding[tokens], features, passes)
        parts, advantages = [], []
        for tested, state in zip(self._tested, states, strict=False):
            rows, slots, draft_ids = torch.tensor([(row[t.request], t.slot, t.draft_id) for t in tested]).T
            logits = F.linear(state[rows, slots], self.parameters["lm_head.weight"]) / self._temperature
            parts.append(torch.log_softmax(logits, -1).gather(-1, draft_ids[:, None])[:, 0])
            advantages += [t.advantage for t in tested]
        return torch.cat(parts), torch.tensor(advantages)

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the version and a copy of the weights, by SGLang's names."""
        return self.version, {n: t.detach().clone() for n, t in {**self.parameters, **self._vocabulary_maps}.items()}
