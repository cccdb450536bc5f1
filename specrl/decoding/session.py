"""A batch of live requests: propose, verify, commit, replace what is finished.

Invariants between rounds, for each request of L known tokens x_0 .. x_{L-1}:
the target's cache holds slots 0 .. L-2; the draft's cache holds slots 0 .. D-1, slot t made of (features of
x_t, x_{t+1}); features of slots D .. L-2 wait in a buffer, at least one. So plan 0 costs the capture of its
features only, and the next plan that speculates pays for reading them (docs/decisions/0002-plan-zero.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.clock import Clock
from specrl.decoding.acceptance import accept_chain, accept_tree, reject_chain
from specrl.decoding.graphs import Graphs
from specrl.decoding.proposal import (
    MOST_NODES,
    Proposal,
    Start,
    check_distributions,
    propose_chain,
    propose_tree,
    tree_mask,
)
from specrl.decoding.sampling import Temperatures, choose
from specrl.decoding.static import Known, StaticRounds
from specrl.engines.base import Request
from specrl.models.draft import ServingDraft
from specrl.models.target import Decoded, Target
from specrl.plan import Plan
from specrl.rounds import Completion, Ints, PlainSample, Round, Trace

_MOST_AT_PREFILL = 1000  # requests in a row that may end with their first token
_WAITING_BYTES = 64 << 20  # memory for features that wait for the draft, unless that holds fewer than two rounds'
_PLAIN_STEPS = 3  # that a sample of plain decoding takes


@dataclass(slots=True)
class _Live:
    """A live request on the host."""

    id: int
    request: Request
    generated: list[int] = field(default_factory=list)

    def keep(self, tokens: list[int], eos: frozenset[int]) -> tuple[list[int], bool]:
        """What of `tokens` the request takes, and whether it ends with it."""
        left = self.request.max_new_tokens - len(self.generated)
        kept = tokens[:left]
        if not self.request.ignore_eos and not eos.isdisjoint(kept):
            end = next(i for i, token in enumerate(kept) if token in eos)
            return kept[: end + 1], True
        return kept, len(kept) == left


class _Record(NamedTuple):
    """What a round leaves for its trace (see `Trace`); path None: a chain's."""

    tokens: Tensor
    parents: Tensor
    features: Tensor
    logits: Tensor
    path: Tensor | None


