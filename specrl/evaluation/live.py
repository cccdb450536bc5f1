"""Choosers on a live engine: plain decoding, every chooser and every single plan take turns under one moving load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specrl.core.batch_schedule import Phase
from specrl.core.interfaces import Engine, PlanChooser, Request, Session, Workload
from specrl.core.observation import Observer
from specrl.core.plan import Plan
from specrl.evaluation.simulation import Play

PLAIN = "plain"
_NEWEST = 0.1  # weight of the newest plain round in the t0 that observations show
_CHECKED = 4  # prompts of the greedy check


@dataclass(slots=True)
class Lane:
    """One chooser's own session; without a chooser, plain decoding."""

    chooser: PlanChooser | None
    session: Session
    observer: Observer
    play: Play


def play_live(
    engine: Engine,
    workload: Workload,
    choosers: Mapping[str, PlanChooser],
    plans: Sequence[Plan],
    phases: Sequence[Phase],
    cycles: int,
    *,
    seed: int = 0,
    on_cycle: Callable[[int], None] | None = None,
) -> dict[str, Play]:
    """Every chooser's play, and 'plain' for plain decoding, on the same prompts.

    A cycle is once through the phases. In each phase the lanes decode it one after the other, there and back in turns,
    so that a drift of the machine meets all alike; the first round of a turn finds the caches as another lane left
    them and is not counted.

    Args:
        engine: that decodes.
        workload: prompts.
        choosers: by name of their lane.
        plans: on offer.
        phases: of the load.
        cycles: to play.
        seed: of prompts and sampling.
        on_cycle: called after each cycle with its number.
    """
    most = max(phase.batch_size for phase in phases)
    first, index = phases[0].batch_size, {plan: i for i, plan in enumerate(plans)}
    t0: dict[int, float] = {}
    lanes = {
        name: Lane(
            chooser,
            engine.start(workload, batch_size=first, max_batch_size=most, seed=seed, plain=chooser is None),
            Observer(plans),
            Play(),
        )
        for name, chooser in {PLAIN: None, **choosers}.items()
    }
    order = list(lanes.values())
    for cycle in range(cycles):
        for number, phase in enumerate(phases):
            for lane in order if (cycle + number) % 2 == 0 else reversed(order):
                lane.session.resize(phase.batch_size)
                for turn in range(phase.rounds + 1):
                    _round(lane, index, t0, counted=turn > 0)
        if on_cycle is not None:
            on_cycle(cycle + 1)
    for lane in order:
        lane.session.close()
    return {name: lane.play for name, lane in lanes.items()}


def _round(lane: Lane, index: Mapping[Plan, int], t0: dict[int, float], *, counted: bool) -> None:
    batch, lengths = lane.session.batch_size, lane.session.context_lengths
    if lane.chooser is None:
        done = lane.session.round(Plan(0))
        t0[batch] = t0.get(batch, done.seconds) + _NEWEST * (done.seconds - t0.get(batch, done.seconds))
        lane.play.add(done, -1, counted)
        return
    plan = lane.chooser.choose(lane.observer.observe(batch, sum(lengths) / len(lengths)))
    done = lane.session.round(plan)
    lane.chooser.learn(done)
    lane.observer.record(done, t0.get(batch, done.seconds))
    lane.play.add(done, index[plan], counted)


def block_speedups(plain: Play, play: Play, rounds: int) -> NDArray[np.float64]:
    """[blocks] speedup Σ N·t0(B)/B ÷ Σ Δt of each block of `rounds` rounds, t0 from plain decoding's same block."""
    out = []
    for begin in range(0, len(play.seconds), rounds):
        t0 = plain_seconds(plain, begin, rounds)
        earned = spent = 0.0
        for r in range(begin, begin + rounds):
            if play.counted[r]:
                earned += play.tokens[r] * t0[play.batches[r]] / play.batches[r]
                spent += play.seconds[r]
        out.append(earned / spent)
    return np.array(out)


def plain_seconds(plain: Play, begin: int, rounds: int) -> dict[int, float]:
    """Mean seconds of a plain round by batch size in a block; a round's tokens are at most one per request."""
    spent: dict[int, list[float]] = {}
    for r in range(begin, begin + rounds):
        if plain.counted[r]:
            spent.setdefault(plain.batches[r], []).append(plain.seconds[r])
    return {batch: float(np.mean(seconds)) for batch, seconds in spent.items()}


def measured_values(plays: Mapping[str, Play], plans: Sequence[Plan], sizes: Sequence[int]) -> NDArray[np.float64]:
    """[2, sizes, plans] seconds per round as `World` has them, from the lanes named by the plans and from plain's.

    First plain decoding's for a round's mean tokens per request, N · t0(B) / B, then the round's own.
    """
    out = np.empty((2, len(sizes), len(plans)))
    everything = len(plays[PLAIN].seconds)
    t0 = plain_seconds(plays[PLAIN], 0, everything)
    for j, plan in enumerate(plans):
        play = plays[str(plan)]
        for i, batch in enumerate(sizes):
            at = [r for r in range(everything) if play.counted[r] and play.batches[r] == batch]
            out[0, i, j] = np.mean([play.tokens[r] for r in at]) * t0[batch] / batch
            out[1, i, j] = np.mean([play.seconds[r] for r in at])
    return out


class Greedy:
    """The first prompts of a workload, to be continued greedily."""

    def __init__(self, workload: Workload, seed: int) -> None:
        stream = workload.requests(seed)
        taken = [next(stream) for _ in range(_CHECKED)]
        self.listed = [Request(r.prompt, r.max_new_tokens, 0.0, ignore_eos=True) for r in taken]

    def requests(self, seed: int) -> object:
        """The same prompts, over and over."""
        while True:
            yield from self.listed


def greedy_tokens(engine: Engine, workload: Workload, choices: Sequence[Plan], seed: int) -> list[tuple[int, ...]]:
    """Greedy continuations of the workload's first prompts, decoded by the plans `choices` in turn; () is plainly."""
    source = Greedy(workload, seed)
    session = engine.start(source, batch_size=_CHECKED, seed=seed, plain=not choices)  # type: ignore[arg-type]
    found: dict[int, tuple[int, ...]] = {}
    turn = 0
    wanted: list[int] | None = None
    while wanted is None or not found.keys() >= set(wanted):
        done = session.round(choices[turn % len(choices)] if choices else Plan(0))
        wanted = done.request_ids.tolist() if wanted is None else wanted
        turn += 1
        found.update({c.request_id: c.tokens for c in done.finished})
    session.close()
    return [found[i] for i in wanted]
