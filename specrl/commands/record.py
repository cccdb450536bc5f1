"""`specrl record`: serve requests and record traces that a draft can be trained on."""

from __future__ import annotations

from pathlib import Path

from specrl.config import TargetConfig, WorkloadConfig
from specrl.core.plan import Plan
from specrl.io.output import OutputDir
from specrl.training.recording import record_traces


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
        target: the model.
        draft: EAGLE3 draft directory; by default none, and the recorded hidden states are those that a new draft reads.
        plan: of every round, such as 3/1/4; 0 without a draft.
        workload: the requests.
        batch_size: requests decoded together.
        requests: number of requests to serve; one with "learn": false is not recorded.
        rejected: record rejected drafts too, with the target's distribution after them (for learner.rejected_weight).
        shard_sequences: sequences per shard.
        seed: of requests and sampling.
        output_dir: a new directory for the traces; by default runs/record-<time>.

    Raises:
        ValueError: an argument out of range, or traces in the directory already.

    Example:
        specrl record --requests 2000 --output_dir runs/traces
        specrl train offline runs/traces --epochs 5
    """
    directory = OutputDir(output_dir or Path("runs/record"))
    record_traces(
        directory,
        target=target,
        draft=draft,
        plan=Plan.parse(plan),
        workload=workload,
        batch_size=batch_size,
        requests=requests,
        rejected=rejected,
        shard_sequences=shard_sequences,
        seed=seed,
    )
