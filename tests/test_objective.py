"""The learner's gradients against a plain implementation: every step's logits at once, and one `backward`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import lively_draft, tiny_target
from torch import Tensor

from specrl.agents.draft import attention, fused_head
from specrl.agents.draft import unroll as unroll_module
from specrl.agents.draft.config import LearnerConfig
from specrl.agents.draft.losses import (
    SLOT_LOSSES,
    Step,
    accept_length,
    acceptance,
    greedy_step,
    parse_loss,
    sampled_step,
    seconds_saved,
    survival,
    top_k_of,
)
from specrl.agents.draft.objective import SHARPNESS, Objective
from specrl.agents.draft.sequences import RejectedDrafts, TrainingSequence
from specrl.agents.draft.unroll import unroll
from specrl.core.interfaces import PlanCost
from specrl.models.draft import Draft

VOCABULARY = (1, 2, 3, 5, 6, 8)  # reduced
COSTS = (PlanCost(1, 0, 1.0, 1.0), PlanCost(1, 2, 1.0, 1.1), PlanCost(4, 3, 1.5, 2.0))
EMBEDDING = tiny_target().embedding
V, H = EMBEDDING.shape


def sequences() -> list[TrainingSequence]:
    """Three requests with different lengths, temperatures and prompts, with rejected drafts."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for length, prompt, temperature, positions in [
        (11, 3, 0.7, (0, 2, 5, 9, 10)),
        (7, 2, 0.0, (1, 4)),
        (4, 3, 1.3, ()),
    ]:
        count = len(positions)
        rejected = RejectedDrafts(
            torch.tensor(positions, dtype=torch.int64),
            torch.randint(1, V, (count,), generator=generator),
            2 * torch.randn(count, V, generator=generator),
        )
        tokens = torch.randint(1, V, (length,), generator=generator)
        features = torch.randn(length, 3 * H, generator=generator)
        logits = 2 * torch.randn(length, V, generator=generator)
        out.append(TrainingSequence(tokens, features, logits, temperature, 0, prompt, rejected))
    return out


def logits_of(
    parameters: Mapping[str, Tensor], draft: Draft, tokens: Tensor, features: Tensor, steps: int
) -> Iterator[Tensor]:
    """[T, Vd] of every step, of one sequence."""
    for state in unroll(parameters, draft.config, EMBEDDING[tokens][None], features[None], steps):
        yield F.linear(state[0], parameters["lm_head.weight"])


def plain_loss(parameters: dict[str, Tensor], draft: Draft, batch: list[TrainingSequence], c: LearnerConfig) -> Tensor:
    """The loss as `LearnerConfig` describes it, one sequence at a time."""
    mixture = parse_loss(c.loss)
    vocabulary = list(range(V)) if draft.target_ids is None else draft.target_ids.tolist()
    by_step: list[list[Tensor]] = [[] for _ in range(c.ttt_steps)]
    sums, counts, after_rejection = torch.zeros(c.ttt_steps), torch.zeros(c.ttt_steps), []
    for s in batch:
        temperature = c.temperature if c.temperature is not None else s.temperature or 1.0
        slots = len(s.tokens) - 1
        next_tokens = [vocabulary.index(x) if x in vocabulary else -1 for x in s.tokens[2:].tolist()]
        tokens = torch.tensor([*next_tokens, -1])
        p = torch.softmax(s.logits[1:] / temperature, -1)[:, vocabulary]
        steps = []
        for k, logits in enumerate(
            logits_of(parameters, draft, s.tokens[1:], s.features[:-1], min(c.ttt_steps, slots))
        ):
            logq = torch.log_softmax(logits / temperature, -1)
            if mixture.slot:
                by_step[k].append(mixture(logq[k:], p[k:], tokens[k:]))
            args = logq.exp(), p, tokens
            step = sampled_step(*args) if c.draft_sampling == "sampled" else greedy_step(*args, SHARPNESS)
            steps.append(Step(step.matched[None], step.accepted[None]))
        starts = torch.arange(slots)[None] + 2 >= s.prompt_tokens
        padding = (0, c.ttt_steps - len(steps))
        survived, estimates = survival(steps, starts, torch.ones_like(starts))
        sums, counts = sums + F.pad(survived[0], padding), counts + F.pad(estimates[0], padding)
        if c.rejected_weight:
            after_rejection += plain_after_rejection(parameters, draft, s, temperature, c.rejected_top_k, vocabulary)
    total = torch.zeros(())
    for weight, losses in zip(c.step_weights(c.ttt_steps), by_step, strict=True):
        total = total + (weight * torch.cat(losses).mean() if losses else 0.0)
    if "accept_length" in mixture.chain:
        total = total - mixture.chain["accept_length"] * accept_length(sums / counts, c.ttt_steps)
    if "seconds_saved" in mixture.chain:
        total = total - mixture.chain["seconds_saved"] * seconds_saved(sums / counts, COSTS, speedup=1.2)
    return total + (c.rejected_weight * torch.stack(after_rejection).mean() if after_rejection else 0.0)


