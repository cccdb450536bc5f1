"""The sizes of the GPU benchmark, and what a stage needs to know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from specrl.config import WorkloadConfig
from specrl.core.clock import Clock
from specrl.io.output import OutputDir
from specrl.measure.machine import environment
from specrl.models.config import TargetArchitecture
from specrl.models.rope import RopeConfig

PLANS = "0,3/1/4,4/1/5,5/1/6"


class Sizes(NamedTuple):
    """One size of the benchmark."""

    target: TargetArchitecture  # that is pretrained
    plain: TargetArchitecture  # whose plain step is timed with random weights
    corpus_bytes: int  # of Python sources, at most
    context: int  # tokens of a window in pretraining
    workload: WorkloadConfig
    batch_sizes: tuple[int, ...]
    requests: int  # that `specrl train` serves at most


def llama(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> TargetArchitecture:
    """A Llama of this shape, with a context of 2048 tokens."""
    head_dim = hidden // heads
    return TargetArchitecture("llama", vocab, hidden, mlp, layers, heads, kv_heads, head_dim, 1e-5, RopeConfig(), 2048)


_LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
LLAMA_8B = TargetArchitecture("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, _LLAMA3, 131072)
SIZES = {
    "full": Sizes(
        target=llama(vocab=8192, hidden=1024, mlp=2816, layers=24, heads=16, kv_heads=8),
        plain=LLAMA_8B,
        corpus_bytes=96 << 20,
        context=512,
        workload=WorkloadConfig(prompt_tokens=64, max_new_tokens=128),
        batch_sizes=(1, 8, 16, 32),
        requests=10**6,
    ),
    "small": Sizes(
        target=llama(vocab=300, hidden=32, mlp=64, layers=7, heads=2, kv_heads=1),
        plain=llama(vocab=512, hidden=64, mlp=128, layers=4, heads=4, kv_heads=2),
        corpus_bytes=1 << 19,
        context=48,
        workload=WorkloadConfig(prompt_tokens=8, max_new_tokens=8),
        batch_sizes=(1, 2),
        requests=64,
    ),
}


@dataclass(frozen=True)
class Stage:
    """Where and on what a stage runs.

    Args:
        output: directory of the results of all stages.
        device: such as 'cuda' or 'cpu'.
        size: a key of `SIZES`.
        clock: measures the time.
        deadline: the reading of the clock at which the stage should end.
    """

    output: Path
    device: str
    size: str
    clock: Clock
    deadline: float

    @property
    def sizes(self) -> Sizes:
        """Shapes and numbers of this size."""
        return SIZES[self.size]

    @property
    def target(self) -> Path:
        """Directory of the pretrained target."""
        return self.output / "target"

    @property
    def draft(self) -> Path:
        """Directory of the learned draft."""
        return self.output / "train" / "draft"

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - self.clock.now())

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write <output>/<name>.json: rows, and on what they were measured."""
        where = {"size": self.size, "device": self.device, "environment": environment()}
        OutputDir(self.output).write_json(f"{name}.json", {**where, "rows": rows})
