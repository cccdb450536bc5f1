"""A session: in each round propose, verify, commit, and replace the requests that finished.

Invariants between rounds, for each request of L known tokens x_0 .. x_{L-1}: the target's cache holds slots 0 .. L-2,
and the draft has read, or will catch up on, the same slots (see `specrl.decoding.pending_features`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from specrl.core.checks import require
from specrl.core.clock import Clock
from specrl.core.interfaces import ProposalSession, Request
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round, Trace
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.eager import EagerRunner
from specrl.decoding.fixed_shape import FixedShapeRunner
from specrl.decoding.prefill import Prefiller
from specrl.decoding.propose import ExternalDraft, Proposal, unsupported
from specrl.decoding.sampling import Source
from specrl.decoding.state import SessionConfig, SessionState, round_trace
from specrl.decoding.verify import Verified
from specrl.models.draft import ServingDraft
from specrl.models.target import Target

_PLAIN_STEPS = 3  # per sample of plain decoding


class Runner(Protocol):
    """The two steps of a round, for a plan whose kernels or graphs are built already."""

    def propose(self, plan: Plan, source: Source) -> Proposal:
        """Let the draft catch up and draft, unless the plan is 0."""

    def verify(self, plan: Plan, proposal: Proposal, source: Source) -> Verified:
        """Run the target over the proposal, accept, and store the hidden states for the draft."""


class LocalSession(ProposalSession):
    """Closed-loop decoding of one target at fixed concurrency (see `specrl.core.interfaces.Session`).

    Args:
        draft: the target's draft; None: plain decoding, whose only plan is 0.
        requests: an endless stream of requests.
        warm: batch sizes and plans whose kernels are built already; shared by the sessions of an engine.
        graphs: run rounds in fixed shapes, as CUDA graphs on a GPU; None: run them in the shapes of the live requests.

    Attributes:
        source: source of the random numbers of rounds and prefills.
        prefill_s: seconds of the prefills of `resize`.
    """

    def __init__(
        self,
        target: Target,
        draft: ServingDraft | None,
        requests: Iterator[Request],
        config: SessionConfig,
        *,
        clock: Clock,
        warm: set[tuple[int, Plan, bool]],
        graphs: Graphs | None = None,
    ) -> None:
        self.target, self.draft, self.clock = target, draft, clock
        self.closed, self.prefill_s = False, 0.0
        self.source: Source = torch.Generator(target.device).manual_seed(config.seed)
        self._plain_generator = torch.Generator(target.device).manual_seed(config.seed)
        self.state = state = SessionState(target, draft, config, fixed_shapes=graphs is not None)
        self._batch, self._warm = state.batch, warm
        self._traces: list[Trace] | None = [] if config.trace and config.aux_layers else None
        self._prefiller = Prefiller(requests, state, self._traces)
        self._runner = EagerRunner(state, warm) if graphs is None else FixedShapeRunner(state, graphs)
        self.resize(config.batch_size)

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
        """Ids of the live requests, row by row."""
        return self._batch.ids.tolist()

    @property
    def last_tokens(self) -> list[int]:
        """The last committed token of each live request."""
        return self._batch.last_tokens().tolist()

    @torch.inference_mode()
    def resize(self, batch_size: int) -> None:
        """Decode `batch_size` requests from the next round on: prefill further ones, or park the last ones.

        A parked request keeps its state and goes on when there is room again. `prefill_s` sums the seconds of prefill.

        Raises:
            ValueError: `batch_size` is not in [1, max_batch_size], or the session is closed.
        """
        self._check_open()
        largest = self._batch.max_batch_size
        require(1 <= batch_size <= largest, "batch_size", f"in [1, max_batch_size={largest}]", batch_size)
        timer = RoundTimer(self.clock)
        for row in range(len(self._batch.admitted), batch_size):
            self._prefiller.admit(row, self.source)
        self.prefill_s += timer.lap()
        self._batch.resize(batch_size)
        if self.state.pending is not None:
            self.state.pending.resize()

    @torch.inference_mode()
    def prepare(self, plan: Plan) -> None:
        """Build the kernels or graphs of a round of `plan` at this batch size; `round` does so itself, untimed.

        Raises:
            ValueError: the session cannot run the plan.
        """
        self._check_open()
        problem = unsupported(plan, self.draft)
        if problem is not None:
            raise ValueError(problem)
        self._runner.prepare(plan)

    @torch.inference_mode()
    def round(self, plan: Plan) -> Round:
        """Propose `plan`, verify and commit for every live request; raises as `prepare` does."""
        self.prepare(plan)
        return self._round(self._runner, plan)

    @torch.inference_mode()
    def round_with(self, drafted: Tensor, distributions: Tensor | None = None) -> Round:
        """Verify and commit drafts made outside, for every live request (see `ProposalSession`)."""
        self._check_open()
        external = ExternalDraft(drafted, distributions)
        external.validate(self.batch_size, self.target.config.vocab_size)
        runner, plan = EagerRunner(self.state, self._warm, external), Plan(drafted.shape[1])
        runner.prepare(plan)
        return self._round(runner, plan)

    def _round(self, runner: Runner, plan: Plan) -> Round:
        timer = RoundTimer(self.clock)
        proposal = runner.propose(plan, self.source)
        draft_s = timer.lap()
        verified = runner.verify(plan, proposal, self.source)
        verify_s = timer.lap()
        committed = self._batch.commit(verified.tokens)
        if self._traces is not None:
            self._traces.append(round_trace(self.state, plan, proposal, verified, committed))
        other_s = timer.lap()
        finished = self._prefiller.refill(committed.ended, self.source)
        return Round(
            plan,
            committed.request_ids,
            committed.counts,
            verified.correct_drafts,
            committed.context_lengths,
            draft_s=draft_s,
            verify_s=verify_s,
            other_s=other_s,
            prefill_s=timer.lap() if committed.ended else 0.0,
            draft_version=self.state.draft_version,
            finished=finished,
        )

    @torch.inference_mode()
    def measure_plain(self) -> PlainSample:
        """Time one plain step on the live requests; its tokens are dropped, and their slots written again later.

        Two steps run before the one that counts: directly after a speculative round a plain step is up to 14 % slower,
        because of cold caches, which would inflate the speedup.
        """
        self._check_open()
        for _ in range(_PLAIN_STEPS):
            timer = RoundTimer(self.clock)
            tokens = self._runner.plain_step(self._plain_generator)
            for live, token in zip(self._batch.live, tokens, strict=True):
                live.cut([token])
            sample = PlainSample(self.batch_size, float(self._batch.length.mean()), timer.lap())
        return sample

    def drain(self) -> list[Trace]:
        """Take the traces since the last call."""
        traces = list(self._traces or ())
        if self._traces:
            self._traces.clear()
        return traces

    def close(self) -> None:
        """End the session and free its caches; idempotent."""
        if not self.closed:
            self.closed, self._traces = True, None
            del self.state, self._prefiller, self._runner

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the session is closed; start another one")


class RoundTimer:
    """Times the parts of a round; starts when it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, clock.now()

    def lap(self) -> float:
        """Return the seconds since the last lap, after all work given to the device is done."""
        last, self._last = self._last, self._clock.now()
        return self._last - last
