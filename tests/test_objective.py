"""The learner's gradients against a plain implementation: every pass's logits at once, and one `backward`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import lively_draft, tiny_target
from torch import Tensor

from specrl.agents.draft import attention
from specrl.agents.draft import fused_head as fused
from specrl.agents.draft import unroll as unroll_module
from specrl.agents.draft.config import LearnerConfig
from specrl.agents.draft.losses import (
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

WORDS = (1, 2, 3, 5, 6, 8)  # of the reduced vocabulary
COSTS = (PlanCost(1, 0, 1.0, 1.0), PlanCost(1, 2, 1.0, 1.1), PlanCost(4, 3, 1.5, 2.0))
V, H = tiny_target().config.vocab_size, tiny_target().config.hidden_size


def sequences(seed: int = 0, fallen: bool = True) -> list[TrainingSequence]:
    """Three requests of other lengths, temperatures and prompts, with drafts that fell."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for length, prompt, temperature, at in [(11, 3, 0.7, (0, 2, 5, 9, 10)), (7, 2, 0.0, (1, 4)), (4, 3, 1.3, ())]:
        rejected = RejectedDrafts(
            torch.tensor(at, dtype=torch.int64),
            torch.randint(1, V, (len(at),), generator=generator),
            2 * torch.randn(len(at), V, generator=generator),
        )
        tokens = torch.randint(1, V, (length,), generator=generator)
        features = torch.randn(length, 3 * H, generator=generator)
        logits = 2 * torch.randn(length, V, generator=generator)
        out.append(TrainingSequence(tokens, features, logits, temperature, 0, prompt, rejected if fallen else None))
    return out


def logits_of(
    parameters: Mapping[str, Tensor], draft: Draft, embeddings: Tensor, features: Tensor, passes: int
) -> Iterator[Tensor]:
    """[B, T, Vd] of every pass."""
    for state in unroll(parameters, draft.config, embeddings, features, passes):
        yield F.linear(state, parameters["lm_head.weight"])


def plain_loss(parameters: dict[str, Tensor], draft: Draft, given: list[TrainingSequence], c: LearnerConfig) -> Tensor:
    """The loss as `LearnerConfig` says it, one sequence at a time."""
    mixture = parse_loss(c.loss)
    said = list(range(V)) if draft.target_ids is None else draft.target_ids.tolist()
    embedding = tiny_target().embedding
    at_pass: list[list[Tensor]] = [[] for _ in range(c.ttt_steps)]
    sums, counts, after = torch.zeros(c.ttt_steps), torch.zeros(c.ttt_steps), []
    for s in given:
        heat = c.temperature if c.temperature is not None else s.temperature or 1.0
        slots = len(s.tokens) - 1
        tokens = torch.tensor([said.index(x) if x in said else -1 for x in s.tokens[2:].tolist()] + [-1])
        p = torch.softmax(s.logits[1:] / heat, -1)[:, said]
        known = embedding[s.tokens[1:]][None], s.features[None, :-1]
        steps = []
        for k, logits in enumerate(logits_of(parameters, draft, *known, min(c.ttt_steps, slots))):
            logq = torch.log_softmax(logits[0] / heat, -1)
            if mixture.slot:
                at_pass[k].append(mixture(logq[k:], p[k:], tokens[k:]))
            q = logq.exp()
            step = sampled_step(q, p, tokens) if c.draft_sampling == "sampled" else greedy_step(q, p, tokens, SHARPNESS)
            steps.append(Step(step.matched[None], step.accepted[None]))
        starts = torch.arange(slots)[None] + 2 >= s.prompt_tokens
        found = survival(steps, starts, torch.ones_like(starts))
        sums = sums + F.pad(found[0][0], (0, c.ttt_steps - len(steps)))
        counts = counts + F.pad(found[1][0], (0, c.ttt_steps - len(steps)))
        if c.rejected_weight:
            after += plain_after_rejection(parameters, draft, s, heat, c.rejected_top_k, said)
    total = torch.zeros(())
    for weight, losses in zip(c.step_weights(c.ttt_steps), at_pass, strict=True):
        total = total + (weight * torch.cat(losses).mean() if losses else 0.0)
    survived = sums / counts
    if "accept_length" in mixture.chain:
        total = total - mixture.chain["accept_length"] * accept_length(survived, c.ttt_steps)
    if "seconds_saved" in mixture.chain:
        total = total - mixture.chain["seconds_saved"] * seconds_saved(survived, COSTS, speedup=1.2)
    return total + (c.rejected_weight * torch.stack(after).mean() if after else 0.0)


