"""The benchmark of `specrl bench`: every plan against plain decoding, by temperature and batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from specrl.config import DraftConfig, EngineConfig, MeasureConfig, TargetConfig, WorkloadConfig
from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.measure.arms import MakeArms, engine_arms, open_arms
from specrl.measure.paired import AA_CONTROL, Arm, ArmResult, measure
from specrl.simulation.engine import Requests, SimulatedEngine

Cells = Mapping[float | None, Sequence[ArmResult]]  # by temperature; None: a simulation


def bench_engine(
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    *,
    batch_sizes: Sequence[int],
    plans: Sequence[Plan],
    temperatures: Sequence[float],
    until: MeasureConfig,
    use_rejection_sampling: bool = True,
    seed: int = 0,
) -> Cells:
    """Measure on the local engine or on SGLang servers, on prompts held out from training."""
    prompts = {t: replace(workload, temperature=t).open(target.name, "held_out") for t in temperatures}
    new_tokens = workload.max_new_tokens
    with open_arms(engine, target, draft, workload, plans, use_rejection_sampling=use_rejection_sampling) as make:
        return {t: _measure_all(make, p, batch_sizes, new_tokens, until, seed) for t, p in prompts.items()}


def bench_profile(
    engine: SimulatedEngine,
    *,
    batch_sizes: Sequence[int] | None,
    plans: Sequence[Plan] | None,
    until: MeasureConfig,
    seed: int = 0,
) -> Cells:
    """Measure a simulation. All arms have the same random numbers, so that there is no A/A control.

    Args:
        engine: of the profile.
        batch_sizes: None: all that the profile has costs for.
        plans: None: all that the profile has costs for at the batch size.
        until: when to stop; its seconds are of this machine, not simulated ones.
        seed: of the random numbers.
    """
    profile = engine.profile

    def make(requests: Workload, batch: int) -> list[Arm]:
        covered = plans or tuple(plan for plan in profile.plans if profile.covers(plan, batch))
        return engine_arms(engine, covered, control=False)

    requests = Requests((profile.prompt_tokens,) * 2, (profile.max_new_tokens,) * 2)
    sizes = batch_sizes or profile.batch_sizes
    return {None: _measure_all(make, requests, sizes, profile.max_new_tokens, until, seed, WallClock())}


def _measure_all(
    make_arms: MakeArms,
    prompts: Workload,
    batch_sizes: Sequence[int],
    new_tokens: int,
    until: MeasureConfig,
    seed: int,
    clock: Clock | None = None,
) -> list[ArmResult]:
    """Measure arms at every batch size; `clock` measures the time, by default the first engine's."""
    results: list[ArmResult] = []
    for batch in batch_sizes:
        results += measure(
            make_arms(prompts, batch),
            prompts,
            batch_size=batch,
            block_tokens=new_tokens,
            until=until,
            stop_each=True,
            budget_clock=clock,
            seed=seed,
        )
    return results


def warnings(cells: Cells) -> list[str]:
    """A line for every A/A control whose interval does not contain 1; one in twenty does not by chance."""
    return [
        f"batch {m.batch_size}: plain decoding against itself (A/A) is {m.speedup}, which does not contain 1: unless "
        "that is one chance in twenty, something disturbs this machine; see 'specrl doctor'"
        for results in cells.values()
        for m in results
        if m.name == AA_CONTROL and m.speedup is not None and not m.speedup.covers(1.0)
    ]
