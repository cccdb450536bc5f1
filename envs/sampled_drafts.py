"""Drafts that the environment itself draws, so that they truly are samples of what they are verified against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specrl.core.round import Ints


class Draws:
    """The drafts drawn for the next round, and the distributions they were drawn from.

    Rejection sampling leaves the target's distribution as it is only if each draft is a sample of its q, and if
    nobody looks at the sample before deciding whether to propose it. So what was drawn is proposed, all of it.

    Args:
        num_steps: K, the longest draft.
        vocab_size: V.
        seed: of the samples.
    """

    def __init__(self, num_steps: int, vocab_size: int, seed: int) -> None:
        self._num_steps, self._vocab = num_steps, vocab_size
        self._generator = torch.Generator().manual_seed(seed)
        self._tokens: list[Tensor] = []  # [live] each
        self._odds: list[Tensor] = []  # [live, V] each

    def draw(self, q: Any, live: int) -> Ints:
        """One more draft for each of the `live` requests: see `DraftTokensEnv.draw`."""
        odds = torch.as_tensor(q)
        if odds.shape != (live, self._vocab) or odds.dtype != torch.float32:
            given = f"{str(odds.dtype).removeprefix('torch.')} {list(odds.shape)}"
            raise ValueError(f"q must be float32 [{live}, {self._vocab}], a row for each live request, but got {given}")
        if len(self._tokens) == self._num_steps:
            raise ValueError(
                f"drafts are at most num_steps={self._num_steps} tokens long, but one more was to be drawn"
            )
        sums = odds.sum(1)
        if not (odds >= 0).all() or not (((sums - 1.0).abs() < 1e-3) | (sums == 0.0)).all():
            found = f"{odds.min():g} at least, and sums of {sums.min():g} to {sums.max():g}"
            raise ValueError(
                f"a row of q must be finite, at least 0 and sum to 1 (to 0 to end a draft), but got {found}"
            )
        ended = sums == 0.0
        if self._tokens:
            ended |= self._tokens[-1] < 0
        race = torch.empty_like(odds).exponential_(generator=self._generator).clamp_(min=1e-30)  # the first is a sample
        tokens = torch.where(ended, -1, (odds / race).argmax(1))
        self._tokens.append(tokens)
        self._odds.append(odds.clone())
        return tokens.numpy().copy()

    def proposed(self, drafted: Tensor) -> Tensor | None:
        """The distributions [live, s, V] float32 of these drafts [live, s] int64; None where none were drawn.

        Raises:
            ValueError: the drafts are others than those drawn.
        """
        if not self._tokens:
            return None
        drawn = torch.stack(self._tokens, 1)
        steps = int((drawn >= 0).sum(1).max())
        if not torch.equal(drawn[:, :steps], drafted):
            raise ValueError(
                f"drafts that were drawn must be proposed as they were drawn, {drawn[:, :steps].tolist()}, but got "
                f"{drafted.tolist()}; to end a draft early, give draw() a row of zeros"
            )
        return torch.stack(self._odds, 1)[:, :steps]

    def clear(self) -> None:
        """The round is over."""
        self._tokens.clear()
        self._odds.clear()
