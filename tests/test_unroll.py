from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from tiny import AUX_LAYERS, lively_draft, tiny_target
from torch import Tensor

from specrl.agents.draft.unroll import unroll
from specrl.models.draft import Draft, ServingDraft

BATCH, LENGTH, PASSES = 2, 14, 5  # tokens x_0 .. x_14, of which slots 0 .. 13 predict
VOCABULARIES = {"whole": None, "reduced": (1, 2, 5, 7, 8)}


def traffic() -> tuple[Tensor, Tensor]:
    """Tokens [B, LENGTH + 1] and features [B, LENGTH, 3H] of the target itself."""
    target = tiny_target()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, target.config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
    with torch.inference_mode():
        features = target.prefill(tokens, target.new_cache(BATCH, LENGTH + 1), aux_layers=AUX_LAYERS).aux_hidden_states
    assert features is not None
    return tokens, features[:, :-1].clone()


def logits(parameters: Mapping[str, Tensor], draft: Draft, features: Tensor, tokens: Tensor) -> list[Tensor]:
    """[B, T, Vd] of every pass."""
    c = draft.config
    embeddings = tiny_target().embedding[tokens[:, 1:]]
    return [F.linear(x, parameters["lm_head.weight"]) for x in unroll(parameters, c, embeddings, features, PASSES)]


@torch.inference_mode()
def served(draft: Draft, features: Tensor, tokens: Tensor, steps: int) -> Tensor:
    """[B, T, Vd]: the serving draft's logits at slot t, `steps` slots past the last that it read the features of."""
    serving = ServingDraft(draft, tiny_target())
    wanted = torch.zeros(BATCH, LENGTH, draft.config.draft_vocab_size)
    for last in range(LENGTH - steps):
        cache = serving.new_cache(BATCH, LENGTH)
        slots = torch.arange(last + 1).expand(BATCH, -1)
        fused = serving.fuse(features[:, : last + 1])
        hidden = serving.decode(tokens[:, 1 : last + 2], fused, cache, slots, length=last + 1)[:, -1:]
        for slot in range(last + 1, last + steps + 1):
            at = torch.full((BATCH, 1), slot)
            hidden = serving.decode(tokens[:, slot + 1, None], hidden, cache, at, length=slot + 1)
        wanted[:, last + steps] = serving.logits(hidden[:, 0])
    return wanted


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=list(VOCABULARIES))
def test_pass_k_is_what_the_serving_draft_says_k_steps_past_the_last_verified_token(
    vocabulary: tuple[int, ...] | None,
) -> None:
    draft, (tokens, features) = lively_draft(vocabulary), traffic()
    assert draft.config.num_heads == 2 * draft.config.num_kv_heads  # grouped queries
    passes = logits(draft.tensors, draft, features, tokens)
    assert len(passes) == PASSES
    for k, drafted in enumerate(passes):
        wanted = served(draft, features, tokens, k)
        assert wanted[:, k:].std() > 0.3
        torch.testing.assert_close(drafted[:, k:], wanted[:, k:], atol=1e-4, rtol=0.0)


def test_later_passes_differ_from_the_first() -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    first, *later = logits(draft.tensors, draft, features, tokens)
    for drafted in later:
        assert (drafted[:, PASSES:] - first[:, PASSES:]).abs().max() > 0.1


def test_no_slot_sees_what_comes_after_it() -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    before = logits(draft.tensors, draft, features, tokens)
    tokens[:, 9:], features[:, 8:] = 1, 0.0  # slots 8 and later
    for k, (old, new) in enumerate(zip(before, logits(draft.tensors, draft, features, tokens), strict=True)):
        torch.testing.assert_close(old[:, k:8], new[:, k:8], atol=1e-5, rtol=0.0)
        assert not torch.allclose(old[:, 8:], new[:, 8:], atol=1e-2)


def test_pass_k_sees_no_features_of_its_last_k_slots() -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    before = logits(draft.tensors, draft, features, tokens)
    features[:, 8:] = 0.0
    for k, (old, new) in enumerate(zip(before, logits(draft.tensors, draft, features, tokens), strict=True)):
        torch.testing.assert_close(old[:, k : 8 + k], new[:, k : 8 + k], atol=1e-5, rtol=0.0)
        assert not torch.allclose(old[:, 8 + k], new[:, 8 + k], atol=1e-2)


def scalar(parameters: Mapping[str, Tensor], draft: Draft, features: Tensor, tokens: Tensor) -> Tensor:
    """A smooth scalar of all passes' meaningful slots."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for k, drafted in enumerate(logits(parameters, draft, features, tokens)):
        weights = torch.randn(drafted.shape, generator=generator)
        total = total + (weights * torch.log_softmax(drafted, -1))[:, k:].mean()
    return total


def test_the_gradient_of_every_tensor_is_the_slope_along_it() -> None:
    """Central differences in float32 along each tensor's own gradient; all that is learnt must have one."""
    draft, (tokens, features) = lively_draft((1, 2, 5, 7, 8)), traffic()
    learnt = {name: t.clone().requires_grad_() for name, t in draft.tensors.items() if name not in ("d2t", "t2d")}
    scalar(learnt, draft, features, tokens).backward()
    assert len(learnt) == 13
    for name, tensor in learnt.items():
        assert tensor.grad is not None, name
        norm = float(tensor.grad.norm())
        assert norm > 1e-3, name
        step = 1e-2 * float(tensor.detach().norm()) ** 0.5
        ends = []
        with torch.no_grad():
            for sign in (1.0, -1.0):
                moved = {**learnt, name: tensor + sign * step * tensor.grad / norm}
                ends.append(float(scalar(moved, draft, features, tokens)))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(norm, rel=0.02), name


def test_one_slot_is_enough_for_one_pass() -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    c = draft.config
    embeddings = tiny_target().embedding[tokens[:, 1:2]]
    (state,) = unroll(draft.tensors, c, embeddings, features[:, :1], 1)
    drafted = F.linear(state, draft.tensors["lm_head.weight"])
    torch.testing.assert_close(drafted, served(draft, features, tokens, 0)[:, :1], atol=1e-4, rtol=0.0)
