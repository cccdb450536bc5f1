import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specrl.agents.draft import attention
from specrl.agents.draft.attention import attend

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 4, 2, 9, 8


def passes(
    count: int, length: int = LENGTH, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Queries [B, heads, T, D] of the last of `count` passes, and keys and values [B, Hk, T, D] of all."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> Tensor:
        x = torch.randn(BATCH, length, heads, SIZE, generator=generator, dtype=torch.float64)
        return (1.5 * x).to(dtype).transpose(1, 2).requires_grad_()  # strided as the draft's are

    return drawn(HEADS), [(drawn(KV_HEADS), drawn(KV_HEADS)) for _ in range(count)]


def naive(queries: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over every slot of every pass, under the mask that `attend` states."""
    k, group, slots = len(past) - 1, HEADS // KV_HEADS, torch.arange(queries.shape[2])
    keys, values = (torch.cat([x[i] for x in past], 2).repeat_interleave(group, 1) for i in range(2))
    masks = [slots <= slots[:, None] - k]
    masks += [slots == slots[:, None] - k + j for j in range(1, k + 1)]
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(SIZE)
    seen = torch.cat(masks, -1)
    weights = torch.softmax(scores[:, :, k:].masked_fill(~seen[k:], float("-inf")), -1)
    return torch.nn.functional.pad(weights @ values, (0, 0, k, 0))


def results(out: Tensor, queries: Tensor, past: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The output, and a gradient through all of it by every input that it depends on."""
    generator = torch.Generator().manual_seed(7)
    slope = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    yield out
    yield from torch.autograd.grad(out, [queries, *(x for pair in past for x in pair)], slope)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_it_is_one_softmax_under_the_mask(in_blocks: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_WHOLE_UP_TO", 0 if in_blocks else 10**9)
    monkeypatch.setattr(attention, "_SCORES", BATCH * HEADS * LENGTH * 4)  # blocks of 4 slots
    queries, past = passes(count)
    out = attend(queries, past)
    assert out.shape == queries.shape
    wanted = naive(queries, past)
    for got, want in zip(results(out, queries, past), results(wanted, queries, past), strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-8)


def test_slots_before_the_first_that_a_pass_can_have_are_0() -> None:
    queries, past = passes(3)
    assert bool((attend(queries, past)[:, :, :2] == 0).all())
    assert bool((attend(queries, past)[:, :, 2:] != 0).all())


@pytest.mark.parametrize("count", [1, 3])
def test_long_sequences_in_float32(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block is smaller than the others."""
    monkeypatch.setattr(attention, "_SCORES", 1 << 19)
    length = attention._WHOLE_UP_TO + 77
    queries, past = passes(count, length, torch.float32)
    got, want = (list(results(f(queries, past), queries, past)) for f in (attend, naive))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_bfloat16_stays_close(in_blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_WHOLE_UP_TO", 0 if in_blocks else 10**9)
    monkeypatch.setattr(attention, "_SCORES", BATCH * HEADS * 40 * 16)
    queries, past = passes(3, 40, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (queries, *(x for pair in past for x in pair))]
    pairs = list(zip(exact[1::2], exact[2::2], strict=True))
    out = attend(queries, past)
    assert out.dtype == torch.bfloat16
    for got, want in zip(results(out, queries, past), results(naive(exact[0], pairs), exact[0], pairs), strict=True):
        assert float((got.double() - want).detach().norm() / want.detach().norm()) < 0.02


def test_the_gradient_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_WHOLE_UP_TO", 0)
    monkeypatch.setattr(attention, "_SCORES", BATCH * HEADS * 5 * 2)  # blocks of 2 slots or fewer
    queries, past = passes(3, 5)

    def f(queries: Tensor, *flat: Tensor) -> Tensor:
        return attend(queries, list(zip(flat[::2], flat[1::2], strict=True)))

    assert torch.autograd.gradcheck(f, (queries, *(x for pair in past for x in pair)))


@pytest.mark.parametrize("whole_up_to", [0, 10**9])
def test_large_scores_do_not_overflow(whole_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_WHOLE_UP_TO", whole_up_to)
    queries, past = passes(2, 6)
    big = (queries * 100).detach().requires_grad_()
    out = attend(big, past)
    (grad,) = torch.autograd.grad(out.sum(), big)
    assert bool(torch.isfinite(out).all()) and bool(torch.isfinite(grad).all())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_long_sequences_never_cost_their_square_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not forwards and not backwards: no more numbers at once than the scores of a block, and the queries."""
    monkeypatch.setattr(attention, "_SCORES", 1 << 14)
    length = attention._WHOLE_UP_TO + 77
    queries, past = passes(3, length, torch.float32)
    with Largest() as largest:
        list(results(attend(queries, past), queries, past))
    assert 0 < largest.numbers <= max(queries.numel(), (1 << 14) + BATCH * HEADS * 2 * length)
    with Largest() as plain:
        naive(queries, past)
    assert plain.numbers >= BATCH * HEADS * length**2 > 20 * largest.numbers
