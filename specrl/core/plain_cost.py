"""The rolling cost of plain decoding, t0(batch size, context), which every speedup is measured against.

For each batch size, t0 is a robust line over context (attention reads more with more context). Only recent samples
count, so the estimate follows a machine that becomes slower or faster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from specrl.core.interfaces import NOT_MEASURED, Session
from specrl.core.round import PlainSample

WINDOW = 48  # samples kept for each batch size
INTERVAL = 24  # rounds between two samples
FIRST_SAMPLES = 3  # samples taken at once at a new batch size
DENSE_SAMPLES = 8  # below so many samples, the next one is taken after `DENSE_INTERVAL` rounds
DENSE_INTERVAL = 2


class PlainEstimate(NamedTuple):
    """Seconds of a plain decoding step, their standard error, and the number of samples behind them."""

    seconds: float
    standard_error: float
    samples: int


@dataclass(slots=True)
class _Cell:
    contexts: deque[float]
    seconds: deque[float]
    since: int = 0  # rounds since the last sample
    line: tuple[float, float, float, float] | None = None  # level, slope, centre, error


class PlainCost:
    """t0(batch size, context) from samples taken between rounds (a `specrl.core.rollout.Baseline`).

    Args:
        window: samples kept for each batch size, at least 4.
        every: rounds between two samples once there are enough; fewer before.

    Raises:
        ValueError: a window below 4, or every below 1.
    """

    def __init__(self, window: int = WINDOW, every: int = INTERVAL) -> None:
        if window < 4 or every < 1:
            raise ValueError(f"window must be at least 4 and every at least 1, but got {window} and {every}")
        self.window, self.every = window, every
        self._cells: dict[int, _Cell] = {}

    def _new_cell(self, contexts: list[float], seconds: list[float]) -> _Cell:
        return _Cell(deque(contexts, maxlen=self.window), deque(seconds, maxlen=self.window))

    def add(self, sample: PlainSample) -> None:
        """Add a measured plain step.

        Raises:
            ValueError: its seconds are not finite and above 0.
        """
        if not (math.isfinite(sample.seconds) and sample.seconds > 0):
            raise ValueError(f"a plain step must take a finite time above 0, but got {sample.seconds} s")
        cell = self._cells.setdefault(sample.batch_size, self._new_cell([], []))
        cell.contexts.append(sample.context)
        cell.seconds.append(sample.seconds)
        cell.since, cell.line = 0, None

    def update(self, session: Session, context: float) -> None:
        """Measure plain decoding between two rounds of a session, if samples are due.

        Raises:
            ValueError: the engine does not measure plain decoding between rounds.
        """
        for _ in range(self.samples_due(session.batch_size)):
            self.add(self.measure(session))

    def measure(self, session: Session) -> PlainSample:
        """One sample of plain decoding on the live requests of a session.

        Raises:
            ValueError: the engine does not measure plain decoding between rounds.
        """
        sample = session.measure_plain()
        if sample is None:
            raise ValueError(NOT_MEASURED)
        return sample

    def samples_due(self, batch_size: int) -> int:
        """Number of samples to take before the next round, which is at this batch size and is counted here.

        Every second round at first, then every `every` rounds.
        """
        cell = self._cells.get(batch_size)
        if cell is None:
            return FIRST_SAMPLES
        cell.since += 1
        return int(cell.since >= (DENSE_INTERVAL if len(cell.seconds) < DENSE_SAMPLES else self.every))

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """t0 at this batch size and mean context.

        Raises:
            ValueError: plain decoding was never measured at this batch size.
        """
        cell = self._cells.get(batch_size)
        if cell is None:
            known = ", ".join(map(str, sorted(self._cells))) or "none"
            raise ValueError(f"plain decoding must be measured at batch size {batch_size} first; measured: {known}")
        if cell.line is None:
            cell.line = _fit(np.array(cell.contexts), np.array(cell.seconds))
        level, slope, centre, error = cell.line
        seconds = level + slope * (context - centre) if slope else level
        return PlainEstimate(max(seconds, 0.5 * level), error, len(cell.seconds))

    def state_dict(self) -> dict[str, Any]:
        """The samples, JSON-able."""
        cells = {str(b): {"contexts": list(c.contexts), "seconds": list(c.seconds)} for b, c in self._cells.items()}
        return {"window": self.window, "every": self.every, "cells": cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._cells = {int(batch): self._new_cell(**cell) for batch, cell in state["cells"].items()}


def _fit(contexts: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float, float]:
    """A line through the samples that are not spikes: level at the centre, slope, centre, standard error."""
    off = seconds - _median_slope(contexts, seconds) * contexts
    off = np.abs(off - np.median(off))
    spread = 1.4826 * np.median(off) + 1e-9
    kept = off <= 3.0 * spread + 0.02 * np.median(seconds)
    x, y = contexts[kept], seconds[kept]
    centre, level = float(x.mean()), float(y.mean())
    moved = x - centre
    slope = 0.0
    if _has_slope(x):
        slope = max(float((moved * (y - level)).sum() / (moved**2).sum()), 0.0)
    residual = y - level - slope * moved
    return level, slope, centre, float(np.sqrt((residual**2).sum() / max(len(y) - 1, 1) / len(y)))


def _has_slope(contexts: np.ndarray) -> bool:
    """Whether the contexts are many and different enough to fit a slope."""
    return len(contexts) >= 8 and bool(np.ptp(contexts) > 0.2 * max(float(contexts.mean()), 1.0))


def _median_slope(contexts: np.ndarray, seconds: np.ndarray) -> float:
    """Median slope between samples far apart, at least 0; robust to spikes (Theil, 1950; Sen, 1968)."""
    if not _has_slope(contexts):
        return 0.0
    apart = contexts - contexts[:, None]  # [n, n]
    far = apart > 0.2 * np.ptp(contexts)
    return max(float(np.median((seconds - seconds[:, None])[far] / apart[far])), 0.0)
