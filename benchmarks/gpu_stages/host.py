"""The host's share of a round: the time in which the GPU waits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch

from gpu_stages.stage import PLANS, Stage
from specrl.config import TargetConfig
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.models.draft import Draft, load_draft
from specrl.models.target import Target

_WARM_UP_ROUNDS, _GROUP_ROUNDS = 8, 8


def host(stage: Stage) -> None:
    """Write host.json: the host's share of rounds at the smallest and the largest batch size.

    There are no rows on a CPU, where host and device are the same.
    """
    rows: list[dict[str, Any]] = []
    stage.write("host", rows)
    if not stage.device.startswith("cuda"):
        return
    target = TargetConfig(str(stage.target), "bfloat16", stage.device).load()
    draft, batch_sizes = load_draft(stage.draft), stage.sizes.batch_sizes
    for batch, plan in product((batch_sizes[0], batch_sizes[-1]), (None, *parse_plans(PLANS))):
        if rows and not stage.seconds_left:
            break
        wall_s, busy_s = round_seconds(stage, target, draft, batch, plan)
        seconds = {"wall_s": wall_s, "busy_s": busy_s, "host_share": 1.0 - busy_s / wall_s}
        rows.append({"batch_size": batch, "plan": str(plan or "plain"), **seconds})
        stage.write("host", rows)


def round_seconds(
    stage: Stage, target: Target, draft: Draft, batch: int, plan: Plan | None, groups: int = 4
) -> tuple[float, float]:
    """Seconds of a round, and those in which the device was busy: medians over groups of rounds.

    The former are measured without the profiler, which slows the host. On a CPU operations count as kernels. With
    `plan` None decoding is plain.
    """
    kind = "CUDA" if target.device.startswith("cuda") else "CPU"
    activities = [getattr(torch.profiler.ProfilerActivity, kind)]
    run, rounds = plan or Plan(0), _WARM_UP_ROUNDS + 2 * groups * _GROUP_ROUNDS
    workload = replace(stage.sizes.workload, max_new_tokens=rounds * (run.num_steps + 1) + 2)  # no request ends
    engine = LocalEngine(target, draft, max_context=workload.max_context)
    prompts = workload.open(str(stage.target), "held_out")
    session = engine.start(prompts, batch_size=batch, seed=1, plain=plan is None)
    for _ in range(_WARM_UP_ROUNDS):
        session.round(run)
    wall_s, busy_s = list[float](), list[float]()
    for _ in range(groups):
        wall_s.append(sum(session.round(run).seconds for _ in range(_GROUP_ROUNDS)) / _GROUP_ROUNDS)
    for _ in range(groups):
        with torch.profiler.profile(activities=activities) as profiled:
            for _ in range(_GROUP_ROUNDS):
                session.round(run)
        busy_s.append(busy_seconds(profiled.events(), getattr(torch.autograd.DeviceType, kind)) / _GROUP_ROUNDS)
    engine.close()
    return median(wall_s), median(busy_s)


def busy_seconds(events: Iterable[Any], device_type: object) -> float:
    """Seconds in which at least one of a profile's events ran on this type of device."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.device_type == device_type)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy * 1e-6
