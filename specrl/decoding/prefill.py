"""How requests come in: each is checked, its prompt read by target and draft, and its first token sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specrl.core.interfaces import Request
from specrl.core.round import Completion
from specrl.decoding.batch import Batch, LiveRequest
from specrl.decoding.pending_features import Waiting
from specrl.decoding.sampling import Temperatures, choose
from specrl.decoding.traces import Traces
from specrl.models.kv_cache import KVCache
from specrl.models.target import Target

_MOST_AT_PREFILL = 1000  # requests in a row that may end with their first token


class Admission:
    """Prefills one request after the other.

    Args:
        requests: endless.
        target, cache: the model and its cache.
        batch, waiting: where requests are placed, and features of their prompts wait; None: without a draft.
        traces: that keep prefills; None: nobody does.
        max_context: tokens a request may reach.
        taps: layers whose inputs are features.
        generator: of the first tokens.
    """

    def __init__(
        self,
        requests: Iterator[Request],
        target: Target,
        cache: KVCache,
        batch: Batch,
        waiting: Waiting | None,
        traces: Traces | None,
        *,
        max_context: int,
        taps: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        self._requests, self._target, self._cache = requests, target, cache
        self._batch, self._waiting, self._traces = batch, waiting, traces
        self._max_context, self._taps, self._generator = max_context, taps, generator
        self._eos = frozenset(target.config.eos_token_ids)
        self._served = 0
        self._ended: list[Completion] = []

    def admit(self, row: int) -> LiveRequest:
        """Prefill requests into cache row `row` until one outlives its first token.

        Raises:
            ValueError: a request that cannot be served, or hardly one that outlives its first token.
        """
        for _ in range(_MOST_AT_PREFILL):
            new = LiveRequest(self._served, self._checked(next(self._requests)), self._eos)
            self._served += 1
            if not self._prefill(row, new):
                return new
            self._ended.append(new.completion())
        raise ValueError(
            f"a session needs requests that outlive their first token, but got {_MOST_AT_PREFILL} in a row that ended "
            "with it; raise max_new_tokens above 1, or set ignore_eos"
        )

    def take_ended(self) -> tuple[Completion, ...]:
        """Take the requests that ended with their first token since the last call."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended

    def _checked(self, request: Request) -> Request:
        known, most = len(request.prompt), request.max_new_tokens
        if known + most > self._max_context:
            raise ValueError(
                f"prompt and max_new_tokens must fit max_context={self._max_context}, but got {known} + {most} "
                f"tokens; shorten them or raise max_context"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self._target.config.vocab_size:
            raise ValueError(
                f"prompt tokens must be in [0, {self._target.config.vocab_size}), but got "
                f"{min(request.prompt)}..{max(request.prompt)}; was the text encoded with another tokenizer?"
            )
        return request

    def _prefill(self, row: int, new: LiveRequest) -> bool:
        """Read the prompt, sample the first token; whether the request ends with it."""
        request = new.request
        tokens = torch.tensor([request.prompt], device=self._target.device)  # [1, T]
        wanted = None if self._traces is not None else 1  # logits of a whole prompt take much memory
        decoded = self._target.prefill(tokens, self._cache, first=row, taps=self._taps, last=wanted)
        heat = Temperatures.of([request.temperature], self._target.device)
        token = int(choose(decoded.logits[:, -1], heat, self._generator))
        kept, ends = new.cut([token])
        new.generated.extend(kept)
        self._batch.place(row, [*request.prompt, token])
        if self._waiting is not None:
            assert decoded.features is not None
            self._waiting.read_prompt(row, tokens, decoded.features)
        if self._traces is not None and decoded.features is not None:
            self._traces.keep_prefill(new, tokens, decoded.features, decoded.logits, ends)
        return ends
