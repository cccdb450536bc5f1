"""Paired, interleaved measurement: every plan against plain decoding, in one process, in turns.

Each lane decodes the same prompts in a session of its own. A block is one generation of requests (batch size x
max_new_tokens tokens), decoded in slices: plain, A, B, ..., then back B, A, plain, and so on, so that a drift of the
machine meets all alike. Each plan's block is paired with the block of plain decoding that it took turns with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.core.round_stats import RoundSums
from specrl.core.statistics import Interval, paired_speedup
from specrl.measure.machine import torch_threads

PLAIN = "plain"
_WARM_UP = 8  # rounds
_SLICES = 4  # of a block; even, so that every block goes as often forth as back
_LEAST, _FEWEST = 6, 12  # blocks that are always measured, and before an interval may end the measurement


@dataclass(frozen=True, slots=True)
class Setting:
    """What a lane decodes with.

    Args:
        name: of the lane.
        engine: its engine.
        plan: every round's plan; None: plain decoding.
        threads: torch threads while the lane runs; None: as they are.
        share: tokens of its blocks over those of a usual block. Accept lengths differ between requests far more than
            plain decoding does, so that a speculative lane's tokens narrow an interval more.
    """

    name: str
    engine: Engine
    plan: Plan | None
    threads: int | None = None
    share: float = 1.0


@dataclass(slots=True)
class Lane:
    """A setting's session and what was measured of it so far."""

    setting: Setting
    session: Session
    rounds: list[Round] = field(default_factory=list)
    blocks: list[list[float]] = field(default_factory=list)  # tokens, seconds; its n-th is paired with plain's n-th
    sums: list[RoundSums] = field(default_factory=list)  # of the same blocks
    request_tps: list[float] = field(default_factory=list)
    _lived: dict[int, list[float]] = field(default_factory=dict)  # request -> tokens, seconds

    def run(self, tokens: float) -> None:
        """Decode until the last block has at least `tokens` tokens, after one round that is not counted."""
        block, plan = self.blocks[-1], self.setting.plan or Plan(0)
        with torch_threads(self.setting.threads):
            self._follow(self.session.round(plan))  # finds the caches as the lane before left them: not counted
            while block[0] < tokens:
                done = self.session.round(plan)
                block[0] += float(done.tokens.sum())
                block[1] += done.seconds
                self.rounds.append(done)
                self.sums[-1].add(done)
                self._follow(done)

    def _follow(self, done: Round) -> None:
        ended = {completion.request_id for completion in done.finished}
        for request, tokens in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
            lived = self._lived.setdefault(request, [0.0, 0.0])
            lived[0] += tokens
            lived[1] += done.seconds
            if request in ended:
                total, seconds = self._lived.pop(request)
                self.request_tps.append(total / seconds)


@dataclass(frozen=True, slots=True)
class Measured:
    """One lane's result at one batch size; `speedup` is None for plain decoding itself."""

    name: str
    batch_size: int
    plan: str
    count: int  # requests finished
    mean_tps: float  # tokens per second and request, over requests
    p50_tps: float
    p05_tps: float
    p95_tps: float
    total_tps: float  # tokens per second of all requests together
    speedup: Interval | None
    accept_length: float
    draft_ms: float
    verify_ms: float
    other_ms: float
    round_ms: float
    prefill_s: float
    round_p20_s: float  # the 20th percentile of a round's seconds
    blocks: tuple[tuple[float, float], ...] = field(repr=False)  # tokens, seconds; paired with plain's first ones
    sums: tuple[RoundSums, ...] = field(repr=False)  # of the same blocks


def measure(
    settings: Sequence[Setting],
    workload: Workload,
    *,
    batch_size: int,
    block_tokens: int,
    precision: float,
    seconds: float,
    seed: int = 0,
    each: bool = False,
    budget_clock: Clock | None = None,
    on_block: Callable[[float, float], None] | None = None,
    lanes_out: list[Lane] | None = None,
) -> list[Measured]:
    """Measure lanes against the first, which is plain decoding, until every interval is narrow enough.

    Args:
        settings: plain first.
        workload: prompts, the same for every lane.
        batch_size: live requests.
        block_tokens: tokens of a block per request.
        precision: stop when every speedup's 95 % interval has a half-width of at most this.
        seconds: or when this much time (all lanes together) is spent, after six blocks at least.
        seed: of prompts, sampling and the bootstrap.
        each: let a lane stop on its own once its interval is narrow enough.
        budget_clock: that `seconds` are counted on; None: the first engine's.
        on_block: called after each pass with the seconds spent and the widest half-width.
        lanes_out: the lanes are added to it, for what their blocks and rounds say beyond the results.
    """
    clock = budget_clock or settings[0].engine.clock
    lanes = start(settings, workload, batch_size=batch_size, seed=seed)
    began, order, widest = clock.now(), list(lanes), float("inf")
    while len(lanes[0].blocks) < _LEAST or (widest > precision and clock.now() - began < seconds):
        take_turns(order, batch_size * block_tokens)
        if len(lanes[0].blocks) >= _FEWEST:
            widths = {id(lane): speedup(lanes[0], lane, seed).half_width for lane in order if lane is not lanes[0]}
            widest = max(widths.values(), default=0.0)
            if each:
                order = [lane for lane in order if widths.get(id(lane), np.inf) > precision]
        if on_block is not None:
            on_block(clock.now() - began, widest)
    results = [_result(lanes[0], lane, batch_size, seed) for lane in lanes]
    if lanes_out is not None:
        lanes_out += lanes
    for lane in lanes:
        lane.session.close()
    return results


