"""Rounds in the shapes of the live requests, operation by operation."""

from __future__ import annotations

import torch

from specrl.core.plan import Plan
from specrl.decoding.propose import ExternalDraft, Proposal, Start, propose
from specrl.decoding.sampling import Source, choose
from specrl.decoding.state import SessionState
from specrl.decoding.verify import Verified, accept, decode_proposal, outcome
from specrl.models.target import Decoded


class EagerRunner:
    """Runs rounds in shapes that follow the plan and the live requests.

    Args:
        warm: batch sizes and plans whose kernels are built already; updated.
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
        read = None if pending is None else pending.read.copy()
        for _ in range(2):
            proposal = self.propose(plan, source)
            choose(self._decode(plan, proposal).logits, batch.temperatures, source)
            if pending is not None and read is not None:
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
        """Run the target over the proposal and accept; move the accepted entries of a tree in the cache."""
        batch = self._state.batch
        decoded = self._decode(plan, proposal)
        accepted = accept(plan, proposal, decoded.logits, batch.temperatures, source)
        if not plan.is_chain:
            moved = accepted.path > torch.arange(plan.num_steps + 1, device=accepted.path.device)
            rows, depths = moved.nonzero(as_tuple=True)
            if len(rows):
                slots = batch.on_device(batch.length - 1)[rows]
                self._state.cache.move(rows, slots + accepted.path[rows, depths], slots + depths)
        found = outcome(proposal, accepted).cpu().numpy()
        return Verified.read(found, accepted.path, decoded.logits, decoded.aux_hidden_states)

    def keep(self, plan: Plan, verified: Verified) -> None:
        """Store the hidden states of the verified tokens for the draft."""
        if self._state.pending is not None:
            assert verified.hidden_states is not None
            self._state.pending.append(verified.hidden_states, None if plan.is_chain else verified.path)

    def plain_step(self, source: Source) -> list[int]:
        """One step of plain decoding: a token for each live request."""
        batch, cache = self._state.batch, self._state.cache
        tokens, slots = batch.on_device(batch.last_tokens())[:, None], batch.on_device(batch.length - 1)[:, None]
        length, equal = int(batch.length.max()), batch.equal_lengths()
        logits = self._state.target.decode(tokens, cache, slots, length=length, equal_lengths=equal).logits
        chosen: list[int] = choose(logits[:, 0], batch.temperatures, source).tolist()
        return chosen

    def _decode(self, plan: Plan, proposal: Proposal) -> Decoded:
        state, batch = self._state, self._state.batch
        return decode_proposal(
            state.target,
            state.cache,
            proposal,
            batch.on_device(batch.length - 1),
            int(batch.length.max()) - 1 + plan.num_draft_tokens,
            aux_layers=state.config.aux_layers,
            equal_lengths=plan.num_steps == 0 and batch.equal_lengths(),
        )
