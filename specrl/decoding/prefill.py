"""Prefill: each new request is checked, the target and the draft read its prompt, and its first token is sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specrl.core.interfaces import Request
from specrl.core.round import Completion
from specrl.decoding.batch import LiveRequest
from specrl.decoding.sampling import Source, Temperatures, choose
from specrl.decoding.state import SessionState, Traces

_MAX_ENDED_AT_PREFILL = 1000  # requests in a row that end with their first token


class Prefiller:
    """Fills rows with requests from an endless stream; adds prefills to `traces` unless they are None."""

    def __init__(self, requests: Iterator[Request], state: SessionState, traces: Traces | None) -> None:
        self._requests, self._state, self._traces = requests, state, traces
        self._eos = frozenset(state.target.config.eos_token_ids)
        self._served = 0
        self._ended: list[Completion] = []  # with their first token, since the last refill

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
        raise ValueError(
            f"a session needs requests that outlive their first token, but got {_MAX_ENDED_AT_PREFILL} in a row that "
            "ended with it; raise max_new_tokens above 1, or set ignore_eos"
        )

    def refill(self, rows: list[int], source: Source) -> tuple[Completion, ...]:
        """Replace the finished requests in `rows` by new ones; returns all that finished since the last call."""
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
        prompt, most = request.prompt, request.max_new_tokens
        max_context, vocab_size = self._state.config.max_context, self._state.target.config.vocab_size
        if len(prompt) + most > max_context:
            raise ValueError(
                f"prompt and max_new_tokens must fit max_context={max_context}, but got {len(prompt)} + {most} tokens; "
                f"shorten them or raise max_context"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"prompt tokens must be in [0, {vocab_size}), but got {min(prompt)}..{max(prompt)}; was the text "
                "encoded with another tokenizer?"
            )

    def _prefill(self, row: int, new: LiveRequest, source: Source) -> bool:
        """Read the prompt and sample the first token; returns whether the request ends with it."""
        state, device = self._state, self._state.target.device
        tokens = torch.tensor([new.request.prompt], device=device)  # [1, T]
        last = 1 if self._traces is None else None  # logits of a whole prompt take much memory
        logits, hidden_states = state.target.prefill(
            tokens, state.cache, first_row=row, aux_layers=state.config.aux_layers, last=last
        )
        token = int(choose(logits[:, -1], Temperatures.of([new.request.temperature], device), source))
        new.generated, ends = new.cut([token])
        if state.pending is not None:
            assert hidden_states is not None
            state.pending.read_prompt(row, tokens, hidden_states)
        if self._traces is not None:
            self._traces.add_prefill(new, tokens, hidden_states, logits, ends)
        return ends
