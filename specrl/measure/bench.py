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
Prompts = Mapping[float | None, Workload]  # likewise


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
    """Measure the local engine or SGLang servers on prompts held out from training."""
    prompts: Prompts = {t: replace(workload, temperature=t).open(target.name, "held_out") for t in temperatures}
    with open_arms(engine, target, draft, workload, plans, use_rejection_sampling=use_rejection_sampling) as make:
        return _measure_all(make, prompts, batch_sizes, workload.max_new_tokens, until, seed)


def bench_profile(
    engine: SimulatedEngine,
    *,
    batch_sizes: Sequence[int] | None,
    plans: Sequence[Plan] | None,
    until: MeasureConfig,
    seed: int = 0,
) -> Cells:
    """Measure a simulation. All arms have the same random numbers, so an A/A control would show nothing.

    Batch sizes and plans that are None are all that the profile has costs for. `until.seconds` are real ones.
    """
    profile = engine.profile

    def make(requests: Workload, batch: int) -> list[Arm]:
        covered = plans or tuple(plan for plan in profile.plans if profile.covers(plan, batch))
        return engine_arms(engine, covered, control=False)

    requests: Prompts = {None: Requests.of(profile)}
    sizes = batch_sizes or profile.batch_sizes
    return _measure_all(make, requests, sizes, profile.max_new_tokens, until, seed, WallClock())


def _measure_all(
    make_arms: MakeArms,
    prompts: Prompts,
    batch_sizes: Sequence[int],
    new_tokens: int,
    until: MeasureConfig,
    seed: int,
    clock: Clock | None = None,
) -> Cells:
    """Measure at every temperature and batch size; `clock` measures `until.seconds`, by default the engine's clock."""
    cells: dict[float | None, list[ArmResult]] = {temperature: [] for temperature in prompts}
    for temperature, requests in prompts.items():
        for batch in batch_sizes:
            cells[temperature] += measure(
                make_arms(requests, batch),
                requests,
                batch_size=batch,
                block_tokens=new_tokens,
                until=until,
                stop_each=True,
                budget_clock=clock,
                seed=seed,
            )
    return cells


def warnings(cells: Cells) -> list[str]:
    """Return a line for every A/A control whose interval does not contain 1; one in twenty does not by chance."""
    return [
        f"batch {m.batch_size}: plain decoding against itself (A/A) is {m.speedup}, which does not contain 1. This "
        "happens by chance once in twenty times; otherwise the machine is disturbed, see 'specrl doctor'"
        for results in cells.values()
        for m in results
        if m.name == AA_CONTROL and m.speedup is not None and not m.speedup.covers(1.0)
    ]
