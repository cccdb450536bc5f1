"""`specrl profile`: record an engine, and fit a profile for simulation to it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig, check_batch_sizes
from specrl.core.checks import require
from specrl.core.plan import parse_plans
from specrl.io.output import OutputDir, show, table
from specrl.measure.arms import open_engine
from specrl.measure.machine import environment
from specrl.measure.recording import profile_rows, record_blocks
from specrl.simulation.fit import fit_recording
from specrl.simulation.profile import Profile

CHAINS = "0,1/1/2,2/1/3,3/1/4,4/1/5"
PLANS = f"{CHAINS},3/2/6"  # SGLang cannot switch between chains and trees


def profile(
    *,
    engine: EngineConfig = EngineConfig(),
    target: TargetConfig = TargetConfig(),
    draft: DraftConfig = DraftConfig(),
    workload: WorkloadConfig = WorkloadConfig(),
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    plans: str | None = None,
    use_rejection_sampling: bool = True,
    seconds: float = 120.0,
    seed: int = 0,
    name: str = "recorded",
    output_dir: Path | None = None,
) -> Profile:
    """Record rounds of every plan and plain steps at every batch size, and fit a profile for simulation.

    Plans and plain decoding take turns, in blocks of 8 rounds. Run nothing else meanwhile. 'SpecRL/Simulated-v0' with
    profile='DIR/profile.json' simulates this machine; 'specrl evaluate --profiles DIR/profile.json' compares choosers.

    With --engine sglang two servers are launched, with and without speculation; one is idle while the other one is
    measured. Rounds do not overlap there, so the profile has no result delay.

    Args:
        draft: the draft model; a random one accepts next to nothing.
        batch_sizes: requests decoded together.
        plans: that the profile offers, num_steps/topk/num_draft_tokens, separated by commas; by default
            0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6 (SGLang: without the tree).
        use_rejection_sampling: sample chains from the draft; else take its best tokens, as SGLang does by default.
        seconds: of recording; at least four passes are made.
        seed: of prompts and sampling.
        name: of the profile.
        output_dir: where profile.json is written; by default runs/profile-<time>.

    Example:
        specrl profile --draft runs/quickstart/draft --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4
        specrl profile --engine sglang --draft exported/bundle/draft --engine.python ../sglang/bin/python
    """
    sizes = sorted(set(check_batch_sizes(batch_sizes)))
    require(0 < seconds < math.inf, "seconds", "a finite number above 0", seconds)
    offered = parse_plans(plans or (PLANS if engine.is_local else CHAINS))
    prompts = workload.open(target.name, "held_out")
    decoder = open_engine(engine, target, draft, workload, offered, use_rejection_sampling=use_rejection_sampling)
    try:
        facts = decoder.facts() | ({} if engine.is_local else {"flags": list(engine.flag_words)})
        blocks = record_blocks(decoder, prompts, sizes, offered, seconds=seconds, seed=seed)
    finally:
        decoder.close()
    provenance = {
        "kind": "recording",
        "source": "specrl profile",
        "target": target.name,
        "draft": "random" if draft.path is None else str(draft.path),
        **facts,
        "temperature": workload.temperature,
        "workload": workload.name,
        "blocks": len(blocks),
        "environment": environment(),
    }
    lengths = {"prompt_tokens": workload.prompt_tokens, "max_new_tokens": workload.max_new_tokens}
    fitted = replace(fit_recording(name, provenance, blocks, **lengths), delay=decoder.result_delay)
    show(table(profile_rows(fitted), title=f"{name}: {target.name}, temperature {workload.temperature}"))
    if output_dir is not None:
        show(f"written: {OutputDir(output_dir).write_text('profile.json', fitted.to_json())}")
    return fitted