def plain_after_rejection(
    parameters: dict[str, Tensor], draft: Draft, s: TrainingSequence, heat: float, top_k: int, said: list[int]
) -> list[Tensor]:
    """Forward KL after each draft that fell: the sequence is run once for each, with the draft in the token's place."""
    assert s.rejected is not None
    out = []
    for at, token, logits in zip(s.rejected.positions.tolist(), s.rejected.tokens, s.rejected.logits, strict=True):
        if not 1 <= at < len(s.tokens) - 1:
            continue
        tokens = s.tokens[1 : at + 2].clone()
        tokens[at] = token
        known = tiny_target().embedding[tokens][None], s.features[None, : at + 1]
        (drafted,) = logits_of(parameters, draft, *known, 1)
        p = top_k_of(torch.softmax(logits / heat, -1)[None, said], top_k)[0]
        out.append(-(p * torch.log_softmax(drafted[0, at] / heat, -1)).sum())
    return out


def learnt(draft: Draft) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if t.is_floating_point()}


def ours(draft: Draft, given: list[TrainingSequence], c: LearnerConfig) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients."""
    objective, parameters = Objective(draft, tiny_target().embedding, c), learnt(draft)
    objective.set_plan_costs(COSTS, 1.2)
    metrics = objective.backward(parameters, given)
    return metrics, {name: x.grad for name, x in parameters.items() if x.grad is not None}


@pytest.fixture(params=["whole", "in pieces"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in pieces":
        monkeypatch.setattr(fused, "BLOCK", 25)
        monkeypatch.setattr(fused, "PIECE", 13)
        monkeypatch.setattr(attention, "_WHOLE_UP_TO", 0)
        monkeypatch.setattr(attention, "_SCORES", 64)
        monkeypatch.setattr(unroll_module, "_RECOMPUTE_FROM", 0)
    return str(request.param)


SETTINGS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "own temperatures": {"temperature": None},
    "pass weights": {"ttt_weights": (0.0, 1.0, 3.0, 0.5), "loss": "next_token"},
    "mixture": {"loss": "total_variation+lk:0.5+reverse_kl:0.2"},
    "rejected_weight": {"rejected_weight": 0.4, "rejected_top_k": 2},
    "rejected, own temperatures": {"rejected_weight": 1.0, "rejected_top_k": 99, "temperature": None},
    "accept_length": {"loss": "accept_length"},
    "greedy": {"loss": "accept_length:2", "draft_sampling": "greedy"},
    "seconds_saved": {"loss": "seconds_saved", "temperature": None},
    "everything": {"loss": "lk:0.3+accept_length:0.5+seconds_saved:2", "rejected_weight": 0.1, "temperature": 0.8},
}


@pytest.mark.parametrize("vocabulary", [None, WORDS], ids=["whole", "reduced"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_loss_and_gradients_are_the_plain_ones(
    settings: dict[str, Any], vocabulary: tuple[int, ...] | None, memory: str
) -> None:
    draft, given = lively_draft(vocabulary), sequences()
    c = LearnerConfig(**{"dtype": "float32", "ttt_steps": 4, **settings})
    metrics, grads = ours(draft, given, c)
    parameters = learnt(draft)
    loss = plain_loss(parameters, draft, given, c)
    loss.backward()
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert set(grads) == set(parameters) and len(grads) == 13
    for name, parameter in parameters.items():
        assert parameter.grad is not None and float(parameter.grad.norm()) > 1e-4, name
        torch.testing.assert_close(grads[name], parameter.grad, atol=3e-5, rtol=1e-3, msg=name)


def test_gradients_are_added_to_those_there() -> None:
    draft, given, c = lively_draft(None), sequences(), LearnerConfig(dtype="float32")
    objective, parameters = Objective(draft, tiny_target().embedding, c), learnt(draft)
    objective.backward(parameters, given)
    once = {name: x.grad.clone() for name, x in parameters.items() if x.grad is not None}
    objective.backward(parameters, given)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.parametrize("loss", ["forward_kl", "accept_length"])
def test_alphas_are_the_mean_odds_that_a_sampled_draft_stands(loss: str) -> None:
    draft, (s, *_) = lively_draft(WORDS), sequences()
    metrics, _ = ours(draft, [s], LearnerConfig(dtype="float32", ttt_steps=3, loss=loss))
    known = tiny_target().embedding[s.tokens[1:]][None], s.features[None, :-1]
    p = torch.softmax(s.logits[1:], -1)[:, list(WORDS)]
    passes = logits_of(draft.tensors, draft, *known, 3)
    for k, logits in enumerate(passes):
        alpha = acceptance(torch.softmax(logits[0, k:], -1), p[k:]).mean()
        assert metrics[f"alpha_{k + 1}"] == pytest.approx(float(alpha), rel=1e-5)


def test_padding_changes_nothing() -> None:
    """A request learnt from beside a longer one has the gradient that it has alone."""
    draft, (long, short, _) = lively_draft(None), sequences()
    c = LearnerConfig(dtype="float32", ttt_steps=3)
    counts = [tuple(float(len(s.tokens) - 1 - k) for k in range(3)) for s in (long, short)]  # slots of each pass
    alone = [ours(draft, [s], replace(c, ttt_weights=n)) for s, n in zip((long, short), counts, strict=True)]
    both = tuple(sum(n) for n in zip(*counts, strict=True))
    _, together = ours(draft, [long, short], replace(c, ttt_weights=both))
    for name, grad in together.items():
        torch.testing.assert_close(grad, alone[0][1][name] + alone[1][1][name], atol=1e-3, rtol=1e-3, msg=name)


def test_seconds_saved_is_the_accept_length_until_prices_are_known() -> None:
    draft, given = lively_draft(None), sequences()
    found = []
    for loss in ("seconds_saved", "accept_length"):
        objective = Objective(draft, tiny_target().embedding, LearnerConfig(dtype="float32", loss=loss))
        found.append(objective.backward(learnt(draft), given))
    assert found[0] == found[1] and -4.0 < found[0]["loss"] < -1.0


def test_fewer_passes_where_all_are_short_and_nothing_rejected_is_no_loss() -> None:
    short = replace(sequences()[2], rejected=RejectedDrafts(torch.tensor([0]), torch.tensor([1]), torch.zeros(1, V)))
    settings: dict[str, Any] = {"dtype": "float32", "ttt_steps": 5}
    plain, _ = ours(lively_draft(None), [short], LearnerConfig(**settings))
    metrics, _ = ours(lively_draft(None), [short], LearnerConfig(rejected_weight=1.0, **settings))
    assert plain == metrics
    assert set(metrics) == {"loss", "alpha_1", "alpha_2", "alpha_3"}


@pytest.mark.parametrize(
    "loss", ["forward_kl", "reverse_kl", "next_token", "total_variation", "lk", "accept_length", "seconds_saved"]
)
def test_bfloat16_products_stay_close(loss: str) -> None:
    draft, given = lively_draft(WORDS), sequences()
    settings: dict[str, Any] = {"loss": loss, "rejected_weight": 0.2}
    metrics, grads = ours(draft, given, LearnerConfig(dtype="bfloat16", **settings))
    exact, wanted = ours(draft, given, LearnerConfig(dtype="float32", **settings))
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.02)
    ends = [torch.cat([x[name].flatten() for name in wanted]) for x in (grads, wanted)]
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 0.1
