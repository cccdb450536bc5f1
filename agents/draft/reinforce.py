"""REINFORCE on a draft that acts on `SpecRL/DraftTokens-v0`: what the clock paid for is drafted more often.

The policy is the draft: chains x_1 … x_K sampled from q_θ, verified by the target's own choice (tokens without
probabilities). The gradient of a round's expected reward r is (Williams, 1992, "Simple statistical gradient-following
algorithms for connectionist reinforcement learning", equation 11)

    ∇ E[r] = E[ (r - b) Σ_requests Σ_{k ≤ tested} ∇ log q_θ(x_k | x_1 … x_{k-1}) ]

unbiased for any baseline b that was known before the round; ours is the running mean of the rewards at the round's
batch size. Drafts after the first that fell are left out: r does not depend on them, so their term is 0 on average.
The estimate is unbiased; the clipping of its norm and Adam's steps come after it.

Three conditions. Drafts must be verified without their q: under rejection sampling r depends on q_θ itself, beyond the
samples, and the formula lacks that term. The weights must be those that drafted: so one update is made per episode, and
none during it. And it is the gradient of the round's own reward: that an accepted draft moves where the next round
begins is left to the reward (`differential` charges each round for its time).

Where x_k was tested, x_1 … x_{k-1} stood and are tokens of the request. So log q_θ(x_k) is read off pass k - 1 of the
training-time test (`unroll`) on the request's own tokens, at the slot where the chain had got to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from specrl.agents.draft.unroll import unroll_states
from specrl.models.draft import Draft
from specrl.models.rope import rope_table


@dataclass(slots=True)
class _Seen:
    """A request as far as it was seen: L tokens, and the features of slots 0 .. L - 2."""

    tokens: list[int]
    features: list[NDArray[np.float32]] = field(default_factory=list)


class _Tested(NamedTuple):
    """The drafts of one request in one round that the target looked at."""

    request: int
    known: int  # L before the round
    drafted: list[int]  # x_1 … x_k as draft ids, k at least 1
    advantage: float


class Reinforce:
    """Learns a draft by policy gradient from the rewards of an environment (see the module's text).

    Args:
        draft: where to start from.
        embedding: [V, H] the target's.
        num_steps: K of the environment.
        temperature: that the drafts are sampled at, above 0.
        learning_rate: of Adam.
        clip: of the gradient's norm.
        forget: how much of the baseline's evidence is left after another round.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        draft: Draft,
        embedding: Tensor,
        *,
        num_steps: int,
        temperature: float = 1.0,
        learning_rate: float = 3e-4,
        clip: float = 1.0,
        forget: float = 0.98,
    ) -> None:
        if not (temperature > 0 and learning_rate > 0 and clip > 0 and num_steps > 0 and 0 <= forget < 1):
            raise ValueError(
                "temperature, learning_rate, clip and num_steps must be above 0 and forget in [0, 1), but got "
                f"{temperature}, {learning_rate}, {clip}, {num_steps} and {forget}"
            )
        c = self.config = draft.config
        self._fixed = {name: t for name, t in draft.tensors.items() if name in ("d2t", "t2d")}
        self.parameters = {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if n not in self._fixed}
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), lr=learning_rate)
        self.version = 0
        self._embedding = embedding.detach().float().cpu()
        self._rotation = rope_table(c.rope, c.head_dim, c.max_position_embeddings)
        self._num_steps, self._temperature, self._clip = num_steps, temperature, clip
        self._forget, self._means = forget, dict[int, tuple[float, float]]()  # reward and weight, by batch size
        ids = torch.arange(c.vocab_size) if draft.target_ids is None else draft.target_ids
        self._draft_id = {token: i for i, token in enumerate(ids.tolist())}
        self._seen: dict[int, _Seen] = {}
        self._tested: list[_Tested] = []
        self._rounds = 0

    def begin(self) -> None:
        """Forget the episode so far; its requests' ids begin anew."""
        self._seen, self._tested, self._rounds = {}, [], 0

    def see(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Note what an observation tells of its requests; before acting on it."""
        for prefill in info["prefills"]:
            self._seen[prefill.request_id] = _Seen(prefill.tokens.tolist(), list(prefill.features))
        for row, request in enumerate(info["request_ids"].tolist()):
            seen, count = self._seen[request], int(observation["mask"][row].sum())
            at = int(observation["positions"][row, 0])
            seen.tokens[at:] = observation["tokens"][row, :count].tolist()
            seen.features[at - 1 :] = list(observation["features"][row, :count])

    def record(
        self, request_ids: Iterable[int], drafted: Tensor, correct: Sequence[int], reward: float | NDArray[Any]
    ) -> None:
        """Take a round's result.

        Args:
            request_ids: of the b requests that were drafted for.
            drafted: [>= b, K] int64, what was drafted for them; -1 where none.
            correct: [b], drafts that stood.
            reward: of the round; or [b], its parts by request whose mean it is, where those are known to depend on the
                request's own drafts alone: then they are weighed by those, which has less variance.
        """
        ids, batch = list(request_ids), len(correct)
        mean, weight = self._means.get(batch, (0.0, 0.0))
        if weight:  # the first round of a batch size has no baseline yet: it only makes one
            self._rounds += 1
            advantages = np.broadcast_to(np.asarray(reward) - mean, batch) / (batch if np.ndim(reward) else 1)
            rows = zip(ids, drafted[:batch].tolist(), correct, advantages.tolist(), strict=True)
            for request, row, stood, advantage in rows:
                chain = [token for token in row if token >= 0][: int(stood) + 1]
                if chain:
                    known = self._seen[request].tokens
                    tested = [self._draft_id[token] for token in chain]
                    self._tested.append(_Tested(request, len(known), tested, advantage))
                    known.extend(chain[: int(stood)])  # seen again unless the request has ended
        weight = self._forget * weight + 1.0
        self._means[batch] = (mean + (float(np.mean(reward)) - mean) / weight, weight)

    def update(self) -> dict[str, float]:
        """One step along the gradient of the rewards of the rounds since `begin`; nothing is left of them.

        Returns:
            drafts tested, mean log_prob of them, gradient_norm, and updates made (0 where there was nothing to learn).
        """
        metrics = {"drafts": 0.0, "log_prob": 0.0, "gradient_norm": 0.0, "updates": 0.0}
        if self._tested:
            logp, advantages = self.log_probabilities()
            self.optimizer.zero_grad(set_to_none=True)
            (-(advantages * logp).sum() / self._rounds).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self._clip))
            if np.isfinite(norm):
                self.optimizer.step()
                self.version += 1
                metrics = {"drafts": float(len(logp)), "log_prob": float(logp.detach().mean())}
                metrics |= {"gradient_norm": norm, "updates": 1.0}
        self.begin()
        return metrics

    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        """log q_θ of every draft tested since `begin` with gradients, and its advantage: [N] and [N] float32."""
        requests = list(dict.fromkeys(tested.request for tested in self._tested))
        row = {request: i for i, request in enumerate(requests)}
        length = max(len(self._seen[request].tokens) for request in requests) - 1  # slots
        tokens = torch.zeros(len(requests), length, dtype=torch.int64)
        features = torch.zeros(len(requests), length, 3 * self.config.target_hidden_size)
        for request, i in row.items():
            seen = self._seen[request]
            tokens[i, : len(seen.tokens) - 1] = torch.tensor(seen.tokens[1:])
            features[i, : len(seen.features)] = torch.from_numpy(np.stack(seen.features))
        passes = min(self._num_steps, length)
        states = unroll_states(self.parameters, self.config, self._embedding[tokens], features, self._rotation, passes)
        parts, advantages = [], []
        for k, state in enumerate(states):
            here = [t for t in self._tested if len(t.drafted) > k]
            if not here:
                break
            rows = torch.tensor([row[t.request] for t in here])
            slots = torch.tensor([t.known - 2 + k for t in here])
            logits = F.linear(state[rows, slots], self.parameters["lm_head.weight"]) / self._temperature
            drafted = torch.tensor([t.drafted[k] for t in here])
            parts.append(torch.log_softmax(logits, -1).gather(-1, drafted[:, None])[:, 0])
            advantages += [t.advantage for t in here]
        return torch.cat(parts), torch.tensor(advantages)

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Version and the weights to act by, by SGLang's names; later updates do not touch them."""
        return self.version, {name: t.detach().clone() for name, t in {**self.parameters, **self._fixed}.items()}
