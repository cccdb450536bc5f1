"""Prefill of new requests: the target and the draft read the prompt, and the first token is sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specrl.core.checks import require
from specrl.core.interfaces import Request
from specrl.core.round import Completion, Trace
from specrl.decoding.batch import LiveRequest
from specrl.decoding.sampling import Source, Temperatures, choose
from specrl.decoding.state import SessionState, prefill_trace

_MAX_ENDED_AT_PREFILL = 1000  # requests in a row that end with their first token


class Prefiller:
    """Fills rows with requests from an endless stream; adds prefills to `traces` unless they are None."""

    def __init__(self, requests: Iterator[Request], state: SessionState, traces: list[Trace] | None) -> None:
        self._requests, self._state, self._traces = requests, state, traces
        self._eos = frozenset(state.target.config.eos_token_ids)
        self._served = 0
        self._ended: list[Completion] = []  # ended with their first token since the last refill

    def admit(self, row: int, source: Source) -> None:
        """Prefill requests into `row` until one does not end with its first token; that one keeps the row.

        Raises:
            ValueError: a request cannot be served, or too many in a row end with their first token.
        """
        for _ in range(_MAX_ENDED_AT_PREFILL):
            new = LiveRequest(self._served, next(self._requests), self._eos)
            self._check(new.request)
            self._served += 1
            if not self._prefill(row, new, source):
                return self._state.batch.place(row, new)
            self._ended.append(new.completion())
        rule = f"requests must not all end with their first token, but {_MAX_ENDED_AT_PREFILL} in a row did"
        raise ValueError(f"{rule}; raise max_new_tokens above 1, or set ignore_eos")

    def refill(self, rows: list[int], source: Source) -> tuple[Completion, ...]:
        """Replace the finished requests in `rows` by new ones; returns all finished requests since the last call."""
        batch = self._state.batch
        finished = [batch.live[row].completion() for row in rows]
        for row in rows:
            self.admit(row, source)
        if rows:
            batch.resize(batch.size)
        finished += self._ended
        self._ended.clear()
        return tuple(finished)

    def _check(self, request: Request) -> None:
        prompt, max_context = request.prompt, self._state.config.max_context
        size, vocab_size = len(prompt) + request.max_new_tokens, self._state.target.config.vocab_size
        require(size <= max_context, "prompt and max_new_tokens", f"at most max_context={max_context} tokens", size)
        ids = (min(prompt), max(prompt))
        require(0 <= ids[0] <= ids[1] < vocab_size, "prompt", f"of the target's tokens, in [0, {vocab_size})", ids)

    def _prefill(self, row: int, new: LiveRequest, source: Source) -> bool:
        """Read the prompt and sample the first token; returns whether the request ends with it."""
        state, device = self._state, self._state.target.device
        tokens = torch.tensor([new.request.prompt], device=device)  # [1, T]
        last = 1 if self._traces is None else None  # logits of a whole prompt take much memory
        aux_layers = state.config.aux_layers
        decoded = state.target.prefill(tokens, state.cache, first_row=row, aux_layers=aux_layers, last=last)
        token = int(choose(decoded.logits[:, -1], Temperatures.of([new.request.temperature], device), source))
        new.generated, ends = new.cut([token])
        if state.pending is not None:
            assert decoded.aux_hidden_states is not None
            state.pending.read_prompt(row, tokens, decoded.aux_hidden_states)
        if self._traces is not None:
            self._traces.append(prefill_trace(state, new, tokens, decoded, ends))
        return ends
