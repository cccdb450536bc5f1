"""`specrl bench`: speculative against plain decoding, by batch size, plan and temperature."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from specrl.core.clock import WallClock
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan, parse_plans
from specrl.io.output import OutputDir, hint, show, table
from specrl.measure import tables
from specrl.measure.local_arms import NULL, fastest_plain, measure_plans, watched
from specrl.measure.paired import PLAIN, Measured, Setting
from specrl.measure.sglang_arms import launch, measure_served
from specrl.models.draft import load_draft, new_draft
from specrl.models.target import default_device, load_target
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.workloads.stream import held_out

PLANS = "0,1/1/2,3/1/4,3/2/6"
CHAINS = "0,1/1/2,3/1/4"  # of SGLang, which cannot switch to a tree
BATCH_SIZES = (1, 4, 16)


def bench(
    *,
    engine: Literal["local", "simulated", "sglang"] = "local",
    target: str = "embedded",
    draft: Path | None = None,
    profile: str | None = None,
    batch_sizes: tuple[int, ...] | None = None,
    plans: str | None = None,
    temperatures: tuple[float, ...] = (0.7,),
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    use_rejection_sampling: bool = True,
    device: str | None = None,
    sglang_python: Path | None = None,
    sglang_flags: str = "",
    precision: float = 0.02,
    seconds: float = 60.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Measure the speedup of every plan over plain decoding, at every batch size.

    Plain decoding is decoding without any draft, in the fastest setting of dtype and threads on this machine, and
    takes turns with the plans in one process on the same prompts. The first lane is plain against itself (A/A): its
    interval must cover 1. Prompts are held out from training; their prefill is timed apart and counts for neither.

    In simulation rounds are drawn from a profile, every plan with the same luck, so that there is no A/A; the
    target, prompts and temperatures are the profile's. A profile of a published table gives its tokens/s as all
    tokens over all seconds; the mean over requests, whose luck differs, lies 1 to 3 % above that.

    With SGLang two servers are launched, with and without speculation, and stand still while it is the other's turn.
    Plans are chains, or one tree; they take turns on the same requests, one going on where the other left them.

    Args:
        engine: 'local' decodes here; 'sglang' launches SGLang; 'simulated' draws from a profile.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        profile: simulated: a shipped profile ('aurora-minimax-m2.1') or a .json file.
        batch_sizes: requests decoded together; by default 1,4,16, or all that the profile knows.
        plans: num_steps/topk/num_draft_tokens, separated by commas; 0 drafts nothing but keeps the draft ready. By
            default 0,1/1/2,3/1/4,3/2/6 (SGLang: without the tree), or all that the profile knows.
        temperatures: of sampling; 0 is greedy.
        workload: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        use_rejection_sampling: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
        sglang_python: Python of an environment with SGLang and this package; by default this one.
        sglang_flags: further flags for sglang.launch_server.
        precision: a plan is measured until its 95 % interval has a half-width of at most this.
        seconds: or until this much time is spent at its batch size.
        seed: of prompts and sampling.
        output_dir: where bench.json, .csv and .md, blocks.csv and bench_speculative.jsonl (in the terms of SGLang's
            script of that name) go; by default runs/bench-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl bench --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4,3/2/6 --draft runs/quickstart/draft
        specrl bench --engine simulated --profile aurora-minimax-m2.1
        specrl bench --engine sglang --plans 0,1/1/2,3/1/4 --sglang_python ../sglang/bin/python
    """
    if not 0 < precision < 1 or not 0 < seconds < float("inf"):
        raise ValueError(f"precision must be in (0, 1) and seconds above 0, but got {precision} and {seconds}")
    if batch_sizes is not None and (not batch_sizes or min(batch_sizes) < 1):
        raise ValueError(f"batch_sizes must be numbers of at least 1, but got {list(batch_sizes)}; for example 1,4,16")
    if len(set(temperatures)) < max(1, len(temperatures)) or not all(0 <= t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures must be different numbers of at least 0, but got {list(temperatures)}")
    if (profile is None) == (engine == "simulated"):
        raise ValueError(f"a profile goes with the simulated engine, but got engine {engine!r} and profile {profile!r}")
    parsed = None if plans is None else parse_plans(plans)
    prompts = partial(held_out, workload, target, prompt_tokens, max_new_tokens)
    cells: dict[float | None, list[Measured]] = {}
    measured: dict[str, object] = {"engine": engine, "seed": seed, "precision": precision}
    if profile is not None:
        simulated = SimulatedEngine(profile)
        what, max_new_tokens = simulated.profile.name, simulated.profile.max_new_tokens
        measured |= {"profile": what, "source": simulated.profile.provenance["source"]}
        cells[None] = _simulated(simulated, batch_sizes, parsed, precision=precision, seconds=seconds, seed=seed)
    else:
        what = target
        measured |= {"target": target, "draft": draft, "workload": workload, "prompt_tokens": prompt_tokens}
    if engine == "sglang":
        cells = _sglang(
            target,
            draft,
            batch_sizes or BATCH_SIZES,
            parsed or parse_plans(CHAINS),
            {temperature: prompts(temperature) for temperature in temperatures},
            max_new_tokens=max_new_tokens,
            python=sglang_python,
            flags=shlex.split(sglang_flags),
            precision=precision,
            seconds=seconds,
            seed=seed,
        )
    elif engine == "local":
        for temperature in temperatures:
            cells[temperature] = _local(
                target,
                draft,
                batch_sizes or BATCH_SIZES,
                parsed or parse_plans(PLANS),
                prompts(temperature),
                prompt_tokens=prompt_tokens,
                max_new_tokens=max_new_tokens,
                use_rejection_sampling=use_rejection_sampling,
                device=device,
                precision=precision,
                seconds=seconds,
                seed=seed,
            )
    for at, results in cells.items():
        lines = [{**row, "shown": tables.shown(row)} for row in tables.cell_rows({at: results})]
        show(table(lines, tables.COLUMNS, title=f"{what}, simulated" if at is None else f"{what}, temperature {at:g}"))
    _say_what_does_not_hold(cells)
    if output_dir is not None:
        directory = OutputDir(output_dir)
        tables.write(directory, cells, title=what, measured=measured, new_tokens=max_new_tokens)
        show(f"written: {directory.path}/bench.json, .csv, .md, blocks.csv, bench_speculative.jsonl")
        show(hint(directory.path))
    return tables.cell_rows(cells)


def _local(
    target: str,
    draft: Path | None,
    batch_sizes: tuple[int, ...],
    plans: tuple[Plan, ...],
    source: Workload,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    use_rejection_sampling: bool,
    device: str | None,
    precision: float,
    seconds: float,
    seed: int,
) -> list[Measured]:
    """The local engine's lanes at one temperature."""
    device = default_device(device)
    model = load_target(target, device=device)
    drafted = load_draft(draft) if draft is not None else new_draft(model, intermediate_size=256)
    results: list[Measured] = []
    for batch in batch_sizes:
        fastest = fastest_plain(target, source, batch, device=device)
        show(f"batch {batch}: fastest plain decoding in {fastest.dtype} with {fastest.threads} threads")
        results += measure_plans(
            model,
            {str(plan): (drafted, plan) for plan in plans},
            source,
            fastest,
            target=target,
            batch_size=batch,
            max_context=prompt_tokens + max_new_tokens,
            block_tokens=max_new_tokens,
            precision=precision,
            seconds=seconds,
            use_rejection_sampling=use_rejection_sampling,
            each=True,
            seed=seed,
        )
    return results


def _sglang(
    target: str,
    draft: Path | None,
    batch_sizes: tuple[int, ...],
    plans: tuple[Plan, ...],
    sources: Mapping[float, Workload],
    *,
    max_new_tokens: int,
    python: Path | None,
    flags: list[str],
    precision: float,
    seconds: float,
    seed: int,
) -> dict[float | None, list[Measured]]:
    """The servers' lanes at every temperature."""
    cells: dict[float | None, list[Measured]] = {}
    show("launching SGLang with speculation, and without")
    engine = launch(target, draft, plans, python, flags)
    try:
        for temperature, source in sources.items():
            cells[temperature] = []
            for batch in batch_sizes:
                cells[temperature] += measure_served(
                    engine,
                    plans,
                    source,
                    batch_size=batch,
                    block_tokens=max_new_tokens,
                    precision=precision,
                    seconds=seconds,
                    seed=seed,
                )
    finally:
        engine.close()
    return cells


def _simulated(
    engine: SimulatedEngine,
    batch_sizes: tuple[int, ...] | None,
    plans: tuple[Plan, ...] | None,
    *,
    precision: float,
    seconds: float,
    seed: int,
) -> list[Measured]:
    """A profile's lanes; `seconds` are ours, not the simulated ones. By default every cell that the profile covers."""
    profile = engine.profile
    lengths = [(n, n) for n in (profile.prompt_tokens, profile.max_new_tokens)]
    results: list[Measured] = []
    for batch in batch_sizes or profile.batch_sizes:
        here = plans or tuple(plan for plan in profile.plans if profile.covers(plan, batch))
        settings = [Setting(PLAIN, engine, None), *(Setting(str(plan), engine, plan) for plan in here)]
        results += watched(
            settings,
            Requests(lengths[0], lengths[1]),
            batch_size=batch,
            block_tokens=profile.max_new_tokens,
            precision=precision,
            seconds=seconds,
            seed=seed,
            each=True,
            budget_clock=WallClock(),
        )
    return results


def _say_what_does_not_hold(cells: tables.Cells) -> None:
    """A/A intervals that miss 1 (one in twenty does by chance), and what is wider than asked."""
    for m in (m for results in cells.values() for m in results):
        if m.name == NULL and m.speedup is not None and not m.speedup.covers(1.0):
            show(
                f"batch {m.batch_size}: plain decoding against itself (A/A) is {m.speedup}, which does not cover 1: "
                "unless that is one chance in twenty, something disturbs this machine; see 'specrl doctor'"
            )
