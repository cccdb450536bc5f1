"""What `benchmarks/gpu.py` runs: in full on a GPU, shrunk on a CPU, where it only shows that it works."""

from __future__ import annotations

from dataclasses import dataclass

from specrl.models.config import TargetConfig
from specrl.models.rope import RopeConfig

SHARES = {"pretrain": 0.35, "learn": 0.25, "measure": 0.3, "plain_8b": 0.1}  # of the wall-clock budget
PLANS = "0,3/1/4,4/1/5,5/1/6"  # lookahead 0, 3, 4, 5
TEMPERATURE, PRECISION = 0.7, 0.02


@dataclass(frozen=True)
class Sizes:
    """One size of the benchmark.

    Args:
        target: shape of the target that is pretrained.
        plain: shape with random weights that is timed decoding plainly.
        corpus_bytes: of Python sources, at most.
        context, windows: tokens of a training window, and windows of a step.
        learning_rate: of pretraining.
        prompt_tokens, new_tokens: of a request.
        batch_sizes: requests decoded together.
        traffic: batch sizes over rounds while the draft learns.
        plain_rounds: that each way of plain decoding is timed in, to find the fastest.
        host_rounds: rounds whose device-busy time is looked at.
        contexts: of the plain steps that are timed.
        plain_steps: timed at each of them.
        copy_bytes: of the copy that memory bandwidth is measured with.
    """

    target: TargetConfig
    plain: TargetConfig
    corpus_bytes: int
    context: int
    windows: int
    learning_rate: float
    prompt_tokens: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    traffic: str
    plain_rounds: int
    host_rounds: int
    contexts: tuple[int, ...]
    plain_steps: int
    copy_bytes: int


def llama(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, positions: int) -> TargetConfig:
    """A Llama of this shape."""
    return TargetConfig(
        "llama", vocab, hidden, mlp, layers, heads, kv_heads, hidden // heads, 1e-5, RopeConfig(), positions
    )


# Llama-3.1-8B, as its config.json has it.
_LLAMA3 = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
LLAMA_8B = TargetConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, _LLAMA3, 131072)

FULL = Sizes(
    target=llama(vocab=8192, hidden=1024, mlp=2816, layers=24, heads=16, kv_heads=8, positions=2048),
    plain=LLAMA_8B,
    corpus_bytes=96 << 20,
    context=512,
    windows=32,
    learning_rate=1e-3,
    prompt_tokens=64,
    new_tokens=128,
    batch_sizes=(1, 8, 16, 32),
    traffic="32x96,16x48,8x48,1x48",
    plain_rounds=60,
    host_rounds=64,
    contexts=(128, 1024),
    plain_steps=48,
    copy_bytes=4 << 30,
)
SMALL = Sizes(
    target=llama(vocab=300, hidden=32, mlp=64, layers=7, heads=2, kv_heads=1, positions=128),
    plain=llama(vocab=512, hidden=64, mlp=128, layers=4, heads=4, kv_heads=2, positions=128),
    corpus_bytes=1 << 19,
    context=48,
    windows=8,
    learning_rate=3e-3,
    prompt_tokens=8,
    new_tokens=8,
    batch_sizes=(1, 2),
    traffic="2x16,1x16",
    plain_rounds=10,
    host_rounds=8,
    contexts=(16, 32),
    plain_steps=8,
    copy_bytes=8 << 20,
)
SIZES = {"full": FULL, "small": SMALL}
