"""Rounds in the shapes of the live requests, operation by operation."""

from __future__ import annotations

from typing import Any

import torch

from specrl.core.plan import Plan
from specrl.decoding.propose import ExternalDraft, Proposal, Start, propose
from specrl.decoding.sampling import Source, choose
from specrl.decoding.state import SessionState
from specrl.decoding.verify import Verified, accept, outcome
from specrl.models.attention import TokenSlots
from specrl.models.target import Decoded


class EagerRunner:
    """Runs rounds in shapes that follow the plan and the live requests (see `specrl.decoding.session.Runner`).

    Args:
        state: the session's state.
        warm: batch sizes and plans whose kernels are built already; `prepare` adds to them.
        external: propose this instead of the draft's own chain; None: let the draft propose.
    """

    def __init__(
        self, state: SessionState, warm: set[tuple[int, Plan, bool]], external: ExternalDraft | None = None
    ) -> None:
        self._state, self._warm, self._external = state, warm, external

    def prepare(self, plan: Plan) -> None:
        """Run the first round of its kind twice and undo it, so that kernels are built before the timed round."""
        batch, pending = self._state.batch, self._state.pending
        kind = (batch.size, plan, pending is None)
        if kind in self._warm:
            return
        self._warm.add(kind)
        source = torch.Generator(self._state.target.device).manual_seed(0)
        read: Any = None if pending is None else pending.read.copy()
        for _ in range(2):
            proposal = self.propose(plan, source)
            choose(self._decode(plan, proposal).logits, batch.temperatures, source)
            if pending is not None:
                pending.read[:] = read

    def propose(self, plan: Plan, source: Source) -> Proposal:
        """Let the draft catch up and draft, unless the plan is 0."""
        batch, pending = self._state.batch, self._state.pending
        last = batch.on_device(batch.last_tokens())
        if plan.num_steps == 0:
            return Proposal(last[:, None], last.new_full((batch.size, 1), -1))
        if self._external is not None:
            return self._external.proposal(last)
        assert pending is not None
        hidden = pending.catch_up()
        start = Start(hidden, batch.on_device(batch.length - 1), int(batch.length.max()) - 1, last)
        temperatures = batch.temperatures if self._state.config.use_rejection_sampling else None
        return propose(pending.draft, pending.cache, start, plan, temperatures, source)

    def verify(self, plan: Plan, proposal: Proposal, source: Source) -> Verified:
        """Run the target, accept, move the accepted entries of a tree in the cache, and store the hidden states."""
        batch, pending = self._state.batch, self._state.pending
        logits, hidden_states = self._decode(plan, proposal)
        accepted = accept(plan, proposal, logits, batch.temperatures, source)
        if not plan.is_chain:
            moved = accepted.path > torch.arange(plan.num_steps + 1, device=accepted.path.device)
            rows, depths = moved.nonzero(as_tuple=True)
            if len(rows):
                slots = batch.on_device(batch.length - 1)[rows]
                self._state.cache.move(rows, slots + accepted.path[rows, depths], slots + depths)
        host = outcome(proposal, accepted).cpu().numpy()
        if pending is not None:
            assert hidden_states is not None
            pending.append(hidden_states, None if plan.is_chain else accepted.path)
        return Verified.read(host, accepted.path, logits, hidden_states)

    def plain_step(self, source: Source) -> list[int]:
        """Run one step of plain decoding: a token for each live request."""
        batch = self._state.batch
        tokens, slots = batch.on_device(batch.last_tokens())[:, None], batch.on_device(batch.length - 1)[:, None]
        where = TokenSlots(slots, int(batch.length.max()), equal_lengths=batch.equal_lengths())
        logits = self._state.target.decode(tokens, self._state.cache, where).logits
        chosen: list[int] = choose(logits[:, 0], batch.temperatures, source).tolist()
        return chosen

    def _decode(self, plan: Plan, proposal: Proposal) -> Decoded:
        batch = self._state.batch
        length = int(batch.length.max()) - 1 + plan.num_draft_tokens
        equal_lengths = plan.num_steps == 0 and batch.equal_lengths()
        return self._state.decode(proposal, batch.on_device(batch.length - 1), length, equal_lengths=equal_lengths)
