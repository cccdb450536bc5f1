"""Observations and actions of an agent that drafts, and drafts that the environment samples for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.spaces.utils import flatten_space
from numpy.typing import NDArray
from torch import Tensor

from specrl.core.checks import refuse
from specrl.core.interfaces import ProposalSession
from specrl.core.round import Ints, Trace

Arrays = dict[str, Any]  # of NumPy arrays
_LARGEST = float(np.finfo(np.float32).max)  # environment checkers want bounds


class Prefill(NamedTuple):
    """A new request. The last feature is also in the observation, with the token that the prefill sampled."""

    request_id: int
    row: int  # of observations and actions
    tokens: Ints  # [T] int64, its prompt
    features: NDArray[np.float32]  # [T, 3H], the target's at each token


class Sizes(NamedTuple):
    """The sizes of observations and actions."""

    rows: int  # B, the largest number of live requests
    num_steps: int  # K, the longest draft
    vocab_size: int  # V
    feature_size: int  # 3H
    max_context: int  # largest number of tokens of a request
    flat: bool  # whether every array is a vector; actions are then in [0, V], and V means no draft


class ObservationWindow:
    """The tokens that each request committed in the last round, and the features before them."""

    def __init__(self, sizes: Sizes) -> None:
        shape, vocab_size = (sizes.rows, sizes.num_steps + 1), sizes.vocab_size
        boxes: dict[str, spaces.Box] = {
            "features": spaces.Box(-_LARGEST, _LARGEST, (*shape, sizes.feature_size), dtype=np.float32),
            "tokens": spaces.Box(-1, vocab_size - 1, shape, dtype=np.int64),
            "positions": spaces.Box(-1, sizes.max_context, shape, dtype=np.int64),
            "mask": spaces.Box(0, 1, shape, dtype=np.int8),
            "last": spaces.Box(0, vocab_size - 1, shape[:1], dtype=np.int64),
            "live": spaces.Box(0, 1, shape[:1], dtype=np.int8),
        }
        self._flat = sizes.flat
        self._arrays: Arrays = {name: np.zeros(box.shape, dtype=box.dtype) for name, box in boxes.items()}
        self.space = spaces.Dict({name: flatten_space(box) if self._flat else box for name, box in boxes.items()})

    def read(self, session: ProposalSession, traces: Iterable[Trace]) -> tuple[Prefill, ...]:
        """Read the traces since the last call, and return the new requests."""
        ids, last = list(session.request_ids), list(session.last_tokens)
        prefills = []
        for trace in traces:
            if trace.plan is not None:
                for row, request in enumerate(trace.request_ids[: len(ids)].tolist()):
                    if ids[row] == request:  # otherwise it has ended
                        count = int((trace.path[row] >= 0).sum())
                        tokens = [*trace.tokens[row, 1:count].tolist(), last[row]]
                        self._set(row, trace.features[row, :count], tokens, int(trace.positions[row]) + 1)
            elif (request := int(trace.request_ids[0])) in ids:  # otherwise it ended with its first token
                row, features = ids.index(request), trace.features[0].float()
                self._set(row, features[-1:], [last[row]], trace.tokens.shape[1])
                prefills.append(Prefill(request, row, trace.tokens[0].cpu().numpy(), features.cpu().numpy()))
        return tuple(prefills)

    def _set(self, row: int, features: Tensor, tokens: list[int], position: int) -> None:
        a, count = self._arrays, len(tokens)
        _clear(a, slice(row, row + 1))
        a["mask"][row, :count] = 1
        a["features"][row, :count] = features.float().cpu().numpy()
        a["tokens"][row, :count] = tokens
        a["positions"][row, :count] = np.arange(position, position + count)
        a["last"][row] = tokens[-1]

    def observation(self, live: int) -> Arrays:
        """Return the observation with `live` requests in the first rows; the other rows are empty."""
        shown = {name: array.copy() for name, array in self._arrays.items()}
        _clear(shown, slice(live, None))
        shown["live"][:live] = 1
        return {name: array.reshape(-1) for name, array in shown.items()} if self._flat else shown


def _clear(arrays: Arrays, rows: slice) -> None:
    for name, array in arrays.items():
        array[rows] = -1 if name in ("tokens", "positions") else 0


class ActionDecoder:
    """Turns actions into drafts."""

    def __init__(self, sizes: Sizes) -> None:
        self._shape, self._vocab = (sizes.rows, sizes.num_steps), sizes.vocab_size
        self._lowest = 0 if sizes.flat else -1
        shape = (sizes.rows * sizes.num_steps,) if sizes.flat else self._shape
        self.space = spaces.MultiDiscrete(np.full(shape, sizes.vocab_size + 1), start=np.full(shape, self._lowest))

    def read(self, action: Any, live: int) -> Tensor:
        """Return the drafts of the live requests: [live, s] int64, s the length of the longest draft."""
        tokens, shape = np.asarray(action), self.space.shape
        if tokens.shape != shape or tokens.dtype.kind not in "iu":
            refuse("an action", f"integers {list(shape)}", f"{tokens.dtype} {list(tokens.shape)}")
        lowest, highest = self._lowest, self._lowest + self._vocab
        low, high = int(tokens.min()), int(tokens.max())
        if not lowest <= low <= high <= highest:
            refuse("drafted tokens", f"in [{lowest}, {highest}]", (low, high))
        tokens = tokens.astype(np.int64).reshape(self._shape)[:live]
        ended = np.logical_or.accumulate((tokens < 0) | (tokens == self._vocab), 1)
        steps = int((~ended).sum(1).max())
        return torch.from_numpy(np.where(ended, -1, tokens)[:, :steps])


class SampledDrafts:
    """The drafts that the environment drew for the next round, and the distributions it drew them from.

    Rejection sampling keeps the target's distribution only if each draft is a sample of its q, and if the decision to
    propose it does not depend on the sample. So all drafts that were drawn must be proposed.

    Args:
        num_steps: K, the longest draft.
        vocab_size: V.
    """

    def __init__(self, num_steps: int, vocab_size: int) -> None:
        self._num_steps, self._vocab = num_steps, vocab_size
        self._generator = torch.Generator()
        self._tokens: list[Tensor] = []  # [live] each
        self._q: list[Tensor] = []  # [live, V] each

    def reset(self, seed: int) -> None:
        """Begin an episode; `seed` is the seed of the samples."""
        self._generator.manual_seed(seed)
        self.clear()

    def draw(self, q: Any, live: int) -> Ints:
        """Draw one more draft for each of the `live` requests (see `DraftTokensEnv.draw`)."""
        probabilities = torch.as_tensor(q)
        shape, dtype = list(probabilities.shape), probabilities.dtype
        if shape != [live, self._vocab] or dtype != torch.float32:
            got = f"{str(dtype).removeprefix('torch.')} {shape}"
            refuse("q", f"float32 {[live, self._vocab]}, a row for each live request", got)
        if len(self._tokens) >= self._num_steps:
            refuse("draws", f"at most num_steps={self._num_steps}", "one more")
        sums = probabilities.sum(1)
        if not ((probabilities >= 0).all() and (((sums - 1.0).abs() < 1e-3) | (sums == 0.0)).all()):
            rule = "finite, at least 0 and of sum 1 (or 0, to end a draft)"
            refuse("rows of q", rule, f"sums {sums.tolist()}")
        ended = sums == 0.0
        if self._tokens:
            ended |= self._tokens[-1] < 0
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator).clamp_(min=1e-30)
        tokens = torch.where(ended, -1, (probabilities / noise).argmax(1))  # the argmax is a sample (exponential race)
        self._tokens.append(tokens)
        self._q.append(probabilities.clone())
        return tokens.numpy().copy()

    def distributions(self, drafted: Tensor) -> Tensor | None:
        """Return the distributions [live, s, V] float32 of the drafts that were drawn; None: none were drawn.

        `drafted` [live, s] int64 are the drafts of the action; raises ValueError if they are others.
        """
        if not self._tokens:
            return None
        drawn = torch.stack(self._tokens, 1)
        steps = int((drawn >= 0).sum(1).max())
        if not torch.equal(drawn[:, :steps], drafted):
            rule = f"the drafts that were drawn, {drawn[:, :steps].tolist()} (draw a row of zeros to end a draft early)"
            refuse("an action", rule, drafted.tolist())
        return torch.stack(self._q, 1)[:, :steps]

    def clear(self) -> None:
        """Forget the drafts, after the round."""
        self._tokens.clear()
        self._q.clear()
