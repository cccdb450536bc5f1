"""Recording traces: serve requests, and write what a draft can be trained on."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.draft.sequences import Assembler
from specrl.config import TargetConfig, WorkloadConfig
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir, progress, show
from specrl.measure.machine import environment
from specrl.models.config import default_aux_layers
from specrl.models.draft import load_draft
from specrl.training.loop import ResumableRequests
from specrl.training.trace_files import ShardWriter


def record_traces(
    directory: OutputDir,
    *,
    target: TargetConfig,
    draft: Path | None,
    plan: Plan,
    workload: WorkloadConfig,
    batch_size: int,
    requests: int,
    rejected: bool,
    shard_sequences: int,
    seed: int,
) -> None:
    """Serve requests with one plan, write their traces, and print how many there are (see `specrl record`).

    Raises:
        ValueError: an argument out of range, or traces in the directory already.
    """
    for name, value in {"requests": requests, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    if plan.num_steps and draft is None:
        raise ValueError(f"plan {plan} needs a draft, but none is given; use --draft, or plan 0")
    model = target.load()
    loaded = None if draft is None else load_draft(draft)
    aux_layers = default_aux_layers(model.config.num_layers) if loaded is None else loaded.config.aux_layers
    about = {
        "target": target.name,
        "vocab_size": model.config.vocab_size,
        "taps": list(aux_layers),
        "plan": str(plan),
        "rejected": rejected,
        "environment": environment(),
    }
    stream = ResumableRequests(workload.open(target.name, "train", ignore_eos=False), seed)
    writer = ShardWriter(directory, about, shard_sequences)
    taps = () if loaded is not None else aux_layers
    engine = LocalEngine(model, loaded, max_context=workload.max_context, aux_layers=taps)
    session = engine.start(stream, batch_size=min(batch_size, requests), seed=seed, trace=True)
    assembler, left, recorded, tokens = Assembler(keep_rejected=rejected), requests, 0, 0
    with progress("recording", requests) as done:
        while left:
            left = max(0, left - len(session.round(plan).finished))
            assembler.opt_out(stream.opted_out)
            stream.opted_out.clear()
            found = assembler.add(session.drain())[: requests - recorded]
            recorded += len(found)
            tokens += sum(len(sequence.tokens) for sequence in found)
            writer.add(found)
            done(requests - left)
    writer.close()
    engine.close()
    show(f"{recorded} requests, {tokens} tokens, plan {plan}, written: {directory.path}")
