"""The rolling cost of plain decoding, t0(batch size, context), which every speedup is measured against.

For each batch size, t0 is a robust line over context (attention reads more with more context). Only recent samples
count, so the estimate follows a machine that becomes slower or faster.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from specrl.core.checks import require
from specrl.core.interfaces import NOT_MEASURED, Session
from specrl.core.round import PlainSample

WINDOW = 48  # samples kept for each batch size
INTERVAL = 24  # rounds between two samples
FIRST_SAMPLES = 3  # samples taken at once at a new batch size
DENSE_SAMPLES = 8  # with fewer samples, the next one is taken after `DENSE_INTERVAL` rounds
DENSE_INTERVAL = 2


class PlainEstimate(NamedTuple):
    """Seconds of a plain decoding step, their standard error, and the number of samples behind them."""

    seconds: float
    standard_error: float
    samples: int


@dataclass(slots=True)
class _Samples:
    """The samples of one batch size, and the line through them."""

    contexts: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    since: int = 0  # rounds since the last sample
    line: tuple[float, float, float, float] | None = None  # level, slope, centre, error


class PlainCost:
    """t0(batch size, context) from samples taken between rounds (a `specrl.core.rollout.Baseline`)."""

    def __init__(self) -> None:
        self._samples: dict[int, _Samples] = {}  # by batch size

    def add(self, sample: PlainSample) -> None:
        """Add a measured plain step, of finite seconds above 0."""
        require(0 < sample.seconds < math.inf, "seconds of a plain step", "finite and above 0", sample.seconds)
        known = self._samples.setdefault(sample.batch_size, _Samples())
        known.contexts.append(sample.context)
        known.seconds.append(sample.seconds)
        known.since, known.line = 0, None

    def update(self, session: Session, context: float) -> None:
        """Measure plain decoding between two rounds of a session, if samples are due; errors are those of `measure`."""
        for _ in range(self.samples_due(session.batch_size)):
            self.add(self.measure(session))

    def measure(self, session: Session) -> PlainSample:
        """Measure one step of plain decoding on the live requests; raises ValueError if the engine cannot."""
        sample = session.measure_plain()
        if sample is None:
            raise ValueError(NOT_MEASURED)
        return sample

    def samples_due(self, batch_size: int) -> int:
        """Count a round at this batch size, and return the number of samples to take before it."""
        known = self._samples.get(batch_size)
        if known is None:
            return FIRST_SAMPLES
        known.since += 1
        return int(known.since >= (DENSE_INTERVAL if len(known.seconds) < DENSE_SAMPLES else INTERVAL))

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """Return t0 at this batch size and mean context; raises ValueError if this batch size was never measured."""
        known = self._samples.get(batch_size)
        if known is None:
            measured = ", ".join(map(str, sorted(self._samples))) or "none"
            raise ValueError(f"plain decoding must be measured at batch size {batch_size} first; measured: {measured}")
        if known.line is None:
            known.line = _fit(np.array(known.contexts), np.array(known.seconds))
        level, slope, centre, error = known.line
        seconds = level + slope * (context - centre) if slope else level
        return PlainEstimate(max(seconds, 0.5 * level), error, len(known.seconds))

    def state_dict(self) -> dict[str, Any]:
        """Return the samples, JSON-able."""
        cells = {str(b): {"contexts": list(s.contexts), "seconds": list(s.seconds)} for b, s in self._samples.items()}
        return {"cells": cells}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._samples = {int(batch): _Samples() for batch in state["cells"]}
        for batch, cell in state["cells"].items():
            self._samples[int(batch)].contexts.extend(cell["contexts"])
            self._samples[int(batch)].seconds.extend(cell["seconds"])


def _fit(contexts: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float, float]:
    """Fit a line to the samples that are not spikes: level at the centre, slope, centre, standard error."""
    residual = seconds - _median_slope(contexts, seconds) * contexts
    residual = np.abs(residual - np.median(residual))
    spread = 1.4826 * np.median(residual) + 1e-9
    usual = residual <= 3.0 * spread + 0.02 * np.median(seconds)
    x, y = contexts[usual], seconds[usual]
    centre, level = float(x.mean()), float(y.mean())
    x -= centre
    slope = max(float((x * (y - level)).sum() / (x**2).sum()), 0.0) if _has_slope(contexts[usual]) else 0.0
    residual = y - level - slope * x
    return level, slope, centre, float(np.sqrt((residual**2).sum() / max(len(y) - 1, 1) / len(y)))


def _has_slope(contexts: np.ndarray) -> bool:
    """Whether there are enough different contexts to fit a slope."""
    return len(contexts) >= 8 and bool(np.ptp(contexts) > 0.2 * max(float(contexts.mean()), 1.0))


def _median_slope(contexts: np.ndarray, seconds: np.ndarray) -> float:
    """Return the median slope between distant contexts, at least 0; robust to spikes (Theil, 1950; Sen, 1968)."""
    if not _has_slope(contexts):
        return 0.0
    distance = contexts - contexts[:, None]  # [n, n]
    far = distance > 0.2 * np.ptp(contexts)
    return max(float(np.median((seconds - seconds[:, None])[far] / distance[far])), 0.0)
