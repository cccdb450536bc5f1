"""Paired, interleaved measurement: several ways to decode the same prompts ("arms"), in turns in one process.

A block is one generation of requests (batch size x max_new_tokens tokens). It is decoded in slices. The arms take turns
with each slice, in alternating order: plain, A, B, B, A, plain. A drift of the machine then affects all arms equally.
Block n of an arm is paired with block n of the first arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specrl.config import MeasureConfig
from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import PLAIN, Plan
from specrl.core.round import Round
from specrl.core.round_stats import RoundStats
from specrl.core.statistics import Interval, paired_speedup
from specrl.io.output import progress
from specrl.measure.machine import torch_threads

AA_CONTROL = "A/A"  # the arm that measures plain decoding a second time
_WARM_UP_ROUNDS = 8
_SLICES = 4  # of a block; even, so that both orders of the arms are equally frequent
_MIN_BLOCKS = 6  # are always measured
_MIN_BLOCKS_TO_STOP = 12  # before an interval may end the measurement


class SessionPool:
    """Opens the sessions of a measurement.

    Arms of an engine with `single_session` share one session and one plain session: each arm continues the requests of
    the arm before. Such arms are paired by time, not by prompt.

    Args:
        workload: prompts, the same for every session.
        batch_size: live requests.
        seed: of prompts and sampling.
        max_batch_size: the largest batch size that a session may be resized to; None: `batch_size`.
    """

    def __init__(self, workload: Workload, *, batch_size: int, seed: int, max_batch_size: int | None = None) -> None:
        self._workload, self._seed = workload, seed
        self._batch_size, self._max_batch_size = batch_size, max_batch_size
        self._sessions: list[Session] = []
        self._shared: dict[tuple[int, bool], Session] = {}

    def open(self, engine: Engine, *, plain: bool) -> Session:
        """Return a session of an engine: a new one, or the one that its arms share."""
        key = id(engine), plain
        if not engine.single_session or key not in self._shared:
            self._shared[key] = engine.start(
                self._workload,
                batch_size=self._batch_size,
                max_batch_size=self._max_batch_size,
                seed=self._seed,
                plain=plain,
            )
            self._sessions.append(self._shared[key])
        return self._shared[key]

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions:
            session.close()


@dataclass(slots=True)
class Arm:
    """One way to decode, and its measurements so far.

    Args:
        name: of the arm.
        engine: decodes.
        plan: of every round; None: plain decoding.
        threads: torch threads while the arm runs; None: unchanged.
        block_size: tokens of its blocks relative to those of other arms. Accept lengths vary between requests more than
            plain decoding does, so larger blocks of a speculative arm make its interval narrower.

    Attributes:
        blocks: the n-th is paired with the n-th of the first arm.
        round_s: seconds of every counted round.
        request_tps: tokens per second of every finished request.
    """

    name: str
    engine: Engine
    plan: Plan | None
    threads: int | None = None
    block_size: float = 1.0
    blocks: list[RoundStats] = field(init=False, default_factory=list)
    round_s: list[float] = field(init=False, default_factory=list)
    request_tps: list[float] = field(init=False, default_factory=list)
    _session: Session = field(init=False, repr=False)
    _live: dict[int, tuple[int, float]] = field(init=False, repr=False)  # request -> tokens, seconds

    def open(self, sessions: SessionPool) -> None:
        """Open the session."""
        self._session, self._live = sessions.open(self.engine, plain=self.plan is None), {}

    def warm_up(self) -> None:
        """Decode a few rounds that are not counted."""
        with torch_threads(self.threads):
            for _ in range(_WARM_UP_ROUNDS):
                self._session.round(self.plan or Plan(0))

    def run(self, tokens: float) -> None:
        """Decode until the last block has at least `tokens` tokens, after one round that is not counted."""
        block, plan = self.blocks[-1], self.plan or Plan(0)
        with torch_threads(self.threads):
            self._add_to_requests(self._session.round(plan))  # the caches are still those of the arm before
            while block.tokens < tokens:
                done = self._session.round(plan)
                block.add(done)
                self.round_s.append(done.seconds)
                self._add_to_requests(done)

    def _add_to_requests(self, done: Round) -> None:
        ended = {completion.request_id for completion in done.finished}
        for request, new in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
            tokens, seconds = self._live.pop(request, (0, 0.0))
            tokens, seconds = tokens + new, seconds + done.seconds
            if request in ended:
                self.request_tps.append(tokens / seconds)
            else:
                self._live[request] = tokens, seconds


@dataclass(frozen=True, slots=True)
class ArmResult:
    """The result of one arm at one batch size.

    Attributes:
        plan: as text; 'plain' for plain decoding.
        count: finished requests.
        mean_tps, p50_tps, p05_tps, p95_tps: tokens per second of a request, over requests.
        total_tps: tokens per second of all requests together.
        speedup: over the first arm; None for the first arm.
        accept_length: mean tokens per request and verification.
        draft_ms, verify_ms, other_ms, round_ms: means over rounds.
        prefill_s: seconds of prefills, which no other number includes.
        round_p20_s: 20th percentile of the seconds of a round.
        blocks: paired with the first blocks of the first arm.
    """

    name: str
    batch_size: int
    plan: str
    count: int
    mean_tps: float
    p50_tps: float
    p05_tps: float
    p95_tps: float
    total_tps: float
    speedup: Interval | None
    accept_length: float
    draft_ms: float
    verify_ms: float
    other_ms: float
    round_ms: float
    prefill_s: float
    round_p20_s: float
    blocks: tuple[RoundStats, ...] = field(repr=False)


def measure(
    arms: Sequence[Arm],
    workload: Workload,
    *,
    batch_size: int,
    block_tokens: int,
    until: MeasureConfig,
    seed: int = 0,
    stop_each: bool = False,
    budget_clock: Clock | None = None,
) -> list[ArmResult]:
    """Measure arms against the first one until every interval is narrow enough.

    Args:
        arms: without blocks; usually plain decoding first.
        workload: prompts, the same for every arm.
        batch_size: live requests.
        block_tokens: tokens of a block per request.
        until: the half-width of every 95 % interval, or the seconds of all arms together; at least six blocks are
            measured.
        seed: of prompts, sampling and the bootstrap.
        stop_each: let each arm stop as soon as its own interval is narrow enough.
        budget_clock: measures `until.seconds`; None: the first engine's clock.
    """
    clock = budget_clock or arms[0].engine.clock
    sessions = SessionPool(workload, batch_size=batch_size, seed=seed)
    start_arms(arms, sessions)
    began, order, widest = clock.now(), list(arms), np.inf
    with progress(f"batch {batch_size}", until.seconds) as advance:
        while len(arms[0].blocks) < _MIN_BLOCKS or (widest > until.precision and clock.now() - began < until.seconds):
            take_turns(order, batch_size * block_tokens)
            if len(arms[0].blocks) >= _MIN_BLOCKS_TO_STOP:
                widths = {id(a): speedup(arms[0].blocks, a.blocks, seed).half_width for a in order if a is not arms[0]}
                widest = max(widths.values(), default=0.0)
                if stop_each:
                    order = [arm for arm in order if widths.get(id(arm), np.inf) > until.precision]
            note = f"±{widest:.3f}, wanted ±{until.precision:g}" if np.isfinite(widest) else ""
            advance(clock.now() - began, note)
    sessions.close()
    return [_result(arms[0], arm, batch_size, seed) for arm in arms]


def start_arms(arms: Sequence[Arm], sessions: SessionPool) -> None:
    """Open the sessions of all arms, then warm them up."""
    for arm in arms:
        arm.open(sessions)
    for arm in arms:
        arm.warm_up()


def take_turns(arms: list[Arm], tokens: float) -> None:
    """Decode one block of each arm, of `tokens` times its `block_size` tokens, slice by slice in turns."""
    for arm in arms:
        arm.blocks.append(RoundStats())
    for part in range(1, _SLICES + 1):
        for arm in arms:
            arm.run(tokens * arm.block_size * part / _SLICES)
        arms.reverse()


def seconds_per_token(blocks: Sequence[RoundStats]) -> NDArray[np.float64]:
    """Return the seconds per token of all requests together: [blocks] float64."""
    return np.array([block.seconds / block.tokens for block in blocks])


def speedup(reference: Sequence[RoundStats], blocks: Sequence[RoundStats], seed: int = 0) -> Interval:
    """Return the speedup of an arm's blocks over a reference's, in pairs, with its 95 % interval."""
    pairs = min(len(reference), len(blocks))
    before, after = (seconds_per_token(each[:pairs]) for each in (reference, blocks))
    return paired_speedup(before, after, rng=np.random.default_rng(seed))


def _result(reference: Arm, arm: Arm, batch_size: int, seed: int) -> ArmResult:
    total = RoundStats()
    for block in arm.blocks:
        total.merge(block)
    tps = np.array(arm.request_tps or [np.nan])
    p05, p50, p95 = np.percentile(tps, [5, 50, 95]).tolist()
    ms = 1e3 / total.rounds
    return ArmResult(
        name=arm.name,
        batch_size=batch_size,
        plan=PLAIN if arm.plan is None else str(arm.plan),
        count=len(arm.request_tps),
        mean_tps=float(tps.mean()),
        p50_tps=p50,
        p05_tps=p05,
        p95_tps=p95,
        total_tps=total.tokens / total.seconds,
        speedup=None if arm is reference else speedup(reference.blocks, arm.blocks, seed),
        accept_length=total.accept_length,
        draft_ms=total.draft_s * ms,
        verify_ms=total.verify_s * ms,
        other_ms=total.other_s * ms,
        round_ms=total.seconds * ms,
        prefill_s=total.prefill_s,
        round_p20_s=float(np.percentile(arm.round_s, 20)),
        blocks=tuple(arm.blocks),
    )
