"""`specrl record`: serve traffic and keep what a draft can be learnt from."""

from __future__ import annotations

from pathlib import Path

from specrl.agents.draft.sequences import Assembler
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir, environment, progress, show
from specrl.models.config import default_taps
from specrl.models.draft import load_draft
from specrl.models.target import default_device, load_target
from specrl.training.loop import Stream
from specrl.training.trace_files import ShardWriter
from specrl.workloads.stream import open_stream


def record(
    *,
    target: str = "embedded",
    device: str | None = None,
    dtype: str = "float32",
    draft: Path | None = None,
    plan: str = "0",
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    batch_size: int = 16,
    requests: int = 512,
    rejected: bool = False,
    shard_sequences: int = 64,
    seed: int = 0,
    output_dir: Path | None = None,
) -> None:
    """Serve requests and record them as traces, for `specrl train --traces`.

    Writes shards of safetensors and index.json, which at every moment names whole shards only. A token takes its
    features and the target's logits in float16: 2 bytes x (vocabulary + 3 x hidden size at its own width).

    Args:
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        device: of the target; by default a GPU where there is one.
        dtype: of the target.
        draft: EAGLE3 draft directory; by default none, and the layers are those that a new draft reads.
        plan: of every round, such as 3/1/4; without a draft 0.
        workload: as in `specrl train`.
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        temperature: of sampling; 0 is greedy.
        batch_size: requests decoded together.
        requests: to serve; one with "learn": false is not recorded.
        rejected: keep rejected drafts too, and what the target says after them (learner.rejected).
        shard_sequences: requests of a shard.
        seed: of requests and sampling.
        output_dir: where the traces go, a new directory; by default runs/record-<time>.

    Raises:
        ValueError: an argument out of range, or traces are there already.

    Example:
        specrl record --requests 2000 --output_dir runs/traces
        specrl train --traces runs/traces --epochs 5
    """
    if requests < 1 or batch_size < 1:
        raise ValueError(f"requests and batch_size must be at least 1, but got {requests} and {batch_size}")
    chosen = Plan.parse(plan)
    if chosen.num_steps and draft is None:
        raise ValueError(f"plan {chosen} needs a draft, but none is named; use --draft, or plan 0")
    directory = OutputDir(output_dir or Path("runs/record"))
    model = load_target(target, device=default_device(device), dtype=dtype)
    drafted = None if draft is None else load_draft(draft)
    taps = default_taps(model.config.num_layers) if drafted is None else drafted.config.taps
    source = open_stream(
        workload,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        split="train",
    )
    about = {
        "target": target,
        "vocab_size": model.config.vocab_size,
        "taps": list(taps),
        "plan": str(chosen),
        "rejected": rejected,
        "environment": environment(),
    }
    writer = ShardWriter(directory, about, shard_sequences)
    engine = LocalEngine(
        model, drafted, max_context=prompt_tokens + max_new_tokens, taps=() if drafted is not None else taps
    )
    stream = Stream(source, seed)
    session = engine.start(stream, batch_size=min(batch_size, requests), seed=seed, trace=True)
    assembler, left, recorded, tokens = Assembler(rejected=rejected), requests, 0, 0
    with progress("recording", requests) as done:
        while left:
            left = max(0, left - len(session.round(chosen).finished))
            assembler.opt_out(stream.refusing)
            stream.refusing.clear()
            found = assembler.add(session.drain())[: requests - recorded]
            recorded += len(found)
            tokens += sum(len(sequence.tokens) for sequence in found)
            writer.add(found)
            done(requests - left)
    writer.close()
    engine.close()
    show(f"{writer.written} requests, {tokens} tokens, plan {chosen}, written: {directory.path}")
