"""Times plain decoding in several dtypes and numbers of threads, in turns, to find the fastest setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from specrl.config import DTypeName, TargetConfig
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import progress
from specrl.measure.machine import torch_threads, usable_cores
from specrl.models.target import default_device

DTYPES: tuple[DTypeName, ...] = ("float32", "bfloat16")
_BLOCK_ROUNDS, _UNCOUNTED_ROUNDS = 10, 2  # between two changes of the setting; the uncounted ones come first
_DROP_AFTER, _DROP_ABOVE = 6, 1.25  # after so many blocks, drop settings whose median is so many times the best


@dataclass(frozen=True, slots=True)
class PlainSetting:
    """A setting of plain decoding, and the median seconds of a step."""

    dtype: DTypeName
    threads: int
    batch_size: int
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all requests together."""
        return self.batch_size / self.step_s


def time_plain(
    target: TargetConfig,
    workload: Workload,
    *,
    dtypes: Sequence[DTypeName],
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    seconds: float = math.inf,
    rounds: int | None = None,
    drop_slow: bool = False,
) -> list[PlainSetting]:
    """Time plain decoding in every setting, in turns and alternating order, so that a drift affects all equally.

    Args:
        target: the model; its dtype is not used.
        workload: prompts.
        dtypes: of the model.
        threads: torch threads.
        batch_sizes: live requests.
        seconds: at most, of all settings together; each is timed for one block at least.
        rounds: at most, of each setting.
        drop_slow: after six blocks, drop settings that are much slower than the fastest one; stop if one is left.
    """
    engines = {dtype: LocalEngine(replace(target, dtype=dtype).load()) for dtype in dtypes}
    sessions = {
        (dtype, batch): engines[dtype].start(workload, batch_size=batch, seed=0, plain=True)
        for dtype in dtypes
        for batch in batch_sizes
    }
    order = [(dtype, count, batch) for dtype, batch in sessions for count in threads]
    times: dict[tuple[DTypeName, int, int], list[float]] = {setting: [] for setting in order}
    max_blocks = math.inf if rounds is None else max(1, rounds // _BLOCK_ROUNDS)
    clock, blocks = engines[dtypes[0]].clock, 0
    with progress("timing plain decoding", min(seconds, max_blocks)) as advance:
        began = clock.now()
        while blocks == 0 or (blocks < max_blocks and clock.now() - began < seconds):
            if drop_slow and blocks == _DROP_AFTER:
                medians = {setting: float(np.median(times[setting])) for setting in order}
                order = [setting for setting in order if medians[setting] <= _DROP_ABOVE * min(medians.values())]
                if len(order) == 1:
                    break
            for dtype, count, batch in order:
                with torch_threads(count):
                    session = sessions[dtype, batch]
                    timed = [session.round(Plan(0)).seconds for _ in range(_UNCOUNTED_ROUNDS + _BLOCK_ROUNDS)]
                times[dtype, count, batch] += timed[_UNCOUNTED_ROUNDS:]
            order.reverse()
            blocks += 1
            advance(clock.now() - began if rounds is None else blocks)
    for session in sessions.values():
        session.close()
    return [PlainSetting(*setting, step_s=float(np.median(times[setting]))) for setting in times if setting in order]


def fastest_plain(target: TargetConfig, workload: Workload, batch_size: int, *, rounds: int = 240) -> PlainSetting:
    """Return the dtype and number of threads in which plain decoding is fastest on this machine, by medians.

    On a shared machine the faster of two similar settings changes within seconds, so a short measurement is not enough.
    `rounds` are timed in each setting, except for much slower ones.
    """
    on_gpu = default_device(target.device).startswith("cuda")
    threads = (1,) if on_gpu else tuple(sorted({1, usable_cores()}))
    settings = time_plain(
        target, workload, dtypes=DTYPES, threads=threads, batch_sizes=(batch_size,), rounds=rounds, drop_slow=True
    )
    return min(settings, key=lambda setting: setting.step_s)


def thread_counts(cores: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and all cores."""
    return tuple(sorted({cores, *(1 << i for i in range(cores.bit_length()))}))


def settings_table(
    settings: Sequence[PlainSetting], batch_sizes: Sequence[int]
) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return a row for each dtype and thread count with columns for every batch size, and the headings."""
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for s in settings:
        row = rows.setdefault((s.dtype, s.threads), {"dtype": s.dtype, "threads": s.threads})
        row |= {f"ms {s.batch_size}": s.step_s * 1e3, f"tps {s.batch_size}": s.tokens_per_s}
    headings = {"dtype": "dtype", "threads": "threads"}
    for batch in batch_sizes:
        headings |= {f"ms {batch}": f"ms/step, batch {batch}", f"tps {batch}": f"tokens/s, batch {batch}"}
    return list(rows.values()), headings
