"""A round in the shapes that are live, operation by operation: propose, verify, accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Ints
from specrl.decoding.batch import Batch
from specrl.decoding.pending_features import Waiting
from specrl.decoding.propose import MOST_NODES, Proposal, Start, propose_chain, propose_tree, tree_mask
from specrl.decoding.sampling import choose
from specrl.decoding.verify import accept_chain, accept_tree, reject_chain
from specrl.models.kv_cache import KVCache
from specrl.models.target import Decoded, Target


class Verified(NamedTuple):
    """The outcome of a verification, and what it leaves."""

    correct: Ints  # [B] int64, drafts that stand
    committed: list[list[int]]  # tokens of each request, the target's own last
    path: Tensor | None  # [B, s + 1] int64, accepted rows of a tree, -1 after them; None: a chain's
    logits: Tensor  # [B, n, V] float32
    features: Tensor | None  # [B, n, 3H]


class EagerRounds:
    """Rounds over these caches, in shapes that follow the plan and the live requests.

    Args:
        target, cache: the model and its cache.
        batch: the requests.
        waiting: the draft and what waits for it; None: without a draft only plan 0, and drafts of others.
        taps, rejection: as the session's.
        warm: batch sizes and plans whose kernels are known to be built.
    """

    def __init__(
        self,
        target: Target,
        cache: KVCache,
        batch: Batch,
        waiting: Waiting | None,
        *,
        taps: tuple[int, ...],
        rejection: bool,
        warm: set[tuple[int, Plan, bool]],
    ) -> None:
        self._target, self.cache, self._batch, self._waiting = target, cache, batch, waiting
        self._taps, self._rejection, self._warm = taps, rejection, warm
        self._arange = torch.arange(MOST_NODES, device=target.device)
        self._no_parents = torch.full((batch.most, 1), -1, dtype=torch.int64, device=target.device)

    def prepare(self, plan: Plan, generator: torch.Generator, given: Callable[[], Proposal] | None = None) -> None:
        """Before the first round of its kind, run it once and take everything back: kernels are built untimed."""
        batch = self._batch
        kind = (batch.size, plan, self._waiting is None)
        if kind in self._warm:
            return
        self._warm.add(kind)
        read, state = batch.read.copy(), generator.get_state()
        for _ in range(2):
            proposal = self.propose(plan, generator) if given is None else given()
            choose(self._decode(plan, proposal).logits, batch.temperatures, generator)
            batch.read[:] = read
        generator.set_state(state)

    def propose(self, plan: Plan, generator: torch.Generator) -> Proposal:
        """Let the draft catch up and draft, unless nothing is drafted."""
        batch = self._batch
        if plan.num_steps == 0:
            last = batch.last()[:, None]
            return Proposal(last, self._no_parents[: len(last)], None, None, None)
        assert self._waiting is not None
        draft, cache, hidden = self._waiting.draft, self._waiting.cache, self._waiting.catch_up()
        start = Start(hidden, batch.at(batch.length - 1), int(batch.length.max()) - 1, batch.last())
        if not plan.is_chain:
            return propose_tree(draft, cache, start, plan)
        sampled = batch.temperatures if self._rejection else None
        return propose_chain(draft, cache, start, plan.num_steps, self._target.config.vocab_size, sampled, generator)

    def verify(self, plan: Plan, proposal: Proposal, generator: torch.Generator) -> Verified:
        """The target's pass over a proposal, and what of it stands; accepted entries of a tree move in the cache."""
        decoded = self._decode(plan, proposal)
        correct, committed, path = self._accept(plan, proposal, decoded.logits, generator)
        return Verified(correct, committed, path, decoded.logits, decoded.features)

    def plain(self, generator: torch.Generator) -> Tensor:
        """One step of plain decoding: a token of each live request [B]."""
        batch, tokens = self._batch, self._batch.last()[:, None]
        slots = batch.at(batch.length - 1)[:, None]
        length = int(batch.length.max())
        logits = self._target.decode(tokens, self.cache, slots, length=length, level=batch.is_level()).logits
        return choose(logits[:, 0], batch.temperatures, generator)

    def _decode(self, plan: Plan, proposal: Proposal) -> Decoded:
        """The target's pass over the proposal."""
        batch = self._batch
        slots = batch.at(batch.length - 1)[:, None] + self._arange[: plan.num_draft_tokens]
        length = int(batch.length.max()) - 1 + plan.num_draft_tokens
        return self._target.decode(
            proposal.tokens,
            self.cache,
            slots,
            length=length,
            positions=None if proposal.depths is None else slots[:, :1] + proposal.depths,
            seen=None if proposal.seen is None else tree_mask(proposal.seen, slots[:, 0], length),
            level=plan.num_steps == 0 and batch.is_level(),
            taps=self._taps,
        )

    def _accept(
        self, plan: Plan, proposal: Proposal, logits: Tensor, generator: torch.Generator
    ) -> tuple[Ints, list[list[int]], Tensor | None]:
        """Correct drafts [B], committed tokens of each request, and the accepted rows [B, s + 1] of a tree."""
        temperatures = self._batch.temperatures
        if plan.num_steps == 0:
            tokens = choose(logits[:, 0], temperatures, generator).tolist()
            return np.zeros(len(tokens), dtype=np.int64), [[token] for token in tokens], None
        tested = proposal.tokens[:, 1:] if proposal.drafted is None else proposal.drafted
        if proposal.distributions is not None:
            accepted = reject_chain(logits, tested, proposal.distributions, temperatures, generator)
        else:
            chosen = choose(logits, temperatures, generator)  # [B, n]
            if not plan.is_chain:
                return self._accept_tree(plan, proposal, chosen)
            accepted = accept_chain(chosen, tested)
        correct, bonus = accepted.correct.cpu().numpy(), accepted.bonus.tolist()
        drafted = proposal.tokens[:, 1:].tolist()
        return correct, [[*d[:c], b] for d, c, b in zip(drafted, correct.tolist(), bonus, strict=True)], None

    def _accept_tree(self, plan: Plan, proposal: Proposal, chosen: Tensor) -> tuple[Ints, list[list[int]], Tensor]:
        choices, tokens = chosen.tolist(), proposal.tokens.tolist()
        paths = accept_tree(choices, tokens, proposal.parents.tolist())
        committed = [
            [*(nodes[i] for i in path[1:]), after[path[-1]]]
            for path, nodes, after in zip(paths, tokens, choices, strict=True)
        ]
        correct = np.array([len(path) - 1 for path in paths], dtype=np.int64)
        rows = torch.tensor([path + [-1] * (plan.num_steps + 1 - len(path)) for path in paths])
        first = self._batch.length - 1  # slots of the committed tokens
        moved = [
            (row, first[row] + node, first[row] + depth)
            for row, path in enumerate(paths)
            for depth, node in enumerate(path)
            if node != depth
        ]
        if moved:
            self.cache.move(*torch.tensor(np.array(moved), device=self._target.device).unbind(1))
        return correct, committed, rows.to(self._target.device)
