"""`specrl bench`: speculative against plain decoding, by batch size, plan and temperature."""

from __future__ import annotations

from pathlib import Path

from specrl.config import (
    DraftConfig,
    EngineConfig,
    MeasureConfig,
    TargetConfig,
    WorkloadConfig,
    check_batch_sizes,
    check_temperatures,
)
from specrl.core.plan import parse_plans
from specrl.io.output import OutputDir, hint, show, table
from specrl.measure.bench import Cells, bench_engine, bench_profile, warnings
from specrl.measure.tables import COLUMNS, cell_rows, shown, write_bench
from specrl.simulation.engine import SimulatedEngine

PLANS = "0,1/1/2,3/1/4,3/2/6"
CHAINS = "0,1/1/2,3/1/4"  # SGLang cannot switch between chains and trees
BATCH_SIZES = (1, 4, 16)


def bench(
    *,
    engine: EngineConfig = EngineConfig(),
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    measure: MeasureConfig = MeasureConfig(),
    profile: str | None = None,
    batch_sizes: tuple[int, ...] | None = None,
    plans: str | None = None,
    temperatures: tuple[float, ...] | None = None,
    use_rejection_sampling: bool = True,
    seed: int = 0,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """Measure the speedup of every plan over plain decoding, at every batch size.

    Plain decoding is decoding without a draft, in the fastest setting of dtype and threads on this machine. It
    alternates with the plans in one process, on the same prompts, which are held out from training. The first arm
    measures plain decoding against itself (A/A); its interval must contain 1. Prefill is timed separately and is in
    no speedup.

    With --engine sglang two servers are launched, with and without speculation. Each is idle while the other one is
    measured. Plans are chains, or one tree; each continues the requests where the one before left them.

    With --profile rounds are simulated, with the same random numbers for every plan and without A/A; target, prompts
    and temperature are the profile's. Simulated tokens/s of a published table are all tokens over all seconds; the
    mean over requests is 1 to 3 % higher.

    Args:
        engine: decodes.
        target: the target model.
        draft: the draft model; a random one accepts next to nothing.
        workload: the prompts.
        measure: how long to measure, for each batch size.
        profile: simulate this profile: a name such as 'aurora-minimax-m2.1', or a .json file.
        batch_sizes: requests decoded together; by default 1,4,16, or all of the profile.
        plans: num_steps/topk/num_draft_tokens, separated by commas; by default 0,1/1/2,3/1/4,3/2/6 (SGLang: without
            the tree), or all of the profile. Plan 0 drafts nothing but keeps the draft ready.
        temperatures: measured one after the other; by default workload.temperature.
        use_rejection_sampling: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        seed: of prompts and sampling.
        output_dir: where bench.json, .csv and .md, blocks.csv and bench_speculative.jsonl (with the columns of
            SGLang's script of that name) are written; by default runs/bench-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl bench --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4,3/2/6 --draft runs/quickstart/draft
        specrl bench --profile aurora-minimax-m2.1
        specrl bench --engine sglang --plans 0,1/1/2,3/1/4 --engine.python ../sglang/bin/python
    """
    sizes = None if batch_sizes is None else check_batch_sizes(batch_sizes)
    at = check_temperatures((workload.temperature,) if temperatures is None else temperatures)
    chosen = None if plans is None else parse_plans(plans)
    settings: dict[str, object] = {"engine": engine.name, "seed": seed, "precision": measure.precision}
    cells: Cells
    if profile is not None:
        if not engine.is_local:
            raise ValueError(f"a profile must be simulated in this process, but got engine {engine.name!r} with it")
        simulated = SimulatedEngine(profile)
        title, new_tokens = simulated.profile.name, simulated.profile.max_new_tokens
        source = simulated.profile.provenance["source"]
        settings |= {"engine": "simulated", "profile": title, "source": source}
        cells = bench_profile(simulated, batch_sizes=sizes, plans=chosen, until=measure, seed=seed)
    else:
        title, new_tokens = target.name, workload.max_new_tokens
        settings |= {"target": title, "draft": draft.path, "workload": workload.name}
        settings |= {"prompt_tokens": workload.prompt_tokens}
        cells = bench_engine(
            engine,
            target,
            draft,
            workload,
            batch_sizes=sizes or BATCH_SIZES,
            plans=chosen or parse_plans(PLANS if engine.is_local else CHAINS),
            temperatures=at,
            until=measure,
            use_rejection_sampling=use_rejection_sampling,
            seed=seed,
        )
    for temperature, results in cells.items():
        rows = [{**row, "shown": shown(row)} for row in cell_rows({temperature: results})]
        where = "simulated" if temperature is None else f"temperature {temperature:g}"
        show(table(rows, COLUMNS, title=f"{title}, {where}"))
    for warning in warnings(cells):
        show(warning)
    if output_dir is not None:
        directory = OutputDir(output_dir)
        write_bench(directory, cells, title=title, measured=settings, new_tokens=new_tokens)
        show(f"written: {directory.path}/bench.json, .csv, .md, blocks.csv, bench_speculative.jsonl")
        show(hint(directory.path))
    return cell_rows(cells)
