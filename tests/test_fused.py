"""Targets and memory of the fused head; `test_objective` compares its losses and gradients with plain ones."""

import pytest
import torch
from test_attention import Largest
from torch import Tensor

from specrl.agents.draft import fused_head
from specrl.agents.draft.fused_head import FusedHead, Targets, head_steps, make_targets
from specrl.agents.draft.losses import parse_loss, sampled_step, top_k_of

HIDDEN, VOCAB, DRAFT_VOCABULARY, LENGTHS = 8, 24, [1, 2, 3, 5, 8, 13, 21], (5, 9)
TEMPERATURES = (0.7, 1.5)
TEMPERATURE = torch.cat([torch.full((n, 1), t) for n, t in zip(LENGTHS, TEMPERATURES, strict=True)])


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_targets(top_k: int | None = None, reduced: bool = True) -> tuple[Targets, Tensor, Tensor]:
    """Targets of two sequences; p [M, Vd] on the draft's vocabulary and tokens [M] as draft ids, made plainly."""
    logits = [2 * drawn(n, VOCAB, seed=i) for i, n in enumerate(LENGTHS)]
    tokens = [1 + torch.arange(n) for n in LENGTHS]
    tokens[1][-1] = -1
    p = torch.softmax(torch.cat(logits) / TEMPERATURE, -1)
    if not reduced:
        return make_targets(logits, TEMPERATURES, tokens, None), p, torch.cat(tokens)
    p = p[:, DRAFT_VOCABULARY]
    p = p if top_k is None else top_k_of(p, top_k)
    ids = [DRAFT_VOCABULARY.index(x) if x in DRAFT_VOCABULARY else -1 for x in torch.cat(tokens).tolist()]
    return make_targets(logits, TEMPERATURES, tokens, torch.tensor(DRAFT_VOCABULARY), top_k), p, torch.tensor(ids)


@pytest.fixture(params=[False, True], ids=["whole", "in pieces"])
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three slots and pieces of one, so that there are remainders."""
    if request.param:
        monkeypatch.setattr(fused_head, "BLOCK", 3 * len(DRAFT_VOCABULARY) + 1)
        monkeypatch.setattr(fused_head, "PIECE", len(DRAFT_VOCABULARY) + 2)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize(("top_k", "reduced"), [(None, True), (3, True), (None, False)])
def test_targets_are_the_targets_distributions_on_the_drafts_vocabulary(top_k: int | None, reduced: bool) -> None:
    targets, p, tokens = some_targets(top_k, reduced)
    slots = torch.tensor([13, 0, 7, 7])
    torch.testing.assert_close(targets.p(slots), p[slots])
    assert torch.equal(targets.tokens, tokens) and -1 in tokens
    assert top_k is not None or (float(p[0].sum()) < 0.999) == reduced  # some mass is outside


def test_a_slot_without_mass_in_the_drafts_vocabulary_has_p_0() -> None:
    logits = drawn(3, VOCAB, seed=0)
    logits[1, DRAFT_VOCABULARY] = float("-inf")
    before = logits.clone()
    ids = torch.tensor(DRAFT_VOCABULARY)
    p = make_targets([logits], [1.0], [torch.zeros(3, dtype=torch.int64)], ids).p(torch.arange(3))
    assert bool((p[1] == 0).all())
    torch.testing.assert_close(p[::2], torch.softmax(logits, -1)[::2, DRAFT_VOCABULARY])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["forward_kl", "forward_kl:0.7+lk:0.3", "accept_length"])
def test_the_logits_of_all_slots_never_exist(loss: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forwards nor backwards."""
    slots, vocab, block = 512, 256, 1 << 12
    monkeypatch.setattr(fused_head, "BLOCK", block)
    monkeypatch.setattr(fused_head, "PIECE", block // 4)
    index = torch.arange(slots)
    targets = make_targets([drawn(slots, vocab, seed=0)], [1.0], [index % vocab], None)
    rows, head = drawn(slots, HIDDEN, seed=1).to(dtype).requires_grad_(), drawn(vocab, HIDDEN, seed=2).requires_grad_()
    with Largest() as largest:
        if loss == "accept_length":
            step = head_steps(rows, head.to(dtype), targets, index, sampled_step)
            (step.matched + step.accepted).sum().backward()
        else:
            fused = FusedHead(head, dtype)
            fused.add_token_losses(rows, targets, index, parse_loss(loss), 1.0)
            fused.backward()
    assert 0 < largest.numbers <= block < slots * vocab // 30
