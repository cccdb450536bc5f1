"""What an agent that drafts sees of each round, and how its answer is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from specrl.core.interfaces import ProposalSession
from specrl.core.round import Ints, Trace

Arrays = dict[str, Any]  # of NumPy arrays
_LARGEST = float(np.finfo(np.float32).max)  # a space without bounds is found fault with


class Prefill(NamedTuple):
    """A request that came in: its prompt of T tokens, and the target's features at each of them.

    The last feature is in the observation too, beside the token that the prefill sampled.
    """

    request_id: int
    row: int  # where it stands in observations and actions
    tokens: Ints  # [T] int64
    features: NDArray[np.float32]  # [T, 3H]


class Window:
    """The tokens that each request committed since the agent last saw it, and the features that led to them.

    Args:
        rows: B, the most live requests.
        num_steps: K, the longest draft.
        feature_size: 3H.
        vocab_size: V.
        max_context: tokens a request may reach.
        flat: every array as a vector.
    """

    def __init__(
        self, rows: int, num_steps: int, feature_size: int, vocab_size: int, max_context: int, flat: bool
    ) -> None:
        shape = (rows, num_steps + 1)
        self._flat = flat
        self._arrays: Arrays = {
            "features": np.zeros((*shape, feature_size), dtype=np.float32),
            "tokens": np.full(shape, -1, dtype=np.int64),
            "positions": np.full(shape, -1, dtype=np.int64),
            "mask": np.zeros(shape, dtype=np.int8),
            "last": np.zeros(rows, dtype=np.int64),
            "live": np.zeros(rows, dtype=np.int8),
        }
        bounds = {
            "features": (-_LARGEST, _LARGEST),
            "tokens": (-1, vocab_size - 1),
            "positions": (-1, max_context),
            "mask": (0, 1),
            "last": (0, vocab_size - 1),
            "live": (0, 1),
        }
        self.space = spaces.Dict({name: self._box(name, *bounds[name]) for name in bounds})

    def _box(self, name: str, low: float, high: float) -> spaces.Box:
        array = self._arrays[name]
        shape = (array.size,) if self._flat else array.shape
        return spaces.Box(low, high, shape, dtype=array.dtype.type)

    def take(self, session: ProposalSession, traces: Iterable[Trace]) -> tuple[Prefill, ...]:
        """Note what the traces since the last call tell of the live requests; the requests that came in."""
        ids, last = list(session.request_ids), list(session.last_tokens)
        came = []
        for trace in traces:
            if trace.plan is not None:
                for row, request in enumerate(trace.request_ids[: len(ids)].tolist()):
                    if ids[row] == request:  # else it has ended
                        count = int((trace.path[row] >= 0).sum())
                        tokens = [*trace.tokens[row, 1:count].tolist(), last[row]]
                        self._put(row, trace.features[row, :count], tokens, int(trace.positions[row]) + 1)
            elif (request := int(trace.request_ids[0])) in ids:  # else it ended with its first token
                row, features = ids.index(request), trace.features[0].float()
                self._put(row, features[-1:], [last[row]], trace.tokens.shape[1])
                prompt = trace.tokens[0].cpu().numpy()
                came.append(Prefill(request, row, prompt, features.cpu().numpy()))
        return tuple(came)

    def _put(self, row: int, features: Tensor, tokens: list[int], position: int) -> None:
        a, count = self._arrays, len(tokens)
        a["mask"][row] = np.arange(a["mask"].shape[1]) < count
        a["features"][row] = 0.0
        a["features"][row, :count] = features.float().cpu().numpy()
        a["tokens"][row] = a["positions"][row] = -1
        a["tokens"][row, :count] = tokens
        a["positions"][row, :count] = np.arange(position, position + count)
        a["last"][row] = tokens[-1]

    def show(self, live: int) -> Arrays:
        """The observation where the first `live` rows decode; the others are empty."""
        shown = {name: array.copy() for name, array in self._arrays.items()}
        shown["live"][:] = np.arange(len(shown["live"])) < live
        for name in ("features", "mask", "last"):
            shown[name][live:] = 0
        shown["tokens"][live:] = shown["positions"][live:] = -1
        return {name: array.reshape(-1) for name, array in shown.items()} if self._flat else shown


class Reader:
    """Reads actions.

    Args:
        rows, num_steps, vocab_size: B, K and V.
        flat: a vector [B * K] in [0, V], V for none, instead of [B, K] in [-1, V).
    """

    def __init__(self, rows: int, num_steps: int, vocab_size: int, flat: bool) -> None:
        self._shape, self._vocab, self._flat = (rows, num_steps), vocab_size, flat
        if flat:
            tokens = spaces.MultiDiscrete([vocab_size + 1] * (rows * num_steps))
        else:
            tokens = spaces.MultiDiscrete(np.full(self._shape, vocab_size + 1), start=np.full(self._shape, -1))
        self.space: spaces.Space[Any] = tokens

    def read(self, action: Any, live: int) -> Tensor:
        """The drafts of the live requests: [live, s] int64, s the longest.

        Raises:
            ValueError: another shape or dtype, or a token out of range.
        """
        tokens = self._tokens(np.asarray(action))[:live]
        ended = np.logical_or.accumulate(tokens < 0, 1)
        steps = int((~ended).sum(1).max())
        return torch.from_numpy(np.where(ended, -1, tokens)[:, :steps])

    def _tokens(self, tokens: NDArray[Any]) -> Ints:
        """[B, K] int64 with -1 for none."""
        rows, steps = self._shape
        shape = (rows * steps,) if self._flat else self._shape
        if tokens.shape != shape or tokens.dtype.kind not in "iu":
            raise ValueError(f"an action must be integers {list(shape)}, but got {tokens.dtype} {list(tokens.shape)}")
        low, high = (0, self._vocab) if self._flat else (-1, self._vocab - 1)
        if not low <= tokens.min() <= tokens.max() <= high:
            raise ValueError(f"drafted tokens must be in [{low}, {high}], but got {tokens.min()}..{tokens.max()}")
        tokens = tokens.astype(np.int64)
        return np.where(tokens == self._vocab, -1, tokens).reshape(self._shape) if self._flat else tokens
