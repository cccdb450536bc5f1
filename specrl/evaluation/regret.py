"""The oracle gap of a live engine: the best plan per batch size over the best single plan, and the share closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from specrl.core.checks import require
from specrl.core.plan import PLAIN, Plan
from specrl.core.statistics import Interval
from specrl.evaluation.scores import speedup_interval
from specrl.evaluation.trajectory import Floats, PlanSeconds, Trajectory, plan_seconds

_RESAMPLES = 4000
_MIN_CYCLES = 4  # for an interval
_CHOOSER = "chooser "  # begins the key of a chooser

# Log speedups [C] of C cycles of the load, each over plain decoding of the same cycle. Keys: 'table' for the best plan
# per batch size and 'single' for the best single plan, each chosen on all other cycles so that chance adds nothing, and
# 'chooser NAME' for each chooser.
CycleSpeedups = Mapping[str, Floats]


def cycle_speedups(
    trajectories: Mapping[str, Trajectory],
    choosers: Sequence[str],
    plans: Sequence[Plan],
    sizes: Sequence[int],
    rounds: int,
) -> CycleSpeedups:
    """Return the speedups of each cycle of `rounds` rounds.

    Trajectories are those of plain decoding, of every plan by its name, and of the choosers; `sizes` are the batch
    sizes of the load.

    Raises:
        ValueError: fewer than two cycles.
    """
    plain = trajectories[PLAIN]
    count = len(plain) // rounds
    require(count >= 2, "cycles of the load", "at least 2 (raise rounds)", count)
    cycles = [slice(c * rounds, (c + 1) * rounds) for c in range(count)]
    values = [plan_seconds({name: t[part] for name, t in trajectories.items()}, plans, sizes) for part in cycles]
    counts = np.array([[plain[part].at(size).sum() for size in sizes] for part in cycles])[:, :, None]  # rounds
    plain_s = np.array([each.plain_s for each in values]) * counts  # [C, sizes, plans]
    round_s = np.array([each.round_s for each in values]) * counts
    logs = {"table": np.empty(count), "single": np.empty(count)}
    for c in range(count):
        cycle = PlanSeconds(plain_s[c], round_s[c])
        others = PlanSeconds(np.delete(plain_s, c, 0).sum(0), np.delete(round_s, c, 0).sum(0))
        logs["table"][c] = np.log(cycle.speedup(others.best_table()))
        logs["single"][c] = np.log(cycle.speedup(others.best_plan()))
    return logs | {_CHOOSER + name: np.log(trajectories[name].block_speedups(plain, rounds)) for name in choosers}


def concatenate_cycles(parts: Sequence[CycleSpeedups]) -> CycleSpeedups:
    """Join the cycles of several runs."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def oracle_gap(cycles: CycleSpeedups) -> Interval:
    """Return the speedup of the best plan per batch size over the best single plan."""
    return speedup_interval(np.exp(cycles["table"] - cycles["single"]))


def gap_closed(cycles: CycleSpeedups, chooser: str) -> tuple[Interval, Interval | None]:
    """Return a chooser's speedup over the best single plan, and the share of the log gap that it closes.

    The share is None if the interval of the gap contains 1; its interval is a percentile bootstrap over cycles.
    """
    gap, gain = cycles["table"] - cycles["single"], cycles[_CHOOSER + chooser] - cycles["single"]
    over_single = speedup_interval(np.exp(gain))
    if oracle_gap(cycles).low <= 1.0:
        return over_single, None
    picks = np.random.default_rng(0).integers(len(gap), size=(_RESAMPLES, len(gap)))
    low, high = np.quantile(gain[picks].sum(1) / np.maximum(gap[picks].sum(1), 1e-9), [0.025, 0.975])
    return over_single, Interval(float(gain.sum() / gap.sum()), float(low), float(high))


def gap_lines(cycles: CycleSpeedups) -> list[str]:
    """Return the oracle gap and each chooser's share of it as text, over all cycles and over the last half of them."""
    half = len(cycles["table"]) // 2
    parts = {"all cycles": cycles}
    if half >= _MIN_CYCLES:
        parts["last half"] = {name: logs[half:] for name, logs in cycles.items()}
    lines = []
    for when, part in parts.items():
        gap = _text(oracle_gap(part))
        lines.append(f"oracle headroom: best plan per batch size over best single plan, {when}: {gap}")
        for name in (key.removeprefix(_CHOOSER) for key in part if key.startswith(_CHOOSER)):
            over_single, share = gap_closed(part, name)
            closed = "no significant headroom" if share is None else f"closed {_text(share)}"
            lines.append(f"  {name}: {_text(over_single)} of the best single plan; {closed}")
    return lines


def _text(interval: Interval) -> str:
    return str(interval) if interval.high - interval.low < 10.0 else f"{interval.value:.3f} [too few cycles]"
