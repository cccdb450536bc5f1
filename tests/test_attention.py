import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specrl.agents.draft import attention
from specrl.agents.draft.attention import attend

BATCH, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8
Past = list[tuple[Tensor, Tensor]]


def passes(count: int, length: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Past]:
    """Queries [B, heads, T, D] of the last of `count` passes, and keys and values [B, Hk, T, D] of all."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        x = torch.randn(BATCH, length, heads, SIZE, generator=generator, dtype=torch.float64)
        return (1.5 * x).to(dtype).transpose(1, 2).requires_grad_()  # strided as the draft's are

    return drawn(HEADS), [(drawn(KV_HEADS), drawn(KV_HEADS)) for _ in range(count)]


def naive(queries: Tensor, past: Past) -> Tensor:
    """One softmax over every slot of every pass, under the mask that `attend` documents."""
    k, group, slots = len(past) - 1, HEADS // KV_HEADS, torch.arange(queries.shape[2])
    keys, values = (torch.cat([x[i] for x in past], 2).repeat_interleave(group, 1) for i in range(2))
    masks = [slots <= slots[:, None] - k, *(slots == slots[:, None] - k + j for j in range(1, k + 1))]
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(SIZE)
    visible = torch.cat(masks, -1)
    weights = torch.softmax(scores[:, :, k:].masked_fill(~visible[k:], float("-inf")), -1)
    return torch.nn.functional.pad(weights @ values, (0, 0, k, 0))


def inputs(queries: Tensor, past: Past) -> list[Tensor]:
    return [queries, *(x for pair in past for x in pair)]


def results(out: Tensor, queries: Tensor, past: Past) -> list[Tensor]:
    """The output, and the gradient of a scalar of it by every input."""
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs(queries, past), slope)]


@pytest.fixture(params=["whole", "blocks of 4 slots"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_WHOLE_UP_TO", 10**9 if request.param == "whole" else 0)
    monkeypatch.setattr(attention, "_SCORES", BATCH * HEADS * 9 * 4)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("count", [1, 2, 4])
def test_it_is_one_softmax_under_the_mask(count: int) -> None:
    queries, past = passes(count)
    out = attend(queries, past)
    assert out.shape == queries.shape
    assert bool((out[:, :, : count - 1] == 0).all()) and bool((out[:, :, count - 1 :] != 0).all())
    for got, want in zip(results(out, queries, past), results(naive(queries, past), queries, past), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)


@pytest.mark.usefixtures("_blocks")
def test_bfloat16_stays_close() -> None:
    queries, past = passes(3, dtype=torch.bfloat16)
    exact_queries, *exact = (x.detach().double().requires_grad_() for x in inputs(queries, past))
    exact_past = list(zip(exact[::2], exact[1::2], strict=True))
    out, expected = attend(queries, past), naive(exact_queries, exact_past)
    assert out.dtype == torch.bfloat16
    for got, want in zip(results(out, queries, past), results(expected, exact_queries, exact_past), strict=True):
        assert float((got.double() - want).detach().norm() / want.detach().norm()) < 0.02


@pytest.mark.usefixtures("_blocks")
def test_gradcheck_and_large_scores() -> None:
    queries, past = passes(2, 4)
    flat = inputs(queries, past)
    assert torch.autograd.gradcheck(lambda q, *x: attend(q, list(zip(x[::2], x[1::2], strict=True))), flat)
    large = (queries * 100).detach().requires_grad_()
    out = attend(large, past)
    (grad,) = torch.autograd.grad(out.sum(), large)
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(grad).all())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_long_sequences_are_exact_and_their_memory_does_not_grow_with_the_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forwards and backwards, the largest tensor has no more numbers than the scores of a block and the queries."""
    monkeypatch.setattr(attention, "_SCORES", 1 << 14)
    length = 589  # the last block is smaller than the others
    queries, past = passes(3, length, torch.float32)
    with Largest() as largest:
        got = results(attend(queries, past), queries, past)
    assert 0 < largest.numbers <= max(queries.numel(), (1 << 14) + BATCH * HEADS * 2 * length)
    with Largest() as plain:
        want = results(naive(queries, past), queries, past)
    assert plain.numbers >= BATCH * HEADS * length**2 > 20 * largest.numbers
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
