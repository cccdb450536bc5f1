"""`specrl bench`: speculative against plain decoding, by batch size, plan and temperature."""

from __future__ import annotations

import math
from pathlib import Path

from specrl.config import DraftConfig, EngineConfig, MeasureConfig, TargetConfig, WorkloadConfig, check_batch_sizes
from specrl.core.checks import require
from specrl.core.plan import parse_plans
from specrl.io.output import OutputDir, hint, show, table
from specrl.measure.bench import bench_engine, bench_profile, warnings
from specrl.measure.tables import COLUMNS, cell_rows, shown, write_bench
from specrl.simulation.engine import SimulatedEngine

CHAINS = "0,1/1/2,3/1/4"
PLANS = f"{CHAINS},3/2/6"  # SGLang cannot switch between chains and trees


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

    Plain decoding, in the fastest setting of dtype and threads on this machine, alternates with the plans in one
    process, on the same held-out prompts. It is also measured against itself (A/A); that interval must contain 1.
    Speedups do not include prefill.

    With --engine sglang two servers are launched, with and without speculation; one is idle while the other one is
    measured. Plans are chains, or one tree.

    With --profile rounds are simulated, without A/A; target, prompts and temperature are the profile's. Published
    tables divide all tokens by all seconds; the mean over requests is 1 to 3 % higher.

    Args:
        draft: the draft model; a random one accepts next to nothing.
        profile: simulate this profile: a name such as 'aurora-minimax-m2.1', or a .json file.
        batch_sizes: requests decoded together; by default 1,4,16, or all of the profile.
        plans: num_steps/topk/num_draft_tokens, separated by commas; by default 0,1/1/2,3/1/4,3/2/6 (SGLang: without
            the tree), or all of the profile. Plan 0 drafts nothing but keeps the draft ready.
        temperatures: measured one after the other; by default workload.temperature.
        use_rejection_sampling: sample chains from the draft; else take its best tokens, as SGLang does by default.
        seed: of prompts and sampling.
        output_dir: where tables and blocks are written; by default runs/bench-<time>.

    Example:
        specrl bench --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4,3/2/6 --draft runs/quickstart/draft
        specrl bench --profile aurora-minimax-m2.1
        specrl bench --engine sglang --plans 0,1/1/2,3/1/4 --engine.python ../sglang/bin/python
    """
    sizes = None if batch_sizes is None else check_batch_sizes(batch_sizes)
    temperatures = (workload.temperature,) if temperatures is None else temperatures
    distinct = len(set(temperatures)) == len(temperatures) > 0 and all(0 <= t < math.inf for t in temperatures)
    require(distinct, "temperatures", "different numbers of at least 0, such as 0,0.7", temperatures)
    chosen = None if plans is None else parse_plans(plans)
    settings: dict[str, object] = {"engine": engine.name, "seed": seed, "precision": measure.precision}
    if profile is not None:
        require(engine.is_local, "engine", "'local' with a profile, which is simulated", engine.name)
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
            batch_sizes=sizes or (1, 4, 16),
            plans=chosen or parse_plans(PLANS if engine.is_local else CHAINS),
            temperatures=temperatures,
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
