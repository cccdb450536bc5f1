"""The published table's cells, and how much of a round the device is idle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gpu_stages.learn import prompts
from gpu_stages.sizes import PLANS, PRECISION, TEMPERATURE, Sizes
from specrl.config import MeasureConfig, TargetConfig
from specrl.core.clock import Clock
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.io.output import show
from specrl.measure.arms import local_arms
from specrl.measure.paired import measure as measure_arms
from specrl.measure.plain import fastest_plain
from specrl.measure.tables import block_rows, cell_rows
from specrl.models.draft import Draft
from specrl.models.target import Target

_WARM_ROUNDS = 8
_GROUP = 8  # rounds


def measure(model: Target, draft: Draft, target: Path, sizes: Sizes, clock: Clock, deadline: float) -> dict[str, Any]:
    """Every batch size with every plan, in turns with plain decoding, until the deadline; rows and raw blocks."""
    workload, rows, blocks, plain, skipped = prompts(target, sizes, "held_out"), [], [], {}, []
    for left, batch in zip(range(len(sizes.batch_sizes), 0, -1), sizes.batch_sizes, strict=True):
        seconds = (deadline - clock.now()) / left
        if seconds <= 0:
            skipped.append(batch)
            continue
        began = clock.now()
        config = TargetConfig(str(target), device=model.device)
        fastest = fastest_plain(config, workload, batch, rounds=sizes.plain_rounds)
        plain[str(batch)] = {"dtype": fastest.dtype, "threads": fastest.threads, "seconds": fastest.step_s}
        show(f"batch {batch}: fastest plain decoding in {fastest.dtype}")
        arms = local_arms(
            config,
            model,
            {str(plan): (draft, plan) for plan in parse_plans(PLANS)},
            fastest,
            max_context=sizes.prompt_tokens + sizes.new_tokens,
            control=batch == sizes.batch_sizes[0],
        )
        measured = measure_arms(
            arms,
            workload,
            batch_size=batch,
            block_tokens=sizes.new_tokens,
            until=MeasureConfig(PRECISION, max(0.5, seconds - (clock.now() - began))),
        )
        rows += cell_rows({TEMPERATURE: measured})
        blocks += block_rows({TEMPERATURE: measured})
    return {"rows": rows, "blocks": blocks, "fastest_plain": plain, "out_of_time": skipped}


def host_shares(
    model: Target, draft: Draft, target: Path, sizes: Sizes, clock: Clock, deadline: float
) -> dict[str, Any]:
    """Of rounds at the least and the greatest batch size: wall seconds, device-busy seconds, and the share of the rest.

    On a CPU host and device are one, so there is no share.
    """
    if not model.device.startswith("cuda"):
        return {"defined": False, "why": "host and device are one on a CPU", "rows": []}
    rows, skipped = [], []
    for batch in sorted({sizes.batch_sizes[0], sizes.batch_sizes[-1]}):
        for plan in (None, *parse_plans(PLANS)):
            name = "plain" if plan is None else str(plan)
            if rows and clock.now() >= deadline:
                skipped.append(f"batch {batch}, {name}")
                continue
            wall, busy = round_seconds(model, draft, target, sizes, batch, plan)
            rows.append({"batch_size": batch, "plan": name, "wall_s": wall, "busy_s": busy, "share": 1.0 - busy / wall})
    return {"defined": True, "rows": rows, "out_of_time": skipped}


def round_seconds(
    model: Target, draft: Draft, target: Path, sizes: Sizes, batch: int, plan: Plan | None
) -> tuple[float, float]:
    """Seconds of a round, and those of them in which the device was busy, by medians of groups; None: plain decoding.

    The first are measured without the profiler, which slows the host, the second in as many rounds with it. A group in
    which a graph is captured, which runs more than its rounds, is one of many.
    """
    on_gpu = model.device.startswith("cuda")
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    doing, rounds = plan or Plan(0), sizes.host_rounds
    new_tokens = (_WARM_ROUNDS + 2 * rounds) * (doing.num_steps + 1) + 2  # so that no request ends meanwhile
    engine = LocalEngine(model, draft, max_context=sizes.prompt_tokens + new_tokens)
    workload = prompts(target, sizes, "held_out", new_tokens)
    session = engine.start(workload, batch_size=batch, seed=1, plain=plan is None)
    for _ in range(_WARM_ROUNDS):
        session.round(doing)
    wall, busy = [], []
    for _ in range(rounds // _GROUP):
        wall.append(sum(session.round(doing).seconds for _ in range(_GROUP)) / _GROUP)
    for _ in range(rounds // _GROUP):
        with torch.profiler.profile(activities=[activity]) as profiled:
            for _ in range(_GROUP):
                session.round(doing)
        busy.append(busy_seconds(profiled.events(), kind) / _GROUP)
    engine.close()
    return median(wall), median(busy)


def busy_seconds(events: Iterable[Any], device_type: object) -> float:
    """Seconds in which at least one of a profile's events of this device ran."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == device_type)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy * 1e-6
