"""Rounds as functions of fixed shapes, which can be captured as CUDA graphs (docs/decisions/0009-gpu.md).

The draft catches up, it drafts, the target verifies: these functions read and write static memory and never wait for
the device. Their shapes depend on the plan and on three buckets: live requests, slots to attend to, and tokens to catch
up on. Batches are padded to their bucket; padding rows use cache slots and buffer rows that no request reaches. A round
copies once to the device and once back (see `specrl.decoding.device_link`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.device_link import DeviceLink, Rows
from specrl.decoding.pending_features import along_path
from specrl.decoding.propose import MAX_DRAFT_TOKENS, Proposal, Start, propose
from specrl.decoding.sampling import Drawn, Source, Temperatures, choose, fill_uniform
from specrl.decoding.state import SessionState
from specrl.decoding.verify import Verified, accept, outcome
from specrl.models.attention import TokenSlots

_MIN_CONTEXT = 256  # smallest bucket of slots; the next ones double
_MIN_WIDTH = 4  # smallest bucket of tokens to catch up on; the next ones double
MAX_CAPTURED_WIDTH = 64  # wider passes take so long that launching their kernels costs nothing


class Shape(NamedTuple):
    """All that the shapes and kernels of a round depend on."""

    plan: Plan
    batch_size: int  # padding included
    context: int  # slots to attend to
    width: int  # tokens to catch up on
    all_greedy: bool
    any_greedy: bool


class FixedShapeRunner:
    """Runs rounds in functions of fixed shapes (see `specrl.decoding.session.Runner`)."""

    def __init__(self, state: SessionState, graphs: Graphs) -> None:
        self._state, self._graphs = state, graphs
        rows, target, pending = state.batch.max_batch_size, state.target, state.pending
        device = target.device
        self._room = 0 if pending is None else pending.room
        self._padding_slot = state.config.max_context + MAX_DRAFT_TOKENS
        self._last_slot = state.cache.capacity - 1
        self._link = DeviceLink(rows, self._room, device, pinned=graphs.captures)
        self._arange = torch.arange(max(self._last_slot + 1, rows), device=device)
        self._uniform = torch.zeros(rows, 2 * MAX_DRAFT_TOKENS + 1, device=device)
        self._tokens = torch.zeros(rows, MAX_DRAFT_TOKENS, dtype=torch.int64, device=device)
        self._parents = torch.zeros_like(self._tokens)
        self._no_parents = torch.full((rows, 1), -1, dtype=torch.int64, device=device)
        self._mask = torch.zeros(rows, MAX_DRAFT_TOKENS, MAX_DRAFT_TOKENS, dtype=torch.bool, device=device)
        self._hidden = torch.zeros(rows, target.config.hidden_size, dtype=target.dtype, device=device)
        self._distributions: dict[int, Tensor] = {}  # by steps [max_batch_size, s, V] float32
        self.functions: dict[str, Callable[[Shape], Any]] = {"catch_up": self._catch_up, "draft": self._draft}
        self.functions |= {"verify": self._verify, "plain": self._plain}

    def prepare(self, plan: Plan) -> None:
        """Capture the functions of a round of `plan` that are not captured yet; leaves everything else as it is."""
        shape, pending = self._shape(plan), self._state.pending
        names = ["catch_up", "draft", "verify"] if plan.num_steps else ["verify"]
        if all(self._key(name, shape) in self._graphs for name in names):
            return
        self._send(shape)
        buffer = torch.empty(0) if pending is None else pending.buffer[: shape.batch_size, :MAX_DRAFT_TOKENS]
        before = buffer.clone()  # verifying stores where catching up has read
        for name in names:
            if name == "catch_up" and shape.width > MAX_CAPTURED_WIDTH:
                self._catch_up(shape)
            else:
                self._graphs.capture(self._key(name, shape), partial(self.functions[name], shape))
        buffer.copy_(before)

    def propose(self, plan: Plan, source: Source) -> Proposal:
        """Let the draft catch up and draft, unless the plan is 0. The next call overwrites the result."""
        pending = self._state.pending
        if plan.num_steps == 0 and pending is not None:
            pending.make_room(1)
        shape = self._shape(plan)
        self._send(shape)
        self._draw(shape, source)
        if plan.num_steps:
            assert pending is not None
            self._run("catch_up", shape)
            pending.read += pending.counts()
            self._run("draft", shape)
        return self._proposal(shape, self._state.batch.size)

    def verify(self, plan: Plan, proposal: Proposal, source: Source) -> Verified:
        """Verify the proposal made last, and store its hidden states for the draft."""
        live = self._state.batch.size
        result, path, logits, hidden = self._run("verify", self._shape(plan))
        hidden = None if hidden is None else hidden[:live]
        return Verified.read(self._link.fetch(result)[:live], path[:live], logits[:live], hidden)

    def plain_step(self, source: Source) -> list[int]:
        """Run one step of plain decoding: a token for each live request."""
        shape = self._shape(Plan(0))
        self._send(shape)
        self._draw(shape, source)
        self._graphs.capture(self._key("plain", shape), partial(self._plain, shape))
        chosen: list[int] = self._link.fetch(self._run("plain", shape))[: self._state.batch.size].tolist()
        return chosen

    def _shape(self, plan: Plan) -> Shape:
        batch, pending = self._state.batch, self._state.pending
        size = min(_doubled(1, batch.size), batch.max_batch_size)
        reach = int(batch.length.max()) - 1 + max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk)
        context = min(_doubled(_MIN_CONTEXT, reach), self._padding_slot)
        width = 0
        if plan.num_steps and pending is not None:
            width = min(_doubled(_MIN_WIDTH, int(pending.counts().max())), self._room)
        return Shape(plan, size, context, width, batch.temperatures.all_greedy, batch.temperatures.any_greedy)

    def _key(self, name: str, shape: Shape) -> Hashable:
        if name == "catch_up":
            return name, shape.batch_size, shape.context, shape.width
        return name, shape._replace(width=0)

    def _run(self, name: str, shape: Shape) -> Any:
        return self._graphs.run(self._key(name, shape), partial(self.functions[name], shape))

    def _send(self, shape: Shape) -> None:
        """Copy the numbers of the requests, and the tokens to catch up on, to the device."""
        batch, pending = self._state.batch, self._state.pending
        slot = batch.length - 1
        read = slot - 1 if pending is None else pending.read
        unread = slot - read
        free = np.zeros_like(slot) if shape.plan.num_steps else unread
        live = Rows(slot, read, unread - 1, batch.last_tokens(), free)
        padding = Rows(self._padding_slot, self._padding_slot, 0, 0, self._room)
        columns = np.minimum(read[:, None] + np.arange(1, shape.width + 1), batch.tokens.shape[1] - 1)
        self._link.send(live, padding, shape.batch_size, np.take_along_axis(batch.tokens, columns, 1))

    def _draw(self, shape: Shape, source: Source) -> None:
        """Draw the uniform numbers of this round, which the graphs read."""
        if not shape.all_greedy:
            count = 2 * shape.plan.num_steps + 1 if self._sampled(shape) else shape.plan.num_draft_tokens
            fill_uniform(self._uniform[: shape.batch_size, :count], source)

    def _sampled(self, shape: Shape) -> bool:
        """Whether drafts are sampled from the draft, for rejection sampling."""
        plan = shape.plan
        rejection = self._state.config.use_rejection_sampling
        return rejection and plan.is_chain and plan.num_steps > 0 and not shape.all_greedy

    def _proposal(self, shape: Shape, rows: int) -> Proposal:
        """Return the proposal for the first `rows` requests: views of static memory."""
        plan, count = shape.plan, shape.plan.num_draft_tokens
        if plan.num_steps == 0:
            return Proposal(self._link.rows(shape.batch_size).last_token[:rows, None], self._no_parents[:rows])
        mask = None if plan.is_chain else self._mask[:rows, :count, :count]
        q = self._distributions[plan.num_steps][:rows] if self._sampled(shape) else None
        return Proposal(self._tokens[:rows, :count], self._parents[:rows, :count], mask, q)

    def _temperatures(self, shape: Shape) -> Temperatures:
        values = self._state.batch.padded_temperatures[: shape.batch_size]
        return Temperatures(values, shape.all_greedy, shape.any_greedy)

    # The functions below can be captured: they run on the device only, do not wait, and their shapes follow `Shape`.

    def _catch_up(self, shape: Shape) -> None:
        """Let the draft read the pending hidden states, and store its state after the last one."""
        pending, size, width = self._state.pending, shape.batch_size, shape.width
        assert pending is not None
        rows, draft = self._link.rows(size), pending.draft
        slots = (rows.read[:, None] + self._arange[:width]).clamp_(max=self._last_slot)
        fused = draft.fuse(pending.buffer[:size, :width])
        where = TokenSlots(slots, shape.context)
        hidden = draft.decode(self._link.catch_up(size, width), fused, pending.cache, where)
        last = rows.newest[:, None, None].expand(size, 1, hidden.shape[-1])
        self._hidden[:size].copy_(hidden.gather(1, last)[:, 0])

    def _draft(self, shape: Shape) -> None:
        """Draft a chain or a tree into static memory."""
        pending, plan, size, count = self._state.pending, shape.plan, shape.batch_size, shape.plan.num_draft_tokens
        assert pending is not None
        rows, numbers = self._link.rows(size), Drawn(self._uniform[:size])
        start = Start(self._hidden[:size], rows.slot, shape.context, rows.last_token, fixed_shapes=True)
        temperatures = self._temperatures(shape) if self._state.config.use_rejection_sampling else None
        proposal = propose(pending.draft, pending.cache, start, plan, temperatures, numbers)
        self._tokens[:size, :count].copy_(proposal.tokens)
        self._parents[:size, :count].copy_(proposal.parents)
        if proposal.attention_mask is not None:
            self._mask[:size, :count, :count].copy_(proposal.attention_mask)
        if (q := proposal.distributions) is not None:
            if plan.num_steps not in self._distributions:
                self._distributions[plan.num_steps] = torch.zeros(len(self._tokens), *q.shape[1:], device=q.device)
            self._distributions[plan.num_steps][:size].copy_(q)

    def _verify(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Verify and accept; move accepted entries of a tree in the cache, and store hidden states for the draft.

        Returns:
            outcome [B, s + 2], path [B, s + 1], logits [B, n, V] and hidden states [B, n, 3H].
        """
        state, plan, size = self._state, shape.plan, shape.batch_size
        rows, proposal = self._link.rows(size), self._proposal(shape, size)
        logits, hidden = state.decode(proposal, rows.slot, shape.context, fixed_shapes=True)
        numbers = Drawn(self._uniform[:size, plan.num_steps if self._sampled(shape) else 0 :])
        accepted = accept(plan, proposal, logits, self._temperatures(shape), numbers)
        if not plan.is_chain:
            self._compact(rows.slot, accepted.path)
        if state.pending is not None and hidden is not None:
            stored = hidden if plan.is_chain else along_path(hidden, accepted.path)
            buffer = state.pending.buffer
            index = self._arange[:size, None] * buffer.shape[1] + rows.free[:, None] + self._arange[: stored.shape[1]]
            buffer.view(-1, stored.shape[-1]).index_put_((index,), stored)
        return outcome(proposal, accepted), accepted.path, logits, hidden

    def _compact(self, slot: Tensor, path: Tensor) -> None:
        """Move the cache entries of accepted rows to the slots of a chain."""
        size, rows = path.shape
        to = self._arange[1:rows].expand(size, rows - 1)
        requests = self._arange[:size, None].expand(size, rows - 1)
        sources = torch.where(path[:, 1:] >= 0, path[:, 1:], to)
        self._state.cache.move(requests.flatten(), (slot[:, None] + sources).flatten(), (slot[:, None] + to).flatten())

    def _plain(self, shape: Shape) -> Tensor:
        """Run one step of plain decoding: [B] int64."""
        rows = self._link.rows(shape.batch_size)
        where = TokenSlots(rows.slot[:, None], shape.context)
        decoded = self._state.target.decode(rows.last_token[:, None], self._state.cache, where)
        return choose(decoded.logits[:, 0], self._temperatures(shape), Drawn(self._uniform[: shape.batch_size]))


def _doubled(smallest: int, needed: int) -> int:
    """Return the first of smallest, 2 * smallest, 4 * smallest, .. that is at least `needed`."""
    while smallest < needed:
        smallest *= 2
    return smallest