class LocalSession:
    """Closed-loop decoding of one target at fixed concurrency (see `specrl.engines.base.Session`).

    Args:
        target: the model.
        draft: its draft, or None for plain decoding, whose only plan is 0.
        requests: endless.
        batch_size: live requests.
        max_batch_size: the most that `resize` may ask for.
        max_context: tokens a request may reach.
        seed: of all sampling.
        clock: that times the rounds.
        use_rejection_sampling: sample chains from the draft and accept by rejection sampling (SGLang's option
            of that name); else, and for every tree, drafts are the draft's best tokens and stand where the
            target itself chooses them.
        trace: keep traces for `drain`.
        warm: batch sizes and plans whose kernels are known to be built; the engine's sessions share it.
        taps: without a draft: layers whose inputs a trace keeps as features, for one who drafts outside.
        graphs: run rounds in fixed shapes, as CUDA graphs where there is a GPU; None: in the shapes that are live.
    """

    def __init__(
        self,
        target: Target,
        draft: ServingDraft | None,
        requests: Iterator[Request],
        *,
        batch_size: int,
        max_batch_size: int,
        max_context: int,
        seed: int,
        clock: Clock,
        use_rejection_sampling: bool = True,
        trace: bool = False,
        warm: set[tuple[int, Plan, bool]] | None = None,
        taps: tuple[int, ...] = (),
        graphs: Graphs | None = None,
    ) -> None:
        most = target.config.max_position_embeddings
        if not 1 <= batch_size <= max_batch_size:
            raise ValueError(f"batch_size must be in [1, max_batch_size={max_batch_size}], but got {batch_size}")
        if not 2 <= max_context <= most:
            raise ValueError(f"max_context must be in [2, {most}], the target's positions, but got {max_context}")
        self.target, self.draft, self.clock = target, draft, clock
        self._requests, self._max_context, self._trace = requests, max_context, trace
        self._rejection = use_rejection_sampling
        self._warm = set() if warm is None else warm
        self._taps = draft.config.taps if draft is not None else taps
        self._eos = frozenset(target.config.eos_token_ids)
        device, fused = target.device, True if graphs is not None else None
        capacity = max_context + MOST_NODES + 1 if graphs is None else StaticRounds.capacity(max_context)
        self._cache = target.new_cache(max_batch_size, capacity, fused)
        if draft is not None:
            self._draft_cache = draft.new_cache(max_batch_size, capacity, fused)
            width = 3 * target.config.hidden_size
            affordable = _WAITING_BYTES // (max_batch_size * width * target.dtype.itemsize)
            self._room = max(2 * MOST_NODES, min(max_context, affordable))
            rows = self._room if graphs is None else self._room + MOST_NODES
            self._all_pending = torch.zeros(max_batch_size, rows, width, dtype=target.dtype, device=device)
        self._all_tokens = torch.zeros(max_batch_size, capacity + 1, dtype=torch.int64)
        self._known = self._all_tokens.numpy()
        self._all_length = np.zeros(max_batch_size, dtype=np.int64)  # L
        self._all_read = np.zeros(max_batch_size, dtype=np.int64)  # D
        self._generator = torch.Generator(device).manual_seed(seed)
        self._probe_generator = torch.Generator(device).manual_seed(seed)
        self._arange = torch.arange(capacity + MOST_NODES, device=device)
        self._no_parents = torch.full((max_batch_size, 1), -1, dtype=torch.int64, device=device)
        self._traces: list[Trace] = []
        self._ended_at_prefill: list[Completion] = []
        self._served = 0
        self._admitted: list[_Live] = []  # those beyond batch_size are parked
        self._closed = False
        self._static: StaticRounds | None = None
        if graphs is not None:
            self._static = StaticRounds(
                target,
                draft,
                self._cache,
                None if draft is None else self._draft_cache,
                None if draft is None else self._all_pending,
                max_context=max_context,
                taps=self._taps,
                rejection=use_rejection_sampling,
                graphs=graphs,
            )
        self.prefill_s = 0.0
        self.resize(batch_size)

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return self._size

    @property
    def context_lengths(self) -> list[int]:
        """Tokens known of each live request."""
        return self._length.tolist()

    @property
    def request_ids(self) -> list[int]:
        """Of the live requests, row by row."""
        return [live.id for live in self._live]

    @property
    def last_tokens(self) -> list[int]:
        """The last committed token of each live request."""
        return self._known[self._every, self._length - 1].tolist()

    @torch.inference_mode()
    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on; more are prefilled, or the last ones parked.

        A parked request keeps its state and goes on when there is room again. Prefill seconds add up in
        `prefill_s`.

        Raises:
            ValueError: more than the session was made for, or none.
        """
        self._check_open()
        most = len(self._all_length)
        if not 1 <= batch_size <= most:
            raise ValueError(f"batch_size must be in [1, {most}], the session's max_batch_size, but got {batch_size}")
        began = self.clock.now()
        for row in range(len(self._admitted), batch_size):
            self._admitted.append(self._admit(row))
        self.prefill_s += self.clock.now() - began
        self._size = batch_size
        self._live = self._admitted[:batch_size]
        self._length, self._read = self._all_length[:batch_size], self._all_read[:batch_size]
        self._tokens = self._all_tokens[:batch_size]
        self._every = np.arange(batch_size)
        if self.draft is not None:
            self._pending = self._all_pending[:batch_size]
            self._pending_rows = (torch.arange(batch_size, device=self.target.device) * self._pending.shape[1])[:, None]
        self._heat()

    @torch.inference_mode()
    def round(self, plan: Plan) -> Round:
        """Propose `plan`, verify and commit for every live request.

        Raises:
            ValueError: a plan that speculates in a session without a draft, or one too large.
        """
        self._check(plan)
        if self._static is not None:
            return self._static_round(plan, self._static)
        self._warm_up(plan)
        began = self.clock.now()
        return self._conclude(plan, self._propose(plan), began)

    def _static_round(self, plan: Plan, static: StaticRounds) -> Round:
        """A round in fixed shapes."""
        static.prepare(plan, self._now())
        began = self.clock.now()
        if plan.num_steps == 0 and self.draft is not None and int((self._length - self._read).max()) > self._room:
            self._catch_up_early()
        known = self._now()
        proposal = static.propose(plan, known, self._generator)
        context, drafted = self._length.copy(), self.clock.now()
        correct, committed, left = static.verify(plan, known)
        if plan.num_steps:
            self._read[:] = self._length - 1
        verified = self.clock.now()
        record = None
        if self._trace and left.features is not None:  # copies, for the next round writes there
            kept = (proposal.tokens, proposal.parents, left.features, left.logits, left.path)
            record = _Record(*(tensor[: self._size].clone() for tensor in kept))
        return self._finish(plan, correct, committed, context, record, (began, drafted, verified))

    def _now(self) -> Known:
        """What is known of the live requests."""
        return Known(self._known[: self._size], self._length, self._read, self._temperatures)

    @torch.inference_mode()
    def round_with(self, drafted: Tensor, distributions: Tensor | None = None) -> Round:
        """Verify and commit what somebody else drafted, for every live request (see `ProposalSession`)."""
        plan = self._check_given(drafted, distributions)
        proposal = self._given(plan, drafted, distributions)
        self._warm_up(plan, proposal)
        began = self.clock.now()
        return self._conclude(plan, self._given(plan, drafted, distributions), began)

    def _conclude(self, plan: Plan, proposal: Proposal, began: float) -> Round:
        """Verify and commit a proposal whose making began at `began`."""
        context, drafted = self._length.copy(), self.clock.now()
        decoded = self._verify(plan, proposal)
        correct, committed, path = self._accept(plan, proposal, decoded.logits)
        verified = self.clock.now()
        if self.draft is not None:
            assert decoded.features is not None
            self._keep_features(decoded.features, path)
        record = None
        if self._trace and decoded.features is not None:
            record = _Record(proposal.tokens, proposal.parents, decoded.features, decoded.logits, path)
        return self._finish(plan, correct, committed, context, record, (began, drafted, verified))

    def _finish(
        self,
        plan: Plan,
        correct: Ints,
        committed: list[list[int]],
        context: Ints,
        record: _Record | None,
        times: tuple[float, float, float],
    ) -> Round:
        """Commit what was accepted and replace who is done; proposing began, ended, and verifying ended at `times`."""
        began, drafted, verified = times
        ids = self._ids
        counts, ended = self._commit(committed)
        if record is not None:
            self._record(plan, record, correct, ids, context, ended)
        done = self.clock.now()
        finished = tuple(self._replace(row) for row in ended) + tuple(self._ended_at_prefill)
        self._ended_at_prefill.clear()
        prefill_s = self.clock.now() - done if ended else 0.0
        return Round(
            plan=plan,
            request_ids=ids,
            tokens=counts,
            correct_drafts=correct,
            context_lengths=context,
            draft_s=drafted - began,
            verify_s=verified - drafted,
            other_s=done - verified,
            prefill_s=prefill_s,
            draft_version=self._version(),
            finished=finished,
        )

    @torch.inference_mode()
    def measure_plain(self) -> PlainSample:
        """Time one plain step on the live requests; its token is thrown away and its slot written again later.

        It is the third of three, for plain decoding finds the caches as plain decoding leaves them: straight after a
        speculative round a step takes up to 14 % longer, and speedups would be flattered by as much.
        """
        self._check_open()
        if self._static is None:
            self._warm_up(Plan(0))
        else:
            self._static.prepare(Plan(0), self._now(), plain=True)
        for _ in range(_PLAIN_STEPS):
            sample = self._plain_step()
        return sample

    def _plain_step(self) -> PlainSample:
        began = self.clock.now()
        if self._static is not None:
            chosen = self._static.plain(self._now(), self._probe_generator).tolist()
        else:
            proposal = self._propose(Plan(0))
            slots = self._at(self._length - 1)[:, None]
            length = int(self._length.max())
            logits = self.target.decode(proposal.tokens, self._cache, slots, length=length, level=self._level()).logits
            chosen = choose(logits[:, 0], self._temperatures, self._probe_generator).tolist()
        for live, token in zip(self._live, chosen, strict=True):
            live.keep([token], self._eos)
        return PlainSample(self.batch_size, float(self._length.mean()), self.clock.now() - began)

    def drain(self) -> list[Trace]:
        """Take the traces kept so far."""
        traces, self._traces = self._traces, []
        return traces

    def close(self) -> None:
        """End the session and let go of its caches; idempotent."""
        self._closed = True
        self._traces = []
        self._static = None
        for name in ("_cache", "_draft_cache", "_all_pending", "_pending"):
            self.__dict__.pop(name, None)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed; start another one")

    def _check(self, plan: Plan) -> None:
        self._check_open()
        if plan.num_steps and self.draft is None:
            raise ValueError(f"plain decoding has no draft, so its only plan is 0, but got {plan}")
        if self.draft is not None and plan.topk > (words := self.draft.config.draft_vocab_size):
            raise ValueError(f"topk must be at most the draft's vocabulary of {words} tokens, but got {plan}")
        if max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk) > MOST_NODES:
            raise ValueError(f"a plan may draft and verify at most {MOST_NODES} tokens per request, but got {plan}")

    def _check_given(self, drafted: Tensor, distributions: Tensor | None) -> Plan:
        """The chain that a given proposal is.

        Raises:
            ValueError: a shape, dtype, token or distribution that is not one, or a token drafted after none.
        """
        self._check_open()
        vocab = self.target.config.vocab_size
        if drafted.dtype != torch.int64 or drafted.ndim != 2 or len(drafted) != self._size:
            got = f"{drafted.dtype} {list(drafted.shape)}"
            raise ValueError(f"drafted must be int64 [{self._size}, num_steps], a row per live request, but got {got}")
        steps = drafted.shape[1]
        if steps >= MOST_NODES:
            raise ValueError(f"a proposal may draft at most {MOST_NODES - 1} tokens per request, but got {steps}")
        if steps == 0:
            return Plan(0)
        if not -1 <= int(drafted.min()) <= int(drafted.max()) < vocab:
            raise ValueError(
                f"drafted tokens must be in [0, {vocab}), or -1 where a draft ends, but got "
                f"{int(drafted.min())}..{int(drafted.max())}"
            )
        if bool(((drafted[:, 1:] >= 0) & (drafted[:, :-1] < 0)).any()):
            raise ValueError("a draft that has ended must not go on, but got a token after -1; pad with -1 at the end")
        if distributions is not None:
            check_distributions(drafted, distributions, vocab)
        return Plan(steps)

    def _given(self, plan: Plan, drafted: Tensor, distributions: Tensor | None) -> Proposal:
        """Somebody else's drafts after the committed tokens, as a proposal."""
        drafted = drafted.to(self.target.device)
        tokens = torch.cat([self._last()[:, None], drafted.clamp(min=0)], 1)
        if plan.num_steps == 0:
            return Proposal(tokens, self._no_parents[: len(tokens)], None, None, None)
        parents = torch.arange(-1, plan.num_steps, device=tokens.device).expand(tokens.shape)
        q = None
        if distributions is not None:
            q = distributions.to(tokens.device).masked_fill((drafted < 0)[..., None], 0.0)
        return Proposal(tokens, parents, None, None, q, drafted)

    def _warm_up(self, plan: Plan, given: Proposal | None = None) -> None:
        """Before the first round of its kind, run it once and take everything back: kernels are built untimed."""
        kind = (self._size, plan, self.draft is None)
        if kind in self._warm:
            return
        self._warm.add(kind)
        read, state = self._read.copy(), self._generator.get_state()
        for _ in range(2):
            proposal = self._propose(plan) if given is None else given
            choose(self._verify(plan, proposal).logits, self._temperatures, self._generator)
            self._read[:] = read
        self._generator.set_state(state)

    def _version(self) -> int:
        return 0 if self.draft is None else self.draft.version

    def _at(self, values: Ints) -> Tensor:
        return torch.from_numpy(values).to(self.target.device)

    def _heat(self) -> None:
        """Note who is live."""
        self._ids = np.array([live.id for live in self._live])
        temperatures = [live.request.temperature for live in self._live]
        self._temperatures = Temperatures.of(temperatures, self.target.device)
        if self._static is not None:
            self._static.heat(self._temperatures)

    def _level(self) -> bool:
        return bool((self._length == self._length[0]).all())

    def _last(self) -> Tensor:
        """The last committed token of each request: [B] int64."""
        last = self._known[self._every, self._length - 1]
        return torch.from_numpy(last).to(self.target.device)

    def _propose(self, plan: Plan) -> Proposal:
        if plan.num_steps == 0:
            last = self._last()[:, None]
            return Proposal(last, self._no_parents[: len(last)], None, None, None)
        assert self.draft is not None
        hidden = self._catch_up()
        start = Start(hidden, self._at(self._length - 1), int(self._length.max()) - 1, self._last())
        if plan.is_chain:
            sampled = self._temperatures if self._rejection else None
            return propose_chain(
                self.draft,
                self._draft_cache,
                start,
                plan.num_steps,
                self.target.config.vocab_size,
                sampled,
                self._generator,
            )
        return propose_tree(self.draft, self._draft_cache, start, plan)

    def _verify(self, plan: Plan, proposal: Proposal) -> Decoded:
        """The target's pass over the proposal."""
        slots = self._at(self._length - 1)[:, None] + self._arange[: plan.num_draft_tokens]
        length = int(self._length.max()) - 1 + plan.num_draft_tokens
        return self.target.decode(
            proposal.tokens,
            self._cache,
            slots,
            length=length,
            positions=None if proposal.depths is None else slots[:, :1] + proposal.depths,
            seen=None if proposal.seen is None else tree_mask(proposal.seen, slots[:, 0], length),
            level=plan.num_steps == 0 and self._level(),
            taps=self._taps,
        )

    def _catch_up(self, leave: int = 0) -> Tensor:
        """Let the draft read all waiting features but the last `leave`; its state after the last: [B, H]."""
        assert self.draft is not None
        waiting = self._length - 1 - self._read - leave  # [B], at least 1 unless some are left
        width = int(waiting.max())
        last_slot = self._draft_cache.capacity - 1  # where what a shorter request has not got is put; never seen
        slots = (self._at(self._read)[:, None] + self._arange[:width]).clamp_(max=last_slot)
        tokens = self._tokens.to(self.target.device).gather(1, slots + 1)
        hidden = self.draft.decode(
            tokens,
            self.draft.fuse(self._pending[:, :width]),
            self._draft_cache,
            slots,
            length=min(int(self._read.max()) + width, last_slot + 1),
        )
        self._read += waiting
        last = self._at(np.maximum(waiting - 1, 0))
        return hidden[self._arange[: len(last)], last]

    def _accept(self, plan: Plan, proposal: Proposal, logits: Tensor) -> tuple[Ints, list[list[int]], Tensor | None]:
        """Correct drafts [B], committed tokens of each request, and the accepted rows [B, s + 1] of a tree."""
        if plan.num_steps == 0:
            tokens = choose(logits[:, 0], self._temperatures, self._generator).tolist()
            return np.zeros(len(tokens), dtype=np.int64), [[token] for token in tokens], None
        tested = proposal.tokens[:, 1:] if proposal.drafted is None else proposal.drafted
        if proposal.distributions is not None:
            accepted = reject_chain(logits, tested, proposal.distributions, self._temperatures, self._generator)
        else:
            chosen = choose(logits, self._temperatures, self._generator)  # [B, n]
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
        moved = [
            (row, self._length[row] - 1 + node, self._length[row] - 1 + depth)
            for row, path in enumerate(paths)
            for depth, node in enumerate(path)
            if node != depth
        ]
        if moved:
            self._cache.move(*torch.tensor(np.array(moved), device=self.target.device).unbind(1))
        return correct, committed, rows.to(self.target.device)

    def _keep_features(self, features: Tensor, path: Tensor | None) -> None:
        """Let the verified tokens' features [B, n, 3H] wait for the draft, in the order of the accepted path."""
        waiting = self._length - 1 - self._read
        if int(waiting.max()) + features.shape[1] > self._room:
            self._catch_up_early()
            waiting = self._length - 1 - self._read
        if path is not None:
            index = path.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
            features = features.gather(1, index)
        rows = self._pending_rows + self._at(waiting)[:, None] + self._arange[: features.shape[1]]
        self._pending.view(-1, features.shape[-1]).index_put_((rows,), features)

    def _catch_up_early(self) -> None:
        """Make room in the buffer: read all but each request's last waiting features, and move those to the front."""
        waiting = self._length - 1 - self._read
        rows = (self._pending_rows[:, 0] + self._at(waiting - 1)).unsqueeze(1)
        last = self._pending.view(-1, self._pending.shape[-1])[rows]  # [B, 1, 3H]
        if int(waiting.max()) > 1:
            self._catch_up(leave=1)
        self._pending[:, :1] = last

    def _commit(self, committed: list[list[int]]) -> tuple[Ints, list[int]]:
        """Append what each request keeps; tokens kept [B] and the rows that ended."""
        counts, ended = np.empty(len(committed), dtype=np.int64), []
        for row, (live, tokens) in enumerate(zip(self._live, committed, strict=True)):
            kept, ends = live.keep(tokens, self._eos)
            length = self._length[row]
            self._known[row, length : length + len(kept)] = kept
            live.generated.extend(kept)
            self._length[row] = length + len(kept)
            counts[row] = len(kept)
            if ends:
                ended.append(row)
        return counts, ended

    def _record(
        self,
        plan: Plan,
        record: _Record,
        correct: Ints,
        ids: Ints,
        context: Ints,
        ended: list[int],
    ) -> None:
        path = record.path
        if path is None:
            rows = self._arange[: plan.num_steps + 1]
            path = torch.where(rows <= self._at(correct)[:, None], rows, -1)
        self._traces.append(
            Trace(
                request_ids=ids,
                positions=context - 1,
                tokens=record.tokens,
                features=record.features,
                logits=record.logits,
                parents=record.parents,
                path=path,
                draft_version=self._version(),
                plan=plan,
                temperatures=tuple(live.request.temperature for live in self._live),
                finished=tuple(self._live[row].id for row in ended),
            )
        )

    def _replace(self, row: int) -> Completion:
        """Hand out a finished request and prefill the next one in its place."""
        done = self._live[row]
        self._live[row] = self._admitted[row] = self._admit(row)
        self._heat()
        return Completion(done.id, done.request.prompt, tuple(done.generated))

    def _admit(self, row: int) -> _Live:
        """Prefill requests into cache row `row` until one lives on: its first token is sampled here."""
        for _ in range(_MOST_AT_PREFILL):
            live = _Live(self._served, self._checked(next(self._requests)))
            self._served += 1
            if not self._prefill(row, live):
                return live
            done = Completion(live.id, live.request.prompt, tuple(live.generated))
            self._ended_at_prefill.append(done)
        raise ValueError(
            f"a session needs requests that outlive their first token, but got {_MOST_AT_PREFILL} in a row that ended "
            "with it; raise max_new_tokens above 1, or set ignore_eos"
        )

    def _checked(self, request: Request) -> Request:
        known, most = len(request.prompt), request.max_new_tokens
        if known + most > self._max_context:
            raise ValueError(
                f"prompt and max_new_tokens must fit max_context={self._max_context}, but got {known} + {most} "
                f"tokens; shorten them or raise max_context"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < self.target.config.vocab_size:
            raise ValueError(
                f"prompt tokens must be in [0, {self.target.config.vocab_size}), but got "
                f"{min(request.prompt)}..{max(request.prompt)}; was the text encoded with another tokenizer?"
            )
        return request

    def _prefill(self, row: int, live: _Live) -> bool:
        """Read the prompt, sample the first token; whether the request ends with it."""
        request, length = live.request, len(live.request.prompt)
        tokens = torch.tensor([request.prompt], device=self.target.device)
        wanted = None if self._trace else 1  # logits of a whole prompt take much memory
        decoded = self.target.prefill(tokens, self._cache, first=row, taps=self._taps, last=wanted)
        heat = Temperatures.of([request.temperature], self.target.device)
        token = int(choose(decoded.logits[:, -1], heat, self._generator))
        kept, ends = live.keep([token], self._eos)
        live.generated.extend(kept)
        self._known[row, : length + 1] = [*request.prompt, token]
        self._all_length[row], self._all_read[row] = length + 1, length - 1
        if self.draft is not None:
            assert decoded.features is not None
            self._all_pending[row, 0] = decoded.features[0, -1]
            if length > 1:
                self._prefill_draft(row, tokens[:, 1:], decoded.features[:, :-1])
        if self._trace and decoded.features is not None:
            self._record_prefill(live, tokens, decoded.features, decoded.logits, ends)
        return ends

    def _prefill_draft(self, row: int, tokens: Tensor, features: Tensor) -> None:
        assert self.draft is not None
        count = tokens.shape[1]
        slots = torch.arange(count, device=self.target.device)[None]
        self.draft.decode(tokens, self.draft.fuse(features), self._draft_cache, slots, length=count, first=row)

    def _record_prefill(self, live: _Live, tokens: Tensor, features: Tensor, logits: Tensor, ends: bool) -> None:
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self._traces.append(
            Trace(
                request_ids=np.array([live.id]),
                positions=np.zeros(1, dtype=np.int64),
                tokens=tokens,
                features=features,
                logits=logits,
                parents=rows - 1,
                path=rows,
                draft_version=self._version(),
                temperatures=(live.request.temperature,),
                finished=(live.id,) if ends else (),
            )
        )
