from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from tiny import AUX_LAYERS, lively_draft, tiny_target
from torch import Tensor

from specrl.agents.draft.unroll import unroll
from specrl.models.attention import TokenSlots
from specrl.models.draft import Draft, ServingDraft

BATCH, LENGTH, PASSES = 2, 14, 5  # tokens x_0 .. x_14; slots 0 .. 13 predict


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
    """[B, T, Vd]: the serving draft's logits at slot t, `steps` slots past the last one whose features it read."""
    serving = ServingDraft(draft, tiny_target())
    out = torch.zeros(BATCH, LENGTH, draft.config.draft_vocab_size)
    for last in range(LENGTH - steps):
        cache = serving.new_cache(BATCH, LENGTH)
        slots = torch.arange(last + 1).expand(BATCH, -1)
        fused = serving.fuse(features[:, : last + 1])
        hidden = serving.decode(tokens[:, 1 : last + 2], fused, cache, TokenSlots(slots, last + 1))[:, -1:]
        for slot in range(last + 1, last + steps + 1):
            slots = torch.full((BATCH, 1), slot)
            hidden = serving.decode(tokens[:, slot + 1, None], hidden, cache, TokenSlots(slots, slot + 1))
        out[:, last + steps] = serving.logits(hidden[:, 0])
    return out


@pytest.mark.parametrize("vocabulary", [None, (1, 2, 5, 7, 8)], ids=["whole", "reduced"])
def test_pass_k_equals_the_serving_draft_k_steps_past_the_last_verified_token(
    vocabulary: tuple[int, ...] | None,
) -> None:
    draft, (tokens, features) = lively_draft(vocabulary), traffic()
    assert draft.config.num_heads == 2 * draft.config.num_kv_heads  # grouped queries
    passes = logits(draft.tensors, draft, features, tokens)
    assert len(passes) == PASSES
    for k, drafted in enumerate(passes):
        expected = served(draft, features, tokens, k)
        assert expected[:, k:].std() > 0.3
        torch.testing.assert_close(drafted[:, k:], expected[:, k:], atol=1e-4, rtol=0.0)
        assert k == 0 or (drafted[:, PASSES:] - passes[0][:, PASSES:]).abs().max() > 0.1


@pytest.mark.parametrize("features_only", [False, True])
def test_no_slot_depends_on_later_ones_and_pass_k_not_on_the_features_of_its_last_k_slots(features_only: bool) -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    before = logits(draft.tensors, draft, features, tokens)
    features[:, 8:] = 0.0
    if not features_only:
        tokens[:, 9:] = 1
    for k, (old, new) in enumerate(zip(before, logits(draft.tensors, draft, features, tokens), strict=True)):
        first = 8 + k if features_only else 8  # slot that changes
        torch.testing.assert_close(old[:, k:first], new[:, k:first], atol=1e-5, rtol=0.0)
        assert not torch.allclose(old[:, first], new[:, first], atol=1e-2)


def scalar(parameters: Mapping[str, Tensor], draft: Draft, features: Tensor, tokens: Tensor) -> Tensor:
    """A smooth scalar of all passes' meaningful slots."""
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for k, drafted in enumerate(logits(parameters, draft, features, tokens)):
        weights = torch.randn(drafted.shape, generator=generator)
        total = total + (weights * torch.log_softmax(drafted, -1))[:, k:].mean()
    return total


def test_the_gradient_of_every_tensor_is_the_slope_along_it() -> None:
    """Central differences in float32 along the gradient of each trained tensor."""
    draft, (tokens, features) = lively_draft((1, 2, 5, 7, 8)), traffic()
    trained = {name: t.clone().requires_grad_() for name, t in draft.tensors.items() if t.is_floating_point()}
    scalar(trained, draft, features, tokens).backward()
    assert len(trained) == 13
    for name, tensor in trained.items():
        assert tensor.grad is not None, name
        norm = float(tensor.grad.norm())
        assert norm > 1e-3, name
        step = 1e-2 * float(tensor.detach().norm()) ** 0.5
        with torch.no_grad():
            up, down = (
                float(scalar({**trained, name: tensor + change * tensor.grad / norm}, draft, features, tokens))
                for change in (step, -step)
            )
        assert (up - down) / (2 * step) == pytest.approx(norm, rel=0.02), name


def test_one_slot_is_enough_for_one_pass() -> None:
    draft, (tokens, features) = lively_draft(), traffic()
    (state,) = unroll(draft.tensors, draft.config, tiny_target().embedding[tokens[:, 1:2]], features[:, :1], 1)
    drafted = F.linear(state, draft.tensors["lm_head.weight"])
    torch.testing.assert_close(drafted, served(draft, features, tokens, 0)[:, :1], atol=1e-4, rtol=0.0)
