"""Oracle headroom on a live engine: the best plan per batch size over the best single plan, and how much is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.core.statistics import Interval
from specrl.evaluation.live import PLAIN, measured_values, plain_seconds
from specrl.evaluation.scores import speedup_interval
from specrl.evaluation.simulation import Play

Floats = NDArray[np.float64]
_RESAMPLES = 4000
_FEW = 4  # cycles; of fewer an interval says nothing


class Blocks(NamedTuple):
    """Log speedups of [blocks] cycles of the load, all against plain decoding of the same cycle.

    Attributes:
        table: of the best plan per batch size, chosen on all other cycles, so that luck is not counted as skill.
        single: of the best single plan, chosen likewise.
        own: of each chooser.
    """

    table: Floats
    single: Floats
    own: Mapping[str, Floats]


class Closed(NamedTuple):
    """A chooser between the best single plan and the best plan per batch size.

    Attributes:
        over_single: its speedup over the best single plan's.
        share: of the log headroom, that is closed; None where the headroom's interval reaches 1.
    """

    over_single: Interval
    share: Interval | None


def blocks(
    plays: Mapping[str, Play], choosers: Sequence[str], plans: Sequence[Plan], sizes: Sequence[int], rounds: int
) -> Blocks:
    """Cut plays into cycles of `rounds` rounds; `plays` holds 'plain', every plan by its name, and the choosers.

    Raises:
        ValueError: fewer than two cycles.
    """
    count = len(plays[PLAIN].seconds) // rounds
    if count < 2:
        raise ValueError(f"headroom needs at least 2 cycles of the traffic, but got {count}; raise rounds")
    cut = [{name: _cut(play, c * rounds, rounds) for name, play in plays.items()} for c in range(count)]
    values = np.array([measured_values(part, plans, sizes) for part in cut])  # [blocks, 2, sizes, plans]
    phases = [[sum(b == size for b in _counted(part[PLAIN])) for size in sizes] for part in cut]
    weighted = values * np.array(phases, dtype=np.float64)[:, None, :, None]  # seconds of a whole cycle
    table, single, rows = np.empty(count), np.empty(count), np.arange(len(sizes))
    for c in range(count):
        earned, spent = np.delete(weighted, c, 0).sum(0)
        per_size, alone = (earned / spent).argmax(1), int((earned.sum(0) / spent.sum(0)).argmax())
        gain, cost = weighted[c]
        table[c] = np.log(gain[rows, per_size].sum() / cost[rows, per_size].sum())
        single[c] = np.log(gain[:, alone].sum() / cost[:, alone].sum())
    own = {name: np.array([_log_speedup(part, name) for part in cut]) for name in choosers}
    return Blocks(table, single, own)


def together(found: Sequence[Blocks]) -> Blocks:
    """The cycles of several runs, one after another."""
    own = {name: np.concatenate([part.own[name] for part in found]) for name in found[0].own}
    return Blocks(np.concatenate([p.table for p in found]), np.concatenate([p.single for p in found]), own)


def headroom(found: Blocks) -> Interval:
    """Speedup of the best plan per batch size over the best single plan's."""
    return speedup_interval(np.exp(found.table - found.single))


def closed(found: Blocks, name: str) -> Closed:
    """How far a chooser is on the way; the interval of the share is a percentile bootstrap over cycles."""
    way, gone = found.table - found.single, found.own[name] - found.single
    over = speedup_interval(np.exp(gone))
    if headroom(found).low <= 1.0:
        return Closed(over, None)
    picks = np.random.default_rng(0).integers(len(way), size=(_RESAMPLES, len(way)))
    low, high = np.quantile(gone[picks].sum(1) / np.maximum(way[picks].sum(1), 1e-9), [0.025, 0.975])
    return Closed(over, Interval(float(gone.sum() / way.sum()), float(low), float(high)))


def lines(found: Blocks) -> list[str]:
    """What is printed: the headroom and, for each chooser, all cycles and the last half of them."""
    half = len(found.table) // 2
    late = Blocks(found.table[half:], found.single[half:], {name: own[half:] for name, own in found.own.items()})
    parts = [("all cycles", found), *([("last half", late)] if half >= _FEW else [])]
    out = []
    for when, part in parts:
        out.append(f"oracle headroom: best plan per batch size over best single plan, {when}: {_text(headroom(part))}")
        for name in part.own:
            told = closed(part, name)
            share = "no headroom that can be told from none" if told.share is None else f"closed {_text(told.share)}"
            out.append(f"  {name}: {_text(told.over_single)} of the best single plan; {share}")
    return out


def _text(interval: Interval) -> str:
    return str(interval) if interval.high - interval.low < 10.0 else f"{interval.value:.3f} [too few cycles]"


def as_json(found: Blocks) -> dict[str, list[float]]:
    """Log speedups by cycle, for whoever wants to look again."""
    return {"table": found.table.tolist(), "single": found.single.tolist()} | {
        f"chooser {name}": own.tolist() for name, own in found.own.items()
    }


def _cut(play: Play, begin: int, rounds: int) -> Play:
    part = slice(begin, begin + rounds)
    return Play(play.batches[part], play.choices[part], play.tokens[part], play.seconds[part], play.counted[part])


def _counted(play: Play) -> list[int]:
    return [batch for batch, counts in zip(play.batches, play.counted, strict=True) if counts]


def _log_speedup(part: Mapping[str, Play], name: str) -> float:
    t0, play = plain_seconds(part[PLAIN], 0, len(part[PLAIN].seconds)), part[name]
    rows = [r for r, counts in enumerate(play.counted) if counts]
    earned = sum(play.tokens[r] * t0[play.batches[r]] / play.batches[r] for r in rows)
    return float(np.log(earned / sum(play.seconds[r] for r in rows)))
