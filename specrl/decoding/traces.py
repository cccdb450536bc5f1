"""Traces of rounds and prefills, kept until they are drained."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.decoding.batch import Committed, LiveRequest
from specrl.decoding.propose import Proposal
from specrl.decoding.state import SessionState
from specrl.decoding.verify import Verified


class Traces:
    """Traces of a session, in order. A session without aux layers has none.

    Args:
        state: the session's.
        copy: copy tensors, because the next round overwrites them.
    """

    def __init__(self, state: SessionState, *, copy: bool) -> None:
        self._state, self._copy, self._kept = state, copy, list[Trace]()

    def drain(self) -> list[Trace]:
        """Take the traces kept so far."""
        kept, self._kept = self._kept, []
        return kept

    def add_round(self, plan: Plan, proposal: Proposal, verified: Verified, committed: Committed) -> None:
        """Add a round that is committed; its finished requests are not replaced yet."""
        if verified.hidden_states is None:
            return
        tensors = (proposal.tokens, verified.hidden_states, verified.logits, proposal.parents, verified.path)
        if self._copy:
            tensors = tuple(tensor.clone() for tensor in tensors)  # type: ignore[assignment]
        tokens, features, logits, parents, path = tensors
        live = self._state.batch.live
        self._kept.append(
            Trace(
                request_ids=committed.request_ids,
                positions=committed.context_lengths - 1,
                tokens=tokens,
                features=features,
                logits=logits,
                parents=parents,
                path=path,
                draft_version=self._version(),
                plan=plan,
                temperatures=tuple(one.request.temperature for one in live),
                finished=tuple(live[row].id for row in committed.ended),
            )
        )

    def add_prefill(
        self, one: LiveRequest, tokens: Tensor, hidden_states: Tensor | None, logits: Tensor, ended: bool
    ) -> None:
        """Add the prefill of a prompt `tokens [1, T]`; `ended`: the request ended with its first token."""
        if hidden_states is None:
            return
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self._kept.append(
            Trace(
                request_ids=np.array([one.id]),
                positions=np.zeros(1, dtype=np.int64),
                tokens=tokens,
                features=hidden_states,
                logits=logits,
                parents=rows - 1,
                path=rows,
                draft_version=self._version(),
                temperatures=(one.request.temperature,),
                finished=(one.id,) if ended else (),
            )
        )

    def _version(self) -> int:
        return 0 if self._state.pending is None else self._state.pending.draft.version
