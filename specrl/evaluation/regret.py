"""The oracle gap of a live engine: the best plan per batch size over the best single plan, and how much is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from specrl.core.plan import Plan
from specrl.core.statistics import Interval
from specrl.evaluation.scores import speedup_interval
from specrl.evaluation.trajectory import PLAIN, Floats, Trajectory, block_speedups, plan_seconds

_RESAMPLES = 4000
_MIN_CYCLES = 4  # for an interval


class CycleSpeedups(NamedTuple):
    """Log speedups of C cycles of the load, each over plain decoding of the same cycle.

    Attributes:
        table: [C] of the best plan per batch size, chosen on all other cycles, so that luck does not count.
        single: [C] of the best single plan, chosen likewise.
        own: [C] of each chooser.
    """

    table: Floats
    single: Floats
    own: Mapping[str, Floats]

    @staticmethod
    def concatenate(parts: Sequence[CycleSpeedups]) -> CycleSpeedups:
        """The cycles of several runs."""
        own = {name: np.concatenate([part.own[name] for part in parts]) for name in parts[0].own}
        return CycleSpeedups(np.concatenate([p.table for p in parts]), np.concatenate([p.single for p in parts]), own)

    def last_half(self) -> CycleSpeedups:
        """The second half of the cycles."""
        half = len(self.table) // 2
        own = {name: logs[half:] for name, logs in self.own.items()}
        return CycleSpeedups(self.table[half:], self.single[half:], own)

    def to_json(self) -> dict[str, list[float]]:
        """Log speedups by cycle."""
        own = {f"chooser {name}": logs.tolist() for name, logs in self.own.items()}
        return {"table": self.table.tolist(), "single": self.single.tolist(), **own}


class GapClosed(NamedTuple):
    """A chooser between the best single plan and the best plan per batch size.

    Attributes:
        over_single: its speedup over the best single plan.
        share: of the log gap that it closes; None if the interval of the gap contains 1.
    """

    over_single: Interval
    share: Interval | None


def cycle_speedups(
    trajectories: Mapping[str, Trajectory],
    choosers: Sequence[str],
    plans: Sequence[Plan],
    sizes: Sequence[int],
    rounds: int,
) -> CycleSpeedups:
    """Speedups of each cycle of `rounds` rounds.

    Args:
        trajectories: of plain decoding, of every plan by its name, and of the choosers.
        choosers: names.
        plans: that are offered.
        sizes: batch sizes of the load.
        rounds: of a cycle.

    Raises:
        ValueError: fewer than two cycles.
    """
    plain = trajectories[PLAIN]
    count = len(plain) // rounds
    if count < 2:
        raise ValueError(f"the oracle gap needs at least 2 cycles of the load, but got {count}; raise rounds")
    cycles = [slice(c * rounds, (c + 1) * rounds) for c in range(count)]
    values = [plan_seconds({name: t[part] for name, t in trajectories.items()}, plans, sizes) for part in cycles]
    counts = np.array([[plain[part].at(size).sum() for size in sizes] for part in cycles])  # [C, sizes] rounds
    plain_s, round_s = (np.array(seconds) * counts[:, :, None] for seconds in zip(*values, strict=True))
    table, single, rows = np.empty(count), np.empty(count), np.arange(len(sizes))
    for c in range(count):
        other_plain_s, other_round_s = (np.delete(seconds, c, 0).sum(0) for seconds in (plain_s, round_s))
        per_size = (other_plain_s / other_round_s).argmax(1)
        best = int((other_plain_s.sum(0) / other_round_s.sum(0)).argmax())
        table[c] = np.log(plain_s[c, rows, per_size].sum() / round_s[c, rows, per_size].sum())
        single[c] = np.log(plain_s[c, :, best].sum() / round_s[c, :, best].sum())
    own = {name: np.log(block_speedups(plain, trajectories[name], rounds)) for name in choosers}
    return CycleSpeedups(table, single, own)


def oracle_gap(found: CycleSpeedups) -> Interval:
    """Speedup of the best plan per batch size over the best single plan."""
    return speedup_interval(np.exp(found.table - found.single))


def gap_closed(found: CycleSpeedups, name: str) -> GapClosed:
    """How much of the gap a chooser closes; the interval of the share is a percentile bootstrap over cycles."""
    gap, gain = found.table - found.single, found.own[name] - found.single
    over_single = speedup_interval(np.exp(gain))
    if oracle_gap(found).low <= 1.0:
        return GapClosed(over_single, None)
    picks = np.random.default_rng(0).integers(len(gap), size=(_RESAMPLES, len(gap)))
    low, high = np.quantile(gain[picks].sum(1) / np.maximum(gap[picks].sum(1), 1e-9), [0.025, 0.975])
    return GapClosed(over_single, Interval(float(gain.sum() / gap.sum()), float(low), float(high)))


def gap_lines(found: CycleSpeedups) -> list[str]:
    """The oracle gap and each chooser's share of it, over all cycles and over the last half of them, as text."""
    late = found.last_half()
    parts = [("all cycles", found), *([("last half", late)] if len(found.table) // 2 >= _MIN_CYCLES else [])]
    out = []
    for when, part in parts:
        gap = _text(oracle_gap(part))
        out.append(f"oracle headroom: best plan per batch size over best single plan, {when}: {gap}")
        for name in part.own:
            closed = gap_closed(part, name)
            share = "no significant headroom" if closed.share is None else f"closed {_text(closed.share)}"
            out.append(f"  {name}: {_text(closed.over_single)} of the best single plan; {share}")
    return out


def _text(interval: Interval) -> str:
    return str(interval) if interval.high - interval.low < 10.0 else f"{interval.value:.3f} [too few cycles]"