def start(settings: Sequence[Setting], workload: Workload, *, batch_size: int, seed: int) -> list[Lane]:
    """Lanes over the same prompts, warmed up."""
    lanes = [
        Lane(s, s.engine.start(workload, batch_size=batch_size, seed=seed, plain=s.plan is None)) for s in settings
    ]
    for lane in lanes:
        with torch_threads(lane.setting.threads):
            for _ in range(_WARM_UP):
                lane.session.round(lane.setting.plan or Plan(0))
    return lanes


def take_turns(lanes: list[Lane], tokens: float) -> None:
    """One block of each lane, of `tokens` tokens times its share, slice by slice, there and back."""
    for lane in lanes:
        lane.blocks.append([0.0, 0.0])
        lane.sums.append(RoundSums())
    for part in range(1, _SLICES + 1):
        for lane in lanes:
            lane.run(tokens * lane.setting.share * part / _SLICES)
        lanes.reverse()


def speedup(plain: Lane, lane: Lane, seed: int = 0) -> Interval:
    """Speedup of a lane over plain by paired blocks, with its 95 % interval."""
    per_token = [np.array([s / n for n, s in x.blocks[: len(lane.blocks)]]) for x in (plain, lane)]
    return paired_speedup(per_token[0], per_token[1], rng=np.random.default_rng(seed))


def _result(plain: Lane, lane: Lane, batch_size: int, seed: int) -> Measured:
    rounds, setting = lane.rounds, lane.setting
    tps = np.array(lane.request_tps) if lane.request_tps else np.array([np.nan])
    tokens, seconds = np.array(lane.blocks).sum(0)
    p05, p50, p95 = np.percentile(tps, [5, 50, 95])
    split = np.mean([(r.draft_s, r.verify_s, r.other_s, r.seconds) for r in rounds], 0) * 1e3
    return Measured(
        name=setting.name,
        batch_size=batch_size,
        plan=PLAIN if setting.plan is None else str(setting.plan),
        count=len(lane.request_tps),
        mean_tps=float(tps.mean()),
        p50_tps=float(p50),
        p05_tps=float(p05),
        p95_tps=float(p95),
        total_tps=float(tokens / seconds),
        speedup=None if lane is plain else speedup(plain, lane, seed),
        accept_length=float(np.mean([r.accept_length for r in rounds])),
        draft_ms=split[0],
        verify_ms=split[1],
        other_ms=split[2],
        round_ms=split[3],
        prefill_s=float(sum(r.prefill_s for r in rounds)),
        round_p20_s=float(np.percentile([r.seconds for r in rounds], 20)),
        blocks=tuple((n, s) for n, s in lane.blocks),
        sums=tuple(lane.sums),
    )


def rows(results: Sequence[Measured]) -> list[dict[str, object]]:
    """Results as rows of a table, the published tables' columns first."""
    out: list[dict[str, object]] = []
    for r in results:
        s = r.speedup
        out.append(
            {
                "batch_size": r.batch_size,
                "plan": r.plan if r.name in (PLAIN, r.plan) else f"{r.plan} ({r.name})",
                "mean_tps": r.mean_tps,
                "p50_tps": r.p50_tps,
                "p05_tps": r.p05_tps,
                "p95_tps": r.p95_tps,
                "total_tps": r.total_tps,
                "count": r.count,
                "speedup": None if s is None else round(s.value, 4),
                "low": None if s is None else round(s.low, 4),
                "high": None if s is None else round(s.high, 4),
                "accept_length": round(r.accept_length, 3),
                "round_ms": r.round_ms,
                "draft_ms": r.draft_ms,
                "verify_ms": r.verify_ms,
                "other_ms": r.other_ms,
                "prefill_s": r.prefill_s,
            }
        )
    return out
