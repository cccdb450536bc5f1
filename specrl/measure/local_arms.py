"""Speculative lanes of the local engine beside plain decoding in its fastest setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import progress, usable_cores
from specrl.measure.machine import torch_threads
from specrl.measure.paired import PLAIN, Measured, Setting, measure
from specrl.models.draft import Draft
from specrl.models.target import Target, load_target

NULL = "A/A"  # plain decoding once more
_DTYPES = ("float32", "bfloat16")  # that plain decoding may be fastest in
_LOOK, _BEHIND = 6, 1.25  # blocks after which settings are given up whose median is so many times the best


@dataclass(frozen=True, slots=True)
class PlainSetting:
    """A way to decode plainly: the median seconds of a step in it."""

    dtype: str
    threads: int
    seconds: float


def measure_plans(
    target_model: Target,
    lanes: Mapping[str, tuple[Draft, Plan]],
    workload: Workload,
    fastest: PlainSetting,
    *,
    target: str,
    batch_size: int,
    max_context: int,
    block_tokens: int,
    precision: float,
    seconds: float,
    use_rejection_sampling: bool = True,
    null: bool = True,
    shares: Mapping[str, float] | None = None,
    each: bool = False,
    reference: str = PLAIN,
    seed: int = 0,
) -> list[Measured]:
    """Plain (in its fastest setting), plain again (A/A, where `null`), and every named draft and plan, taking turns.

    `shares` are tokens of a lane's blocks over those of plain's, 1 where it is not named; `each` is `measure`'s;
    `reference` is the lane that speedups are counted over, and the first.
    """
    engines = {
        id(draft): LocalEngine(
            target_model, draft, max_context=max_context, use_rejection_sampling=use_rejection_sampling
        )
        for draft, _ in lanes.values()
    }
    own = fastest.dtype == str(target_model.dtype).removeprefix("torch.")
    model = target_model if own else load_target(target, device=target_model.device, dtype=fastest.dtype)
    plain = LocalEngine(model, max_context=max_context)
    settings = [Setting(PLAIN, plain, None, fastest.threads)]
    if null:
        settings.append(Setting(NULL, plain, None, fastest.threads))
    settings += [
        Setting(name, engines[id(draft)], plan, fastest.threads, (shares or {}).get(name, 1.0))
        for name, (draft, plan) in lanes.items()
    ]
    settings.sort(key=lambda setting: setting.name != reference)
    results = watched(
        settings,
        workload,
        batch_size=batch_size,
        block_tokens=block_tokens,
        precision=precision,
        seconds=seconds,
        seed=seed,
        each=each,
    )
    for engine in (plain, *engines.values()):
        engine.close()
    return results


def fastest_plain(
    target: str,
    workload: Workload,
    batch_size: int,
    *,
    device: str = "cpu",
    rounds: int = 240,
) -> PlainSetting:
    """The setting of {dtype, threads} in which plain decoding is fastest here, by interleaved medians.

    On a machine that others share, what is fastest changes within seconds where two settings are close, so a short look
    does not tell; settings that are far behind are given up after six blocks.

    Args:
        target: as for `load_target`.
        workload: prompts.
        batch_size: live requests.
        device: 'cpu' or a CUDA device, where threads do not matter.
        rounds: timed in each setting that is not given up, in blocks of ten.
    """
    threads = (1,) if device.startswith("cuda") else tuple(sorted({1, usable_cores()}))
    sessions = {
        dtype: LocalEngine(load_target(target, device=device, dtype=dtype)).start(
            workload, batch_size=batch_size, seed=0, plain=True
        )
        for dtype in _DTYPES
    }
    turns = [(dtype, count) for dtype in _DTYPES for count in threads]
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    for passed in range(max(1, rounds // 10)):
        if passed == _LOOK:
            medians = {turn: float(np.median(times[turn])) for turn in turns}
            turns = [turn for turn in turns if medians[turn] <= _BEHIND * min(medians.values())]
            if len(turns) == 1:
                break
        for dtype, count in turns:
            with torch_threads(count):
                took = [sessions[dtype].round(Plan(0)).seconds for _ in range(12)]
            times[dtype, count] += took[2:]
        turns.reverse()
    for session in sessions.values():
        session.close()
    best = min(turns, key=lambda turn: float(np.median(times[turn])))
    return PlainSetting(*best, float(np.median(times[best])))


def watched(
    settings: Sequence[Setting], workload: Workload, *, batch_size: int, precision: float, seconds: float, **rest: Any
) -> list[Measured]:
    """`measure`, with a bar that tells how wide the widest interval still is; `rest` are its other arguments."""
    wanted = dict(batch_size=batch_size, precision=precision, seconds=seconds, **rest)
    with progress(f"batch {batch_size}", seconds) as advance:
        return measure(
            settings, workload, **wanted, on_block=lambda spent, widest: advance(spent, width(widest, precision))
        )


def width(widest: float, precision: float) -> str:
    """How wide the widest interval still is, for a progress bar."""
    return "" if widest == float("inf") else f"±{widest:.3f}, wanted ±{precision:g}"
