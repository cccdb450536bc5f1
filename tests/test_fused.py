from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specrl.agents.draft import fused_head as fused
from specrl.agents.draft.fused_head import FusedHead, Targets, head_steps, make_targets
from specrl.agents.draft.losses import (
    SLOT_LOSSES,
    MakeStep,
    acceptance,
    greedy_step,
    parse_loss,
    sampled_step,
    top_k_of,
)

HIDDEN, WORDS, SAID, LENGTHS = 8, 24, (1, 2, 3, 5, 8, 13, 21), (5, 9)
HEATS = (0.7, 1.5)
LOSSES = [*SLOT_LOSSES, "forward_kl:0.7+lk:0.3+next_token:2"]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_targets(top_k: int | None = None, reduced: bool = True) -> tuple[Targets, Tensor, Tensor]:
    """Of two sequences; p [M, Vd] on the draft's vocabulary and tokens [M] as draft ids, made the plain way."""
    logits = [2 * drawn(n, WORDS, seed=i) for i, n in enumerate(LENGTHS)]
    tokens = [1 + torch.arange(n) for n in LENGTHS]
    tokens[1][-1] = -1
    p = torch.cat([torch.softmax(x / heat, -1) for x, heat in zip(logits, HEATS, strict=True)])
    if not reduced:
        return make_targets(logits, HEATS, tokens, None, top_k), p, torch.cat(tokens)
    there = torch.full((WORDS,), -1)
    there[list(SAID)] = torch.arange(len(SAID))
    p = p[:, list(SAID)]
    p = p if top_k is None else top_k_of(p, top_k)
    known = torch.tensor([int(there[x]) if x >= 0 else -1 for x in torch.cat(tokens).tolist()])
    return make_targets(logits, HEATS, tokens, torch.tensor(SAID), top_k), p, known


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Blocks of three slots, of which a piece is one, so that ends and remainders are met."""
    if request.param:
        monkeypatch.setattr(fused, "BLOCK", 3 * len(SAID) + 1)
        monkeypatch.setattr(fused, "PIECE", len(SAID) + 2)
    return bool(request.param)


@pytest.mark.parametrize("top_k", [None, 3])
def test_targets_are_the_targets_distributions_on_the_drafts_words(top_k: int | None, pieces: bool) -> None:
    targets, p, tokens = some_targets(top_k)
    at = torch.tensor([13, 0, 7, 7])
    torch.testing.assert_close(targets.p(at), p[at])
    assert torch.equal(targets.tokens, tokens) and set(tokens.tolist()) == {-1, 0, 1, 2, 3, 4}
    assert float(p[0].sum()) < 0.999 or top_k is not None  # some mass is outside


def test_targets_of_a_whole_vocabulary_are_the_softmax() -> None:
    targets, p, tokens = some_targets(reduced=False)
    torch.testing.assert_close(targets.p(torch.arange(len(p))), p)
    assert torch.equal(targets.tokens, tokens)


def test_a_slot_of_which_the_draft_has_no_word_counts_nothing() -> None:
    logits = drawn(3, WORDS, seed=0)
    logits[1, list(SAID)] = float("-inf")  # the target never says one of them
    targets = make_targets([logits], [1.0], [torch.zeros(3, dtype=torch.int64)], torch.tensor(SAID))
    p = targets.p(torch.arange(3))
    assert bool((p[1] == 0).all())
    torch.testing.assert_close(p[::2], torch.softmax(logits, -1)[::2, list(SAID)])
    assert float(logits[1, SAID[0]]) == -float("inf")  # what was given is left alone


@pytest.mark.parametrize("loss", LOSSES)
def test_the_head_and_its_loss_are_the_plain_ones_with_both_gradients(loss: str, pieces: bool) -> None:
    targets, p, tokens = some_targets()
    heat = torch.cat([torch.full((n, 1), h) for n, h in zip(LENGTHS, HEATS, strict=True)])
    at = torch.tensor([0, 2, 3, 5, 6, 9, 12, 13])
    rows, head, mixture = drawn(len(at), HIDDEN, seed=3), drawn(len(SAID), HIDDEN, seed=4), parse_loss(loss)

    ours_rows, ours_head = rows.clone().requires_grad_(), head.clone().requires_grad_()
    ours_head.grad = torch.full_like(head, 0.5)  # is added to
    ours = FusedHead(ours_head, torch.float32)
    alpha = ours.add_token_losses(ours_rows, targets, at, mixture, 0.3)
    ours_loss = ours.backward()

    plain_rows, plain_head = rows.clone().requires_grad_(), head.clone().requires_grad_()
    logq = torch.log_softmax(plain_rows @ plain_head.T / heat[at], -1)
    total = 0.3 * mixture(logq, p[at], tokens[at]).sum()
    total.backward()
    assert ours_loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert plain_rows.grad is not None and float(plain_rows.grad.norm()) > 0.01
    torch.testing.assert_close(ours_rows.grad, plain_rows.grad)
    torch.testing.assert_close(ours_head.grad - 0.5, plain_head.grad, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(alpha, acceptance(logq.detach().exp(), p[at]).mean())


@pytest.mark.parametrize("make_step", [sampled_step, partial(greedy_step, sharpness=4.0)])
def test_steps_of_a_chain_are_the_plain_ones_with_both_gradients(make_step: MakeStep, pieces: bool) -> None:
    targets, p, tokens = some_targets()
    heat = torch.cat([torch.full((n, 1), h) for n, h in zip(LENGTHS, HEATS, strict=True)])
    at = torch.arange(len(p))
    slopes = drawn(2, len(at), seed=5)
    found = []
    for plain in (False, True):
        rows = drawn(len(at), HIDDEN, seed=3).requires_grad_()
        head = drawn(len(SAID), HIDDEN, seed=4).requires_grad_()
        if plain:
            q = torch.softmax(rows @ head.T / heat, -1)
            step = make_step(q, p, tokens)
        else:
            step = head_steps(rows, head, targets, at, make_step)
        grad_rows, grad_head = torch.autograd.grad((torch.stack(list(step)) * slopes).sum(), [rows, head])
        found.append([*(x.detach() for x in step), grad_rows, grad_head])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_products_stay_close(loss: str, pieces: bool) -> None:
    targets, _, _ = some_targets()
    at = torch.arange(14)
    rows, head = drawn(14, HIDDEN, seed=3), drawn(len(SAID), HIDDEN, seed=4)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = rows.to(dtype).requires_grad_(), head.clone().requires_grad_()
        ours = FusedHead(leaves[1], dtype)
        alpha = ours.add_token_losses(leaves[0], targets, at, parse_loss(loss), 1 / 14)
        total, grads = torch.tensor(ours.backward()), [x.grad for x in leaves]
        assert grads[0] is not None and grads[1] is not None
        assert grads[0].dtype == dtype and grads[1].dtype == torch.float32
        found.append([total, alpha, grads[0].float(), grads[1]])
    for name, got, want in zip(("loss", "alpha", "rows", "head"), *found, strict=True):
        assert float((got - want).norm() / want.norm()) < 0.03, name


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gave, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x._base is None:
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [*LOSSES, "accept_length"])
def test_all_logits_are_never_held(loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not forwards and not backwards; the plain way holds slots · words of them."""
    slots, words, block = 512, 256, 1 << 12
    monkeypatch.setattr(fused, "BLOCK", block)
    monkeypatch.setattr(fused, "PIECE", block // 4)
    logits, tokens = drawn(slots, words, seed=0), torch.arange(slots) % words
    targets = make_targets([logits], [1.0], [tokens], None)
    rows = drawn(slots, HIDDEN, seed=1).to(dtype).requires_grad_()
    head, at = drawn(words, HIDDEN, seed=2).requires_grad_(), torch.arange(slots)
    with Largest() as largest:
        if loss == "accept_length":
            step = head_steps(rows, head.to(dtype), targets, at, sampled_step)
            (step.matched + step.accepted).sum().backward()
        else:
            ours = FusedHead(head, dtype)
            ours.add_token_losses(rows, targets, at, parse_loss(loss), 1.0)
            ours.backward()
    assert 0 < largest.numbers <= block < slots * words // 30
    with Largest() as plain:
        torch.log_softmax(rows.detach().float() @ head.detach().T, -1)
    assert plain.numbers == slots * words
