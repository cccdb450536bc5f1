"""A round as three functions of fixed shapes, each of which can be a CUDA graph (docs/decisions/0009-gpu.md).

Catch up, draft, verify: they read and write memory that never moves, and wait for nothing. Their shapes depend on the
plan and on three buckets alone: live requests, slots looked at, tokens that the draft catches up with. Requests that
fill up a bucket are phantoms: they live in slots, and in rows of waiting features, that no request ever sees.
A round copies once to the device, what is known of each request, and once from it, what each request commits.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Ints
from specrl.decoding.batch import Known
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.propose import MOST_NODES, Proposal, Start, propose_chain, propose_tree, tree_mask
from specrl.decoding.sampling import Drawn, Temperatures, choose
from specrl.decoding.verify import accept_chain, reject_chain, walk_tree
from specrl.models.draft import ServingDraft
from specrl.models.kv_cache import KVCache
from specrl.models.target import Target

_LEAST_CONTEXT = 256  # slots; buckets double from here
_LEAST_WIDTH = 4  # tokens that the draft catches up with, likewise
_WIDEST = 64  # that is captured; what is wider has work enough to hide its launches
_KNOWN = 5  # numbers known of each request


class Shape(NamedTuple):
    """What the shapes and the kernels of a round depend on."""

    plan: Plan
    batch: int  # requests, phantoms included
    context: int  # slots looked at
    width: int  # tokens that the draft catches up with
    all_greedy: bool
    any_greedy: bool


class Verified(NamedTuple):
    """What verification leaves on the device, until the next round."""

    outcome: Tensor  # [B, s + 2] int64: correct drafts, then the committed tokens, of which correct + 1 count
    path: Tensor  # [B, s + 1] int64, accepted rows, -1 after them
    logits: Tensor  # [B, n, V] float32
    features: Tensor | None  # [B, n, 3H]


class StaticRounds:
    """Rounds over these caches in functions of fixed shapes.

    Args:
        target, draft: the models; without a draft only plan 0.
        cache, draft_cache: theirs, for all requests, with `capacity(max_context)` slots.
        pending: [most, room + MOST_NODES, 3H], features that wait for the draft; the last rows are for phantoms.
        max_context: tokens a request may reach.
        taps, rejection: as the session's.
        graphs: that run the functions.
    """

    def __init__(
        self,
        target: Target,
        draft: ServingDraft | None,
        cache: KVCache,
        draft_cache: KVCache | None,
        pending: Tensor | None,
        *,
        max_context: int,
        taps: tuple[int, ...],
        rejection: bool,
        graphs: Graphs,
    ) -> None:
        self._target, self._draft, self._cache, self._draft_cache = target, draft, cache, draft_cache
        self._pending, self._taps, self._rejection, self.graphs = pending, taps, rejection, graphs
        self._most, device = cache.batch, target.device
        self._room = 0 if pending is None else pending.shape[1] - MOST_NODES
        self._phantom = max_context + MOST_NODES  # a slot that no request reaches
        self._last_slot = self._phantom + MOST_NODES - 1
        vocab, hidden = target.config.vocab_size, target.config.hidden_size
        pinned = graphs.captures
        entries = self._most * (_KNOWN + max(self._room, 1))
        self._host = torch.zeros(entries, dtype=torch.int64, pin_memory=pinned)
        self._control = torch.zeros(entries, dtype=torch.int64, device=device)
        self._back = torch.zeros(self._most * (MOST_NODES + 2), dtype=torch.int64, pin_memory=pinned)
        self._arrived: Any = torch.cuda.Event() if graphs.captures else None
        self._arange = torch.arange(max(self._last_slot + 1, self._most), device=device)
        self._uniform = torch.zeros(self._most, 2 * MOST_NODES + 1, device=device)
        self._heats = torch.ones(self._most, device=device)
        self._tokens = torch.zeros(self._most, MOST_NODES, dtype=torch.int64, device=device)
        self._none = torch.full((self._most, 1), -1, dtype=torch.int64, device=device)
        self._parents = torch.zeros_like(self._tokens)
        self._depths = torch.zeros_like(self._tokens)
        self._seen = torch.zeros(self._most, MOST_NODES, MOST_NODES, dtype=torch.bool, device=device)
        self._hidden = torch.zeros(self._most, hidden, dtype=target.dtype, device=device)
        self._q: dict[int, Tensor] = {}  # by steps [most, s, V] float32
        self._vocab = vocab

    @staticmethod
    def capacity(max_context: int) -> int:
        """Slots a cache needs: every request's and its drafts', then the phantoms'."""
        return max_context + 2 * MOST_NODES

    def heat(self, temperatures: Temperatures) -> None:
        """Note the live requests' temperatures; phantoms have 1."""
        self._heats.fill_(1.0)
        self._heats[: len(temperatures.values)].copy_(temperatures.values)

    def prepare(self, plan: Plan, known: Known, plain: bool = False) -> None:
        """Capture what a round of `plan` needs and has not got, before it is timed; it leaves nothing behind."""
        shape = self._shape(plan, known)
        if plain:
            if self._key("plain", shape) not in self.graphs:
                self._send(shape, known)
            self.graphs.capture(self._key("plain", shape), lambda: self._plain(shape))
            return
        wanted = ["verify"] if plan.num_steps == 0 else ["catch_up", "draft_tokens", "verify"]
        if all(self._key(name, shape) in self.graphs for name in wanted):
            return
        self._send(shape, known)
        waiting = None if self._pending is None else self._pending[: shape.batch, :MOST_NODES]
        kept = None if waiting is None else waiting.clone()  # verifying stores where catching up has read
        for name in wanted:
            function = partial(getattr(self, f"_{name}"), shape)
            if name == "catch_up" and shape.width > _WIDEST:
                function()
            else:
                self.graphs.capture(self._key(name, shape), function)
        if waiting is not None and kept is not None:
            waiting.copy_(kept)

    def propose(self, plan: Plan, known: Known, generator: torch.Generator) -> Proposal:
        """Send what is known, catch up and draft. What it returns is overwritten by the next proposal."""
        shape, live = self._shape(plan, known), len(known.length)
        self._send(shape, known)
        self._fill(shape, generator)
        n = plan.num_draft_tokens
        if plan.num_steps == 0:
            return Proposal(self._header(shape.batch)[3][:live, None], self._none[:live], None, None, None)
        if shape.width > _WIDEST:
            self._catch_up(shape)
        else:
            self.graphs.run(self._key("catch_up", shape), lambda: self._catch_up(shape))
        self.graphs.run(self._key("draft_tokens", shape), lambda: self._draft_tokens(shape))
        return Proposal(self._tokens[:live, :n], self._parents[:live, :n], None, None, None)

    def verify(self, plan: Plan, known: Known) -> tuple[Ints, list[list[int]], Verified]:
        """Verify what was proposed: correct drafts [B], committed tokens, and what lies on the device."""
        shape, live = self._shape(plan, known), len(known.length)
        verified = self.graphs.run(self._key("verify", shape), lambda: self._verify(shape))
        outcome = self._fetch(verified.outcome)[:live]
        correct = outcome[:, 0].copy()
        return correct, [row[1 : 2 + row[0]] for row in outcome.tolist()], verified

    def plain(self, known: Known, generator: torch.Generator) -> Ints:
        """One step of plain decoding: a token of each live request [B]."""
        shape, live = self._shape(Plan(0), known), len(known.length)
        self._send(shape, known)
        self._fill(shape, generator)
        chosen = self.graphs.run(self._key("plain", shape), lambda: self._plain(shape))
        return self._fetch(chosen)[:live, 0]

    def _shape(self, plan: Plan, known: Known) -> Shape:
        live, heat = len(known.length), known.temperatures
        batch = min(_doubled(1, live), self._most)
        reach = int(known.length.max()) - 1 + max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk)
        context = min(_doubled(_LEAST_CONTEXT, reach), self._phantom)
        waiting = int((known.length - 1 - known.read).max())
        width = min(_doubled(_LEAST_WIDTH, waiting), self._room) if plan.num_steps else 0
        return Shape(plan, batch, context, width, heat.all_greedy, heat.any_greedy)

    def _key(self, name: str, shape: Shape) -> Hashable:
        """What the function `name` of this shape is known by."""
        if name == "catch_up":
            return name, shape.batch, shape.context, shape.width
        return name, shape._replace(width=0)

    def _send(self, shape: Shape, known: Known) -> None:
        """The one copy to the device: five numbers of each request, then the tokens to catch up with."""
        live, batch, width = len(known.length), shape.batch, shape.width
        filled = batch * (_KNOWN + width)
        host = self._host.numpy()
        header, tokens = host[: _KNOWN * batch].reshape(_KNOWN, batch), host[_KNOWN * batch : filled]
        waiting = known.length - 1 - known.read
        header[:, live:] = np.array([self._phantom, self._phantom, 0, 0, self._room])[:, None]
        header[0, :live], header[1, :live], header[2, :live] = known.length - 1, known.read, waiting - 1
        header[3, :live] = known.tokens[np.arange(live), known.length - 1]
        header[4, :live] = 0 if shape.plan.num_steps else waiting
        if width:
            at = np.minimum(known.read[:, None] + np.arange(1, width + 1), known.tokens.shape[1] - 1)
            tokens[:] = 0
            tokens.reshape(batch, width)[:live] = np.take_along_axis(known.tokens, at, 1)
        self._control[:filled].copy_(self._host[:filled], non_blocking=True)

    def _fill(self, shape: Shape, generator: torch.Generator) -> None:
        """Draw this round's uniform numbers, which the graphs read."""
        if not shape.all_greedy:
            s, n = shape.plan.num_steps, shape.plan.num_draft_tokens
            count = 2 * s + 1 if self._sampled(shape) else n
            self._uniform[: shape.batch, :count].uniform_(generator=generator)

    def _fetch(self, values: Tensor) -> Ints:
        """The one copy from the device, waited for."""
        host = self._back[: values.numel()].view(values.shape)
        host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()
        return host.numpy()

    def _header(self, batch: int) -> tuple[Tensor, ...]:
        """Slot, slots read, last waiting row, last token and first free waiting row of each request: [B] int64 each."""
        return self._control[: _KNOWN * batch].view(_KNOWN, batch).unbind(0)

    def _sampled(self, shape: Shape) -> bool:
        """Whether drafts are samples of the draft, tested by rejection sampling."""
        return self._rejection and shape.plan.is_chain and shape.plan.num_steps > 0 and not shape.all_greedy

    def _temperatures(self, shape: Shape) -> Temperatures:
        return Temperatures(self._heats[: shape.batch], shape.all_greedy, shape.any_greedy)

    # What follows runs on the device alone: no waiting, no copies from or to the host, shapes from `Shape`.

    def _catch_up(self, shape: Shape) -> None:
        """Let the draft read the features that wait, and keep its state after the last."""
        assert self._draft is not None and self._draft_cache is not None and self._pending is not None
        batch, width = shape.batch, shape.width
        _, read, newest, _, _ = self._header(batch)
        tokens = self._control[_KNOWN * batch : (_KNOWN + width) * batch].view(batch, width)
        slots = (read[:, None] + self._arange[:width]).clamp_(max=self._last_slot)
        features = self._draft.fuse(self._pending[:batch, :width])
        hidden = self._draft.decode(tokens, features, self._draft_cache, slots, length=shape.context)
        last = newest[:, None, None].expand(batch, 1, hidden.shape[-1])
        self._hidden[:batch].copy_(hidden.gather(1, last)[:, 0])

    def _draft_tokens(self, shape: Shape) -> None:
        """Draft a chain or a tree, and keep it for verification."""
        assert self._draft is not None and self._draft_cache is not None
        plan, batch, n = shape.plan, shape.batch, shape.plan.num_draft_tokens
        slot, _, _, last, _ = self._header(batch)
        start = Start(self._hidden[:batch], slot, shape.context, last, fixed=True)
        if plan.is_chain:
            heat = self._temperatures(shape) if self._rejection else None
            numbers = Drawn(self._uniform[:batch])
            proposal = propose_chain(self._draft, self._draft_cache, start, plan.num_steps, self._vocab, heat, numbers)
        else:
            proposal = propose_tree(self._draft, self._draft_cache, start, plan)
        self._tokens[:batch, :n].copy_(proposal.tokens)
        self._parents[:batch, :n].copy_(proposal.parents)
        if proposal.depths is not None and proposal.seen is not None:
            self._depths[:batch, :n].copy_(proposal.depths)
            self._seen[:batch, :n, :n].copy_(proposal.seen)
        if proposal.distributions is not None:
            self._distributions(shape).copy_(proposal.distributions)

    def _verify(self, shape: Shape) -> Verified:
        """The target's pass, acceptance, the accepted rows' entries in the cache and their features for the draft."""
        plan, batch, n = shape.plan, shape.batch, shape.plan.num_draft_tokens
        slot, _, _, last, free = self._header(batch)
        tokens = self._tokens[:batch, :n] if plan.num_steps else last[:, None]
        slots = slot[:, None] + self._arange[:n]
        tree = not plan.is_chain
        decoded = self._target.decode(
            tokens,
            self._cache,
            slots,
            length=shape.context,
            positions=slots[:, :1] + self._depths[:batch, :n] if tree else None,
            seen=tree_mask(self._seen[:batch, :n, :n], slot, shape.context, fixed=True) if tree else None,
            taps=self._taps,
        )
        correct, bonus, path = self._accept(shape, tokens, decoded.logits)
        committed = tokens.gather(1, path.roll(-1, 1).clamp(min=0)).scatter(1, correct[:, None], bonus[:, None])
        features = decoded.features
        if tree:
            self._compact(slot, path)
            if features is not None:
                kept = path.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
                self._store(free, features.gather(1, kept))
        elif features is not None:
            self._store(free, features)
        return Verified(torch.cat([correct[:, None], committed], 1), path, decoded.logits, features)

    def _plain(self, shape: Shape) -> Tensor:
        """A step without any draft: [B, 1] int64."""
        slot, _, _, last, _ = self._header(shape.batch)
        logits = self._target.decode(last[:, None], self._cache, slot[:, None], length=shape.context).logits
        return choose(logits, self._temperatures(shape), Drawn(self._uniform[: shape.batch]))

    def _accept(self, shape: Shape, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Correct drafts [B], the target's own tokens [B] and the accepted rows [B, s + 1]."""
        plan, batch, heat = shape.plan, shape.batch, self._temperatures(shape)
        if self._sampled(shape):
            numbers = Drawn(self._uniform[:batch, plan.num_steps :])
            correct, bonus = reject_chain(logits, tokens[:, 1:], self._distributions(shape), heat, numbers)
        else:
            chosen = choose(logits, heat, Drawn(self._uniform[:batch]))
            if not plan.is_chain:
                return walk_tree(chosen, tokens, self._parents[:batch, : plan.num_draft_tokens], plan.num_steps)
            correct, bonus = accept_chain(chosen, tokens[:, 1:])
        rows = self._arange[: plan.num_steps + 1]
        return correct, bonus, torch.where(rows <= correct[:, None], rows, -1)

    def _compact(self, slot: Tensor, path: Tensor) -> None:
        """Move the accepted rows' entries in the cache to where a chain would have them."""
        batch, rows = path.shape
        to = self._arange[1:rows].expand(batch, rows - 1)
        requests = self._arange[:batch, None].expand(batch, rows - 1)
        sources = torch.where(path[:, 1:] >= 0, path[:, 1:], to)
        self._cache.move(requests.flatten(), (slot[:, None] + sources).flatten(), (slot[:, None] + to).flatten())

    def _store(self, free: Tensor, features: Tensor) -> None:
        """Let features [B, m, 3H] wait for the draft from row `free [B]` on."""
        if self._pending is None:
            return
        batch, rows, width = features.shape
        at = self._arange[:batch, None] * self._pending.shape[1] + free[:, None] + self._arange[:rows]
        self._pending.view(-1, width).index_put_((at,), features)

    def _distributions(self, shape: Shape) -> Tensor:
        """Where drafting leaves what its samples were drawn from: [B, s, V] float32."""
        steps = shape.plan.num_steps
        if steps not in self._q:
            self._q[steps] = torch.zeros(self._most, steps, self._vocab, device=self._target.device)
        return self._q[steps][: shape.batch]


def _doubled(least: int, wanted: int) -> int:
    """The smallest of least, 2 least, 4 least, .. that is not below `wanted`."""
    while least < wanted:
        least *= 2
    return least
