"""The arms of a measurement: plain decoding, its A/A control, and plans of one engine or of several drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.interfaces import Engine, Workload
from specrl.core.plan import PLAIN, Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import show
from specrl.measure.paired import AA_CONTROL, Arm
from specrl.measure.plain import PlainSetting, fastest_plain
from specrl.models.draft import Draft
from specrl.models.target import Target

MakeArms = Callable[[Workload, int], list[Arm]]  # (prompts, batch size) -> arms, plain decoding first


def engine_arms(engine: Engine, plans: Sequence[Plan], *, control: bool) -> list[Arm]:
    """Return arms for plain decoding, its A/A control if asked for, and each plan, all of one engine."""
    return [*_plain_arms(engine, control), *(Arm(str(plan), engine, plan) for plan in plans)]


def _plain_arms(engine: Engine, control: bool, threads: int | None = None) -> list[Arm]:
    return [Arm(name, engine, None, threads) for name in ([PLAIN, AA_CONTROL] if control else [PLAIN])]


def local_arms(
    target: TargetConfig,
    model: Target,
    drafted: Mapping[str, tuple[Draft, Plan]],
    fastest: PlainSetting,
    *,
    max_context: int,
    use_rejection_sampling: bool = True,
    control: bool = False,
    block_sizes: Mapping[str, float] | None = None,
) -> list[Arm]:
    """Return arms for plain decoding in its fastest setting, and for drafts with their plans, on local engines.

    Args:
        target: loaded again if plain decoding is faster in another dtype.
        model: the loaded target.
        drafted: name of the arm -> draft and plan.
        fastest: the setting of plain decoding; its threads are used by all arms.
        max_context: maximum tokens of a request.
        use_rejection_sampling: see `specrl.LocalEngine`.
        control: add the A/A control.
        block_sizes: name of the arm -> `Arm.block_size`; 1 for others.
    """
    same_dtype = fastest.dtype == str(model.dtype).removeprefix("torch.")
    baseline = model if same_dtype else replace(target, dtype=fastest.dtype).load(device=model.device)
    arms = _plain_arms(LocalEngine(baseline, max_context=max_context), control, fastest.threads)
    engines = {
        id(draft): LocalEngine(model, draft, max_context=max_context, use_rejection_sampling=use_rejection_sampling)
        for draft, _ in drafted.values()
    }
    for name, (draft, plan) in drafted.items():
        arms.append(Arm(name, engines[id(draft)], plan, fastest.threads, (block_sizes or {}).get(name, 1.0)))
    return arms


def open_engine(
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    plans: Sequence[Plan],
    *,
    use_rejection_sampling: bool = True,
) -> Engine:
    """Open an engine that also measures plain decoding; close it after use.

    Raises:
        ValueError: plans or a draft that the engine cannot run, or settings of a new draft with SGLang.
    """
    model = target.load() if engine.is_local else None
    if model is None:
        show("launching SGLang with speculation, and without")
        for name in ("vocab_size", "intermediate_size"):
            if (size := getattr(draft, name)) is not None:
                raise ValueError(f"draft.{name} is for the local engine, but got {size} with {engine.name!r}")
    return engine.open(
        target,
        draft.path if model is None else draft.load(model),
        plans=plans,
        max_context=workload.max_context,
        model=model,
        use_rejection_sampling=use_rejection_sampling,
        plain_in_lockstep=True,
    )


@contextmanager
def open_arms(
    engine: EngineConfig,
    target: TargetConfig,
    draft: DraftConfig,
    workload: WorkloadConfig,
    plans: Sequence[Plan],
    *,
    use_rejection_sampling: bool = True,
) -> Iterator[MakeArms]:
    """Open an engine, and yield a function that returns its arms: plain decoding, the A/A control and all plans.

    On the local engine, the function first finds the fastest setting of plain decoding at the batch size.
    """
    if not engine.is_local:
        served = open_engine(engine, target, draft, workload, plans)
        try:
            yield lambda prompts, batch: engine_arms(served, plans, control=True)
        finally:
            served.close()
        return
    model = target.load()
    drafted = draft.load(model)

    def make(prompts: Workload, batch: int) -> list[Arm]:
        fastest = fastest_plain(replace(target, device=model.device), prompts, batch)
        show(f"batch {batch}: fastest plain decoding in {fastest.dtype} with {fastest.threads} threads")
        return local_arms(
            target,
            model,
            {str(plan): (drafted, plan) for plan in plans},
            fastest,
            max_context=workload.max_context,
            use_rejection_sampling=use_rejection_sampling,
            control=True,
        )

    yield make
