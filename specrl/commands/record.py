"""`specrl record`: serve requests and record traces that a draft can be trained on."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.draft.sequences import Assembler
from specrl.config import TargetConfig, WorkloadConfig
from specrl.core.checks import require
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir, progress, show
from specrl.measure.machine import environment
from specrl.models.config import default_aux_layers
from specrl.models.draft import load_draft
from specrl.training.loop import ResumableRequests
from specrl.training.trace_files import ShardWriter


def record(
    *,
    target: TargetConfig = TargetConfig(),
    draft: Path | None = None,
    plan: str = "0",
    workload: WorkloadConfig = WorkloadConfig(),
    batch_size: int = 16,
    requests: int = 512,
    rejected: bool = False,
    shard_sequences: int = 64,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve requests and record them as traces, for `specrl train offline`.

    Writes shards of safetensors and index.json. The index names complete shards only, at any time. A token takes
    2 bytes x (vocabulary + 3 x hidden size) for the target's logits and hidden states in float16.

    Args:
        draft: EAGLE3 draft directory; by default none, and the recorded hidden states are those that a new draft reads.
        plan: of every round, such as 3/1/4; 0 without a draft.
        batch_size: requests decoded together.
        requests: number of requests to serve; one with "learn": false is not recorded.
        rejected: record rejected drafts too, with the target's distribution after them (for learner.rejected_weight).
        shard_sequences: sequences per shard.
        seed: of requests and sampling.
        output_dir: a new directory for the traces; by default runs/record-<time>.

    Example:
        specrl record --requests 2000 --output_dir runs/traces
        specrl train offline runs/traces --epochs 5
    """
    for name, value in {"requests": requests, "batch_size": batch_size, "shard_sequences": shard_sequences}.items():
        require(value >= 1, name, "at least 1", value)
    chosen = Plan.parse(plan)
    require(not chosen.num_steps or draft is not None, "plan", "0 without --draft", plan)
    directory = OutputDir(output_dir or Path("runs/record"))
    model = target.load()
    loaded = None if draft is None else load_draft(draft)
    aux_layers = default_aux_layers(model.config.num_layers) if loaded is None else loaded.config.aux_layers
    about = {
        "target": target.name,
        "vocab_size": model.config.vocab_size,
        "taps": list(aux_layers),
        "plan": str(chosen),
        "rejected": rejected,
        "environment": environment(),
    }
    stream = ResumableRequests(workload.open(target.name, "train", ignore_eos=False), seed)
    writer = ShardWriter(directory, about, shard_sequences)
    taps = () if loaded is not None else aux_layers
    engine = LocalEngine(model, loaded, max_context=workload.max_context, aux_layers=taps)
    session = engine.start(stream, batch_size=min(batch_size, requests), seed=seed, trace=True)
    assembler, finished, recorded, tokens = Assembler(keep_rejected=rejected), 0, 0, 0
    with progress("recording", requests) as done:
        while finished < requests:
            finished += len(session.round(chosen).finished)
            assembler.opt_out(stream.opted_out)
            stream.opted_out.clear()
            sequences = assembler.add(session.drain())[: requests - recorded]
            recorded += len(sequences)
            tokens += sum(len(sequence.tokens) for sequence in sequences)
            writer.add(sequences)
            done(finished)
    writer.close()
    engine.close()
    show(f"{recorded} requests, {tokens} tokens, plan {chosen}, written: {directory.path}")
