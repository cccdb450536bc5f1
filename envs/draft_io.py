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


class ObservationWindow:
    """The tokens that each request committed since the agent last saw it, and the features before them.

    Args:
        rows: B, the largest number of live requests.
        num_steps: K, the longest draft.
        feature_size: 3H.
        vocab_size: V.
        max_context: largest number of tokens of a request.
        flat: show every array as a vector.
    """

    def __init__(
        self, rows: int, num_steps: int, feature_size: int, vocab_size: int, max_context: int, flat: bool
    ) -> None:
        shape = (rows, num_steps + 1)
        boxes: dict[str, spaces.Box] = {
            "features": spaces.Box(-_LARGEST, _LARGEST, (*shape, feature_size), dtype=np.float32),
            "tokens": spaces.Box(-1, vocab_size - 1, shape, dtype=np.int64),
            "positions": spaces.Box(-1, max_context, shape, dtype=np.int64),
            "mask": spaces.Box(0, 1, shape, dtype=np.int8),
            "last": spaces.Box(0, vocab_size - 1, (rows,), dtype=np.int64),
            "live": spaces.Box(0, 1, (rows,), dtype=np.int8),
        }
        self._flat = flat
        self._arrays: Arrays = {name: np.zeros(box.shape, dtype=box.dtype) for name, box in boxes.items()}
        self.space = spaces.Dict({name: flatten_space(box) if flat else box for name, box in boxes.items()})

    def clear(self) -> None:
        """Forget all tokens."""
        for name, array in self._arrays.items():
            array[:] = -1 if name in ("tokens", "positions") else 0

    def read(self, session: ProposalSession, traces: Iterable[Trace]) -> tuple[Prefill, ...]:
        """Read the traces since the last call; returns the new requests."""
        ids, last = list(session.request_ids), list(session.last_tokens)
        prefills = []
        for trace in traces:
            if trace.plan is not None:
                for row, request in enumerate(trace.request_ids[: len(ids)].tolist()):
                    if ids[row] == request:  # otherwise it has ended
                        count = int((trace.path[row] >= 0).sum())
                        tokens = [*trace.tokens[row, 1:count].tolist(), last[row]]
                        self._put(row, trace.features[row, :count], tokens, int(trace.positions[row]) + 1)
            elif (request := int(trace.request_ids[0])) in ids:  # otherwise it ended with its first token
                row, features = ids.index(request), trace.features[0].float()
                self._put(row, features[-1:], [last[row]], trace.tokens.shape[1])
                prompt = trace.tokens[0].cpu().numpy()
                prefills.append(Prefill(request, row, prompt, features.cpu().numpy()))
        return tuple(prefills)

    def _put(self, row: int, features: Tensor, tokens: list[int], position: int) -> None:
        a, count = self._arrays, len(tokens)
        a["mask"][row] = np.arange(a["mask"].shape[1]) < count
        a["features"][row] = 0.0
        a["features"][row, :count] = features.float().cpu().numpy()
        a["tokens"][row] = a["positions"][row] = -1
        a["tokens"][row, :count] = tokens
        a["positions"][row, :count] = np.arange(position, position + count)
        a["last"][row] = tokens[-1]

    def observation(self, live: int) -> Arrays:
        """The observation with `live` requests in the first rows; the other rows are empty."""
        shown = {name: array.copy() for name, array in self._arrays.items()}
        shown["live"][:] = np.arange(len(shown["live"])) < live
        for name in ("features", "mask", "last"):
            shown[name][live:] = 0
        shown["tokens"][live:] = shown["positions"][live:] = -1
        return {name: array.reshape(-1) for name, array in shown.items()} if self._flat else shown


class ActionDecoder:
    """Turns actions into drafts.

    Args:
        rows, num_steps, vocab_size: B, K and V.
        flat: actions are vectors [B * K] in [0, V], where V means no draft, instead of [B, K] in [-1, V).
    """

    def __init__(self, rows: int, num_steps: int, vocab_size: int, flat: bool) -> None:
        self._shape, self._vocab, self._flat = (rows, num_steps), vocab_size, flat
        self._lowest = 0 if flat else -1
        shape = (rows * num_steps,) if flat else self._shape
        self.space = spaces.MultiDiscrete(np.full(shape, vocab_size + 1), start=np.full(shape, self._lowest))

    def read(self, action: Any, live: int) -> Tensor:
        """The drafts of the live requests: [live, s] int64, s the length of the longest draft.

        Raises:
            ValueError: another shape or dtype, or a token out of range.
        """
        tokens, lowest, highest = np.asarray(action), self._lowest, self._lowest + self._vocab
        shape = self.space.shape
        if tokens.shape != shape or tokens.dtype.kind not in "iu":
            raise ValueError(f"an action must be integers {list(shape)}, but got {tokens.dtype} {list(tokens.shape)}")
        if not lowest <= tokens.min() <= tokens.max() <= highest:
            raise ValueError(f"drafted tokens must be in [{lowest}, {highest}], but got {tokens.min()}..{tokens.max()}")
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
        """Begin an episode; `seed` is of the samples."""
        self._generator.manual_seed(seed)
        self.clear()

    def draw(self, q: Any, live: int) -> Ints:
        """Draw one more draft for each of the `live` requests (see `DraftTokensEnv.draw`)."""
        probabilities = torch.as_tensor(q)
        if probabilities.shape != (live, self._vocab) or probabilities.dtype != torch.float32:
            given = f"{str(probabilities.dtype).removeprefix('torch.')} {list(probabilities.shape)}"
            raise ValueError(f"q must be float32 [{live}, {self._vocab}], a row for each live request, but got {given}")
        if len(self._tokens) == self._num_steps:
            raise ValueError(f"a draft must have at most num_steps={self._num_steps} tokens, but one more was drawn")
        sums = probabilities.sum(1)
        if not (probabilities >= 0).all() or not (((sums - 1.0).abs() < 1e-3) | (sums == 0.0)).all():
            found = f"values from {probabilities.min():g} and sums from {sums.min():g} to {sums.max():g}"
            raise ValueError(
                f"a row of q must be finite, at least 0 and sum to 1 (to 0 to end a draft), but got {found}"
            )
        ended = sums == 0.0
        if self._tokens:
            ended |= self._tokens[-1] < 0
        noise = torch.empty_like(probabilities).exponential_(generator=self._generator).clamp_(min=1e-30)
        tokens = torch.where(ended, -1, (probabilities / noise).argmax(1))  # the argmax is a sample (exponential race)
        self._tokens.append(tokens)
        self._q.append(probabilities.clone())
        return tokens.numpy().copy()

    def distributions(self, drafted: Tensor) -> Tensor | None:
        """The distributions [live, s, V] float32 that these drafts [live, s] int64 were drawn from; None: no draws.

        Raises:
            ValueError: other drafts than those drawn.
        """
        if not self._tokens:
            return None
        drawn = torch.stack(self._tokens, 1)
        steps = int((drawn >= 0).sum(1).max())
        if not torch.equal(drawn[:, :steps], drafted):
            raise ValueError(
                f"the action must be the drafts that were drawn, {drawn[:, :steps].tolist()}, but got "
                f"{drafted.tolist()}; give draw() a row of zeros to end a draft early"
            )
        return torch.stack(self._q, 1)[:, :steps]

    def clear(self) -> None:
        """Forget the drafts, after the round."""
        self._tokens.clear()
        self._q.clear()
