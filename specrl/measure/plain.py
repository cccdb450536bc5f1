"""Plain decoding in several settings of dtype and threads, in turns: which one is fastest on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from specrl.config import DTypeName, TargetConfig
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import progress
from specrl.measure.machine import Finding, torch_threads, usable_cores
from specrl.models.target import default_device

DTYPES: tuple[DTypeName, ...] = ("float32", "bfloat16")
_BLOCK_ROUNDS, _UNCOUNTED_ROUNDS = 10, 2  # timed between two changes of the setting, after some that are not
_LOOK_AFTER, _TOO_SLOW = 6, 1.25  # blocks after which a setting is dropped if its median is so many times the best


@dataclass(frozen=True, slots=True)
class PlainSetting:
    """A setting of plain decoding, and the median seconds of a step in it."""

    dtype: DTypeName
    threads: int
    batch_size: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together."""
        return self.batch_size / self.step_s


class PlainTimer:
    """Times plain decoding in every setting, in turns, so that a drift of the machine affects all equally.

    Args:
        target: the model; its dtype is not used.
        workload: prompts.
        dtypes: of the model.
        threads: torch threads.
        batch_sizes: live requests.
    """

    def __init__(
        self,
        target: TargetConfig,
        workload: Workload,
        *,
        dtypes: Sequence[DTypeName],
        threads: Sequence[int],
        batch_sizes: Sequence[int],
    ) -> None:
        engines = {dtype: LocalEngine(replace(target, dtype=dtype).load()) for dtype in dtypes}
        self.clock = engines[dtypes[0]].clock
        self._sessions = {
            (dtype, batch): engines[dtype].start(workload, batch_size=batch, seed=0, plain=True)
            for dtype in dtypes
            for batch in batch_sizes
        }
        self._order = [(dtype, count, batch) for dtype, batch in self._sessions for count in threads]
        self._seconds: dict[tuple[DTypeName, int, int], list[float]] = {setting: [] for setting in self._order}

    def run_pass(self) -> None:
        """Time a block of every setting, in the reverse order of the pass before."""
        for setting in self._order:
            dtype, threads, batch = setting
            session = self._sessions[dtype, batch]
            with torch_threads(threads):
                seconds = [session.round(Plan(0)).seconds for _ in range(_UNCOUNTED_ROUNDS + _BLOCK_ROUNDS)]
            self._seconds[setting] += seconds[_UNCOUNTED_ROUNDS:]
        self._order.reverse()

    def drop_slow(self) -> int:
        """Drop the settings that are much slower than the fastest one; returns how many are left."""
        medians = {setting: float(np.median(self._seconds[setting])) for setting in self._order}
        self._order = [setting for setting in self._order if medians[setting] <= _TOO_SLOW * min(medians.values())]
        return len(self._order)

    def settings(self) -> list[PlainSetting]:
        """The settings that were not dropped."""
        return [
            PlainSetting(*setting, step_s=float(np.median(seconds)))
            for setting, seconds in self._seconds.items()
            if setting in self._order
        ]

    def close(self) -> None:
        """Close all sessions."""
        for session in self._sessions.values():
            session.close()


def fastest_plain(target: TargetConfig, workload: Workload, batch_size: int, *, rounds: int = 240) -> PlainSetting:
    """The setting of {dtype, threads} in which plain decoding is fastest here, by interleaved medians.

    On a shared machine the faster of two similar settings changes within seconds, so a short look is not enough.
    Settings that are much slower are dropped after six blocks.

    Args:
        target: the model; its dtype is not used.
        workload: prompts.
        batch_size: live requests.
        rounds: timed in each setting that is not dropped, in blocks of ten.
    """
    on_gpu = default_device(target.device).startswith("cuda")
    threads = (1,) if on_gpu else tuple(sorted({1, usable_cores()}))
    timer = PlainTimer(target, workload, dtypes=DTYPES, threads=threads, batch_sizes=(batch_size,))
    for passes in range(max(1, rounds // _BLOCK_ROUNDS)):
        if passes == _LOOK_AFTER and timer.drop_slow() == 1:
            break
        timer.run_pass()
    timer.close()
    return min(timer.settings(), key=lambda setting: setting.step_s)


def time_plain(
    target: TargetConfig,
    workload: Workload,
    *,
    dtypes: Sequence[DTypeName],
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    seconds: float,
) -> list[PlainSetting]:
    """Time plain decoding in every setting for `seconds`, at least one block each."""
    timer = PlainTimer(target, workload, dtypes=dtypes, threads=threads, batch_sizes=batch_sizes)
    began = timer.clock.now()
    with progress("timing plain decoding", seconds) as advance:
        timer.run_pass()
        while (spent := timer.clock.now() - began) < seconds:
            advance(spent)
            timer.run_pass()
    timer.close()
    return timer.settings()


def check_fastest(settings: Sequence[PlainSetting], batch_size: int) -> Finding:
    """The fastest setting at a batch size, which speedups are measured against."""
    ranked = sorted((s for s in settings if s.batch_size == batch_size), key=lambda setting: setting.step_s)
    best, ratio = ranked[0], ranked[-1].step_s / ranked[0].step_s
    found = f"{best.dtype}, threads {best.threads}: {best.tokens_per_s:,.0f} tokens/s"
    return Finding(f"fastest at batch {batch_size}", found, True, f"the slowest setting takes {ratio:.1f}× as long")


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all cores."""
    return tuple(sorted({cores, *(1 << i for i in range(cores.bit_length()))}))


def settings_table(
    settings: Sequence[PlainSetting], batch_sizes: Sequence[int]
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """A row for each dtype and thread count, with columns for every batch size; and the headings of the columns."""
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for s in settings:
        row = rows.setdefault((s.dtype, s.threads), {"dtype": s.dtype, "threads": s.threads})
        row |= {f"ms {s.batch_size}": s.step_s * 1e3, f"tps {s.batch_size}": s.tokens_per_s}
    headings = {"dtype": "dtype", "threads": "threads"}
    for batch in batch_sizes:
        headings |= {f"ms {batch}": f"ms/step, batch {batch}", f"tps {batch}": f"tokens/s, batch {batch}"}
    return list(rows.values()), headings
