"""A batch of live requests: propose, verify, commit, replace what is finished.

Invariants between rounds, for each request of L known tokens x_0 .. x_{L-1}:
the target's cache holds slots 0 .. L-2; the draft's cache holds slots 0 .. D-1, slot t made of (features of
x_t, x_{t+1}); features of slots D .. L-2 wait in a buffer, at least one. So plan 0 costs the capture of its
features only, and the next plan that speculates pays for reading them (docs/decisions/0002-plan-zero.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specrl.core.clock import Clock
from specrl.core.interfaces import ProposalSession, Request
from specrl.core.plan import Plan
from specrl.core.round import Completion, Ints, PlainSample, Round, Trace
from specrl.decoding.batch import Batch
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.eager import EagerRounds
from specrl.decoding.external_draft import check_given, given_chain
from specrl.decoding.fixed_shape import StaticRounds
from specrl.decoding.pending_features import Waiting
from specrl.decoding.prefill import Admission
from specrl.decoding.propose import MOST_NODES, Proposal
from specrl.decoding.traces import Record, Traces
from specrl.models.draft import ServingDraft
from specrl.models.target import Target

_PLAIN_STEPS = 3  # that a sample of plain decoding takes


class LocalSession(ProposalSession):
    """Closed-loop decoding of one target at fixed concurrency (see `specrl.core.interfaces.Session`).

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
        taps = draft.config.taps if draft is not None else taps
        capacity = max_context + MOST_NODES + 1 if graphs is None else StaticRounds.capacity(max_context)
        fused = None if graphs is None else True
        cache = target.new_cache(max_batch_size, capacity, fused)
        self._generator = torch.Generator(target.device).manual_seed(seed)
        self._probe_generator = torch.Generator(target.device).manual_seed(seed)
        self._batch = batch = Batch(max_batch_size, capacity, target.device)
        waiting = None
        if draft is not None:
            phantoms = 0 if graphs is None else MOST_NODES
            waiting = Waiting(draft, batch, max_context=max_context, capacity=capacity, fused=fused, phantoms=phantoms)
        self._waiting = waiting
        self._traces = Traces(batch, draft, target.device) if trace else None
        self._admission = Admission(
            requests, target, cache, batch, waiting, self._traces,
            max_context=max_context, taps=taps, generator=self._generator,
        )  # fmt: skip
        self._eager = EagerRounds(
            target, cache, batch, waiting,
            taps=taps, rejection=use_rejection_sampling, warm=set() if warm is None else warm,
        )  # fmt: skip
        self._static = None
        if graphs is not None:
            theirs = (None, None) if waiting is None else (waiting.cache, waiting.buffer)
            self._static = StaticRounds(
                target, draft, cache, *theirs,
                max_context=max_context, taps=taps, rejection=use_rejection_sampling, graphs=graphs,
            )  # fmt: skip
        self._closed = False
        self.prefill_s = 0.0
        self.resize(batch_size)

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return self._batch.size

    @property
    def context_lengths(self) -> list[int]:
        """Tokens known of each live request."""
        return self._batch.length.tolist()

    @property
    def request_ids(self) -> list[int]:
        """Of the live requests, row by row."""
        return [live.id for live in self._batch.live]

    @property
    def last_tokens(self) -> list[int]:
        """The last committed token of each live request."""
        return self._batch.newest().tolist()

    @torch.inference_mode()
    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on; more are prefilled, or the last ones parked.

        A parked request keeps its state and goes on when there is room again. Prefill seconds add up in
        `prefill_s`.

        Raises:
            ValueError: more than the session was made for, or none.
        """
        self._check_open()
        most = self._batch.most
        if not 1 <= batch_size <= most:
            raise ValueError(f"batch_size must be in [1, {most}], the session's max_batch_size, but got {batch_size}")
        began = self.clock.now()
        for row in range(self._batch.admitted, batch_size):
            self._batch.join(self._admission.admit(row))
        self.prefill_s += self.clock.now() - began
        self._batch.resize(batch_size)
        if self._waiting is not None:
            self._waiting.resize()
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
        self._eager.prepare(plan, self._generator)
        began = self.clock.now()
        return self._conclude(plan, self._eager.propose(plan, self._generator), began)

    @torch.inference_mode()
    def round_with(self, drafted: Tensor, distributions: Tensor | None = None) -> Round:
        """Verify and commit what somebody else drafted, for every live request (see `ProposalSession`)."""
        self._check_open()
        plan = check_given(drafted, distributions, self.batch_size, self.target.config.vocab_size)

        def given() -> Proposal:
            if plan.num_steps == 0:
                return self._eager.propose(plan, self._generator)
            return given_chain(drafted, distributions, self._batch.last())

        self._eager.prepare(plan, self._generator, given)
        began = self.clock.now()
        return self._conclude(plan, given(), began)

    def _conclude(self, plan: Plan, proposal: Proposal, began: float) -> Round:
        """Verify and commit a proposal whose making began at `began`."""
        context, drafted = self._batch.length.copy(), self.clock.now()
        left = self._eager.verify(plan, proposal, self._generator)
        verified = self.clock.now()
        if self._waiting is not None:
            assert left.features is not None
            self._waiting.keep(left.features, left.path)
        record = None
        if self._traces is not None and left.features is not None:
            record = Record(proposal.tokens, proposal.parents, left.features, left.logits, left.path)
        return self._finish(plan, left.correct, left.committed, context, record, (began, drafted, verified))

    def _static_round(self, plan: Plan, static: StaticRounds) -> Round:
        """A round in fixed shapes."""
        batch, known = self._batch, self._batch.known()
        static.prepare(plan, known)
        began = self.clock.now()
        if plan.num_steps == 0 and self._waiting is not None:
            self._waiting.make_room(1)
        proposal = static.propose(plan, known, self._generator)
        context, drafted = batch.length.copy(), self.clock.now()
        correct, committed, left = static.verify(plan, known)
        if plan.num_steps:
            batch.read[:] = batch.length - 1
        verified = self.clock.now()
        record = None
        if self._traces is not None and left.features is not None:  # copies, for the next round writes there
            kept = (proposal.tokens, proposal.parents, left.features, left.logits, left.path)
            record = Record(*(tensor[: batch.size].clone() for tensor in kept))
        return self._finish(plan, correct, committed, context, record, (began, drafted, verified))

    def _finish(
        self,
        plan: Plan,
        correct: Ints,
        committed: list[list[int]],
        context: Ints,
        record: Record | None,
        times: tuple[float, float, float],
    ) -> Round:
        """Commit what was accepted and replace who is done; proposing began, ended, and verifying ended at `times`."""
        began, drafted, verified = times
        ids = self._batch.ids
        counts, ended = self._batch.commit(committed)
        if self._traces is not None and record is not None:
            self._traces.keep_round(plan, record, correct, ids, context, ended)
        done = self.clock.now()
        finished = tuple(self._replace(row) for row in ended) + self._admission.take_ended()
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
            draft_version=0 if self.draft is None else self.draft.version,
            finished=finished,
        )

    def _replace(self, row: int) -> Completion:
        """Hand out a finished request and prefill the next one in its place."""
        done = self._batch.replace(row, self._admission.admit(row))
        self._heat()
        return done.completion()

    def _heat(self) -> None:
        """Let rounds in fixed shapes know who is live."""
        if self._static is not None:
            self._static.heat(self._batch.temperatures)

    @torch.inference_mode()
    def measure_plain(self) -> PlainSample:
        """Time one plain step on the live requests; its token is thrown away and its slot written again later.

        It is the third of three, for plain decoding finds the caches as plain decoding leaves them: straight after a
        speculative round a step takes up to 14 % longer, and speedups would be flattered by as much.
        """
        self._check_open()
        if self._static is None:
            self._eager.prepare(Plan(0), self._generator)
        else:
            self._static.prepare(Plan(0), self._batch.known(), plain=True)
        for _ in range(_PLAIN_STEPS):
            sample = self._plain_step()
        return sample

    def _plain_step(self) -> PlainSample:
        batch, began = self._batch, self.clock.now()
        if self._static is not None:
            chosen = self._static.plain(batch.known(), self._probe_generator).tolist()
        else:
            chosen = self._eager.plain(self._probe_generator).tolist()
        for live, token in zip(batch.live, chosen, strict=True):
            live.cut([token])
        return PlainSample(batch.size, float(batch.length.mean()), self.clock.now() - began)

    def drain(self) -> list[Trace]:
        """Take the traces kept so far."""
        return [] if self._traces is None else self._traces.drain()

    def close(self) -> None:
        """End the session and let go of its caches; idempotent."""
        self._closed = True
        self._waiting = self._traces = self._static = None
        for name in ("_eager", "_admission"):
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