def plain_after_rejection(
    parameters: dict[str, Tensor], draft: Draft, s: TrainingSequence, temperature: float, top_k: int, vocabulary: Any
) -> list[Tensor]:
    """Forward KL after each rejected draft: the draft runs once for each, with the rejected token in place."""
    assert s.rejected is not None
    out = []
    for position, token, logits in zip(s.rejected.positions.tolist(), *s.rejected[1:], strict=True):
        if 1 <= position < len(s.tokens) - 1:
            tokens = s.tokens[1 : position + 2].clone()
            tokens[position] = token
            (drafted,) = logits_of(parameters, draft, tokens, s.features[: position + 1], 1)
            p = top_k_of(torch.softmax(logits / temperature, -1)[None, vocabulary], top_k)[0]
            out.append(-(p * torch.log_softmax(drafted[position] / temperature, -1)).sum())
    return out


def trainable(draft: Draft) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if t.is_floating_point()}


def backward(
    draft: Draft, batch: list[TrainingSequence], **settings: Any
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients."""
    objective = Objective(draft, EMBEDDING, LearnerConfig(**{"dtype": "float32", **settings}))
    parameters = trainable(draft)
    objective.set_plan_costs(COSTS, 1.2)
    metrics = objective.backward(parameters, batch)
    return metrics, {name: x.grad for name, x in parameters.items() if x.grad is not None}


@pytest.fixture(params=["whole", "in pieces"])
def _memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in pieces":
        monkeypatch.setattr(fused_head, "BLOCK", 25)
        monkeypatch.setattr(fused_head, "PIECE", 13)
        monkeypatch.setattr(attention, "_WHOLE_UP_TO", 0)
        monkeypatch.setattr(attention, "_SCORES", 64)
        monkeypatch.setattr(unroll_module, "_RECOMPUTE_FROM", 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "own temperatures": {"temperature": None},
    "step weights": {"ttt_weights": (0.0, 1.0, 3.0, 0.5), "loss": "next_token"},
    "mixture": {"loss": "total_variation+lk:0.5+reverse_kl:0.2"},
    "rejected": {"rejected_weight": 0.4, "rejected_top_k": 2},
    "rejected, own temperatures": {"rejected_weight": 1.0, "rejected_top_k": 99, "temperature": None},
    "accept_length": {"loss": "accept_length"},
    "greedy": {"loss": "accept_length:2", "draft_sampling": "greedy"},
    "seconds_saved": {"loss": "seconds_saved", "temperature": None},
    "everything": {"loss": "lk:0.3+accept_length:0.5+seconds_saved:2", "rejected_weight": 0.1, "temperature": 0.8},
}


@pytest.mark.usefixtures("_memory")
@pytest.mark.parametrize("vocabulary", [None, VOCABULARY], ids=["whole", "reduced"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_loss_and_gradients_are_the_plain_ones(settings: dict[str, Any], vocabulary: tuple[int, ...] | None) -> None:
    draft, batch = lively_draft(vocabulary), sequences()
    settings = {"dtype": "float32", "ttt_steps": 4, **settings}
    metrics, grads = backward(draft, batch, **settings)
    parameters = trainable(draft)
    loss = plain_loss(parameters, draft, batch, LearnerConfig(**settings))
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert set(grads) == set(parameters) and len(grads) == 13
    for name, parameter in parameters.items():
        assert parameter.grad is not None and float(parameter.grad.norm()) > 1e-4, name
        torch.testing.assert_close(grads[name], parameter.grad, atol=3e-5, rtol=1e-3, msg=name)


def test_gradients_are_added_to_existing_ones() -> None:
    draft, batch = lively_draft(), sequences()
    objective, parameters = Objective(draft, EMBEDDING, LearnerConfig(dtype="float32")), trainable(draft)
    for _ in range(2):
        objective.backward(parameters, batch)
    for name, once in backward(draft, batch)[1].items():
        torch.testing.assert_close(parameters[name].grad, 2 * once)


@pytest.mark.parametrize("loss", ["forward_kl", "accept_length"])
def test_alphas_are_the_mean_probabilities_that_sampled_drafts_are_accepted(loss: str) -> None:
    draft, (s, *_) = lively_draft(VOCABULARY), sequences()
    metrics, _ = backward(draft, [s], loss=loss)
    p = torch.softmax(s.logits[1:], -1)[:, list(VOCABULARY)]
    for k, logits in enumerate(logits_of(draft.tensors, draft, s.tokens[1:], s.features[:-1], 3)):
        alpha = acceptance(torch.softmax(logits[k:], -1), p[k:]).mean()
        assert metrics[f"alpha_{k + 1}"] == pytest.approx(float(alpha), rel=1e-5)


def test_a_padded_request_has_the_gradient_that_it_has_alone() -> None:
    draft, (long, short, _) = lively_draft(), sequences()
    counts = [tuple(float(len(s.tokens) - 1 - k) for k in range(3)) for s in (long, short)]  # slots of each step
    alone = [backward(draft, [s], ttt_weights=n)[1] for s, n in zip((long, short), counts, strict=True)]
    _, together = backward(draft, [long, short], ttt_weights=tuple(map(sum, zip(*counts, strict=True))))
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[0][name] + alone[1][name], atol=1e-3, rtol=1e-3, msg=name)


def test_seconds_saved_is_the_accept_length_until_costs_are_known() -> None:
    draft, metrics = lively_draft(), []
    for loss in ("seconds_saved", "accept_length"):
        objective = Objective(draft, EMBEDDING, LearnerConfig(dtype="float32", loss=loss))
        metrics.append(objective.backward(trainable(draft), sequences()))
    assert metrics[0] == metrics[1] and -4.0 < metrics[0]["loss"] < -1.0


def test_short_sequences_have_fewer_steps_and_without_usable_rejections_there_is_no_loss_of_them() -> None:
    short = replace(sequences()[2], rejected=RejectedDrafts(torch.tensor([0]), torch.tensor([1]), torch.zeros(1, V)))
    without, with_rejected = (backward(lively_draft(), [short], ttt_steps=5, rejected_weight=w)[0] for w in (0.0, 1.0))
    assert without == with_rejected and set(without) == {"loss", "alpha_1", "alpha_2", "alpha_3"}


@pytest.mark.parametrize("loss", [*SLOT_LOSSES, "accept_length", "seconds_saved"])
def test_bfloat16_products_stay_close(loss: str) -> None:
    draft, batch = lively_draft(VOCABULARY), sequences()
    (metrics, grads), (exact, expected) = (
        backward(draft, batch, loss=loss, rejected_weight=0.2, dtype=dtype) for dtype in ("bfloat16", "float32")
    )
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    got, want = (torch.cat([x[name].flatten() for name in expected]) for x in (grads, expected))
    assert float((got - want).norm() / want.norm()) < 0.1
