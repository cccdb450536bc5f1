"""An EAGLE3 draft that acts on `SpecRL/DraftTokens-v0`. Slot t of its KV cache holds (features t, token t + 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specrl.models.attention import TokenSlots
from specrl.models.draft import Draft, ServingDraft
from specrl.models.target import Target

Draw = Callable[[Tensor], NDArray[np.int64]]


class DraftActor:
    """A draft that turns observations into drafts.

    Args:
        draft, target: its weights, and the model whose embedding it shares.
        rows, num_steps: B and K of the environment.
        max_context: largest number of tokens of a request.
        temperature: of sampling drafts; 0: the most likely tokens.
        seed: of the samples.
    """

    def __init__(
        self,
        draft: Draft,
        target: Target,
        *,
        rows: int,
        num_steps: int,
        max_context: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.serving = ServingDraft(draft, target)
        self._rows, self._num_steps, self._temperature = rows, num_steps, temperature
        self._cache = self.serving.new_cache(rows, max_context + 2 * num_steps + 2)
        self._vocab_size = target.config.vocab_size
        self._generator = torch.Generator(target.device).manual_seed(seed)

    def load(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Use these weights from now on, by SGLang's names; the cache does not change."""
        self.serving.load(weights, version=version)

    @torch.inference_mode()
    def read(self, prefills: Iterable[Any]) -> None:
        """Read the prompts of new requests, `info["prefills"]` (inside `paused_timer()`, because it is prefill)."""
        device = self.serving.device
        for prefill in prefills:
            count = len(prefill.tokens) - 1
            if count:
                tokens = torch.from_numpy(prefill.tokens[1:])[None].to(device)
                hidden = self._fuse(prefill.features[None, :-1])
                slots = torch.arange(count, device=device)[None]
                self.serving.decode(tokens, hidden, self._cache, TokenSlots(slots, count, first_row=prefill.row))

    @torch.inference_mode()
    def act(
        self, observation: Mapping[str, Any], num_steps: int | None = None, *, draw: Draw | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draft for the live requests of an observation, `num_steps` tokens, by default K.

        Args:
            draw: samples tokens [b] from q [b, V] instead of the actor: the environment's `draw`.

        Returns:
            tokens [B, K] int64 (-1: none), and the distributions q [B, K, V] float32 that they were sampled from
            (one-hot at temperature 0), on the CPU.
        """
        device, steps = self.serving.device, self._num_steps if num_steps is None else num_steps
        live = int(observation["live"].sum())
        counts = observation["mask"][:live].sum(1).astype(np.int64)  # [b], new tokens
        width, first = int(counts.max()), observation["positions"][:live, 0] - 1
        slots = torch.from_numpy(first[:, None] + np.arange(width)).to(device)  # padding is overwritten later
        tokens = torch.from_numpy(observation["tokens"][:live, :width]).clamp(min=0).to(device)
        hidden = self._fuse(observation["features"][:live, :width])
        hidden = self.serving.decode(tokens, hidden, self._cache, TokenSlots(slots, int(first.max()) + width))
        new = torch.from_numpy(counts).to(device)
        state, next_slots = hidden[torch.arange(live, device=device), new - 1], slots[:, 0] + new  # [b, H], [b]
        drafts = torch.full((self._rows, self._num_steps), -1)
        probabilities = torch.zeros(self._rows, self._num_steps, self._vocab_size)
        length = int((first + counts).max())
        for step in range(steps):
            q = self._distribution(state)
            tokens = self._sample(q) if draw is None else torch.from_numpy(draw(q.cpu())).to(device)
            drafts[:live, step], probabilities[:live, step] = tokens.cpu(), q.cpu()
            if step + 1 < steps:
                length += 1
                where = TokenSlots(next_slots[:, None] + step, length)
                state = self.serving.decode(tokens[:, None], state[:, None], self._cache, where)[:, 0]
        return drafts, probabilities

    def _fuse(self, features: NDArray[np.float32]) -> Tensor:
        return self.serving.fuse(torch.from_numpy(features).to(self.serving.device, self.serving.dtype))

    def _distribution(self, state: Tensor) -> Tensor:
        """Return q [b, V]: zero outside the draft's vocabulary, one-hot at temperature 0."""
        logits, ids = self.serving.logits(state), self.serving.target_ids
        if self._temperature:
            q = torch.softmax(logits / self._temperature, -1)
        else:
            q = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1)[:, None], 1.0)
        return q if ids is None else q.new_zeros(len(q), self._vocab_size).index_copy_(1, ids, q)

    def _sample(self, q: Tensor) -> Tensor:
        if not self._temperature:
            return q.argmax(-1)
        noise = torch.empty_like(q).exponential_(generator=self._generator)
        return (q / noise).argmax(-1)  # a sample of q (exponential race)
