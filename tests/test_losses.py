import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specrl.agents.draft.losses import (
    SLOT_LOSSES,
    Step,
    greedy_step,
    parse_loss,
    sampled_step,
    seconds_saved,
    survival,
    top_k_of,
)
from specrl.core.interfaces import PlanCost

SLOTS, VOCAB, OUTSIDE = 5, 6, 3  # the target has 3 tokens that are not in the draft's vocabulary
TOKENS = torch.tensor([0, 5, -1, 2, 2])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slots() -> tuple[Tensor, Tensor]:
    """Scores [N, Vd] of the draft with gradients, and p [N, Vd + outside] of the target."""
    return drawn(SLOTS, VOCAB).requires_grad_(), torch.softmax(2 * drawn(SLOTS, VOCAB + OUTSIDE, seed=1), -1)


def formula(name: str, q: Tensor, p: Tensor, tokens: Tensor) -> list[float]:
    """The formulas, number by number, with q = 0 outside the draft's vocabulary."""
    out = []
    for q_n, p_n, token in zip(q.tolist(), p.tolist(), tokens.tolist(), strict=True):
        pairs = list(zip(p_n, [*q_n, *[0.0] * OUTSIDE], strict=True))
        out.append(
            {
                "forward_kl": -sum(a * math.log(b) for a, b in pairs if b > 0),
                "reverse_kl": sum(b * math.log(b / a) for a, b in pairs if b > 0),
                "next_token": 0.0 if token < 0 else -math.log(q_n[token]),
                "total_variation": 0.5 * sum(abs(a - b) for a, b in pairs),
                "lk": -math.log(sum(min(a, b) for a, b in pairs)),
            }[name]
        )
    return out


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_loss_is_its_formula_over_the_whole_vocabulary_and_has_its_gradient(name: str) -> None:
    scores, p = slots()

    def loss(scores: Tensor) -> Tensor:
        return SLOT_LOSSES[name](torch.log_softmax(scores, -1), p[:, :VOCAB], TOKENS)

    assert loss(scores).shape == (SLOTS,)
    assert loss(scores).tolist() == pytest.approx(formula(name, torch.softmax(scores, -1), p, TOKENS), abs=1e-9)
    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_loss_is_finite_if_a_distribution_has_zeros(name: str) -> None:
    scores = torch.tensor([[90.0, -90.0, 0.0]], requires_grad=True)
    loss = SLOT_LOSSES[name](torch.log_softmax(scores, -1), torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1])).sum()
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def test_a_mixture_is_the_weighted_sum() -> None:
    scores, p = slots()
    args = torch.log_softmax(scores, -1), p[:, :VOCAB], TOKENS
    mixture = parse_loss("lk : 0.25 + forward_kl+seconds_saved:2")
    assert mixture.slot == {"lk": 0.25, "forward_kl": 1.0} and mixture.chain == {"seconds_saved": 2.0}
    torch.testing.assert_close(mixture(*args), 0.25 * SLOT_LOSSES["lk"](*args) + SLOT_LOSSES["forward_kl"](*args))


@pytest.mark.parametrize("text", ["", "kl", "lk+", "lk+lk", "lk:0", "lk:-1", "lk:nan", "lk:inf", "lk:", "lk:half"])
def test_a_loss_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="learner.loss must be"):
        parse_loss(text)


def test_top_k_normalises_the_most_likely_tokens() -> None:
    p = torch.tensor([[0.1, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(top_k_of(p, 2), torch.tensor([[0.0, 0.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(top_k_of(p, 9)[0], p[0] / 0.6)


# --- chains: a language is p and q of the next token after every path ---

Language = Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]


def random_language(size: int, draft_size: int) -> Language:
    """p and q after a path, float64; the draft's vocabulary is the first `draft_size` tokens."""

    def after(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        p, q = torch.softmax(1.5 * drawn(2, size, seed=1 + sum((x + 1) * 10**i for i, x in enumerate(path))), -1)
        q[draft_size:] = 0.0
        return p, q / q.sum()

    return after


def biased_language(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """p = (.5, .5), q = (.9, .1), and then a draft that is right after token 0 and wrong after token 1."""
    if not path:
        return torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    p = torch.tensor([1.0, 0.0]).double()
    return p, p if path == (0,) else p.flip(0)


def rejection_sampling(language: Language, depth: int, runs: int) -> Tensor:
    """The share of runs that accept the first 1 .. depth drafts (Leviathan et al., 2023, algorithm 1): [depth]."""
    rng, accepted = np.random.default_rng(0), np.zeros(depth)
    for _ in range(runs):
        path: tuple[int, ...] = ()
        for k in range(depth):
            p, q = (x.numpy() for x in language(path))
            draft = int(rng.choice(len(q), p=q))
            if rng.random() >= p[draft] / q[draft]:
                break
            accepted[k] += 1
            path = (*path, draft)
    return torch.tensor(accepted / runs)


def enumerated(language: Language, depth: int, greedy: bool = False) -> Tensor:
    """P_k, exactly, by summing over every chain: [depth]."""
    out = []
    for k in range(1, depth + 1):
        total = 0.0
        for path in product(range(len(language(())[0])), repeat=k):
            probability = 1.0
            for i, x in enumerate(path):
                p, q = language(path[:i])
                probability *= float(p[x]) * (x == int(q.argmax())) if greedy else min(float(p[x]), float(q[x]))
            total += probability
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


def estimated(language: Language, depth: int, draft_size: int, make_step: Callable[..., Step]) -> Tensor:
    """The exact mean of the estimate over all paths of the target: [depth]."""
    paths = list(product(range(len(language(())[0])), repeat=depth))
    weights, steps = torch.ones(len(paths), 1, dtype=torch.float64), []
    for k in range(depth):
        p, q = (torch.stack(x) for x in zip(*(language(path[:k]) for path in paths), strict=True))
        tokens = torch.tensor([path[k] for path in paths])
        weights = weights * p.gather(-1, tokens[:, None])
        step = make_step(q[:, :draft_size], p[:, :draft_size], torch.where(tokens < draft_size, tokens, -1))
        steps.append(Step(*(torch.nn.functional.pad(x[:, None], (k, depth - k - 1)) for x in step)))
    starts = torch.zeros(len(paths), depth, dtype=torch.bool)
    starts[:, 0] = True
    sums, counts = survival(steps, starts, torch.ones_like(starts))
    assert bool((counts == 1).all())
    return (sums * weights).sum(0)


@pytest.mark.parametrize(("size", "draft_size"), [(3, 3), (4, 2)])
def test_survival_is_unbiased_for_sampled_drafts(size: int, draft_size: int) -> None:
    language = random_language(size, draft_size)
    exact = enumerated(language, 4)
    torch.testing.assert_close(estimated(language, 4, draft_size, sampled_step), exact)
    runs = 2000
    shares = rejection_sampling(language, 4, runs)  # within 5 standard errors except once in a million
    assert bool(((shares - exact).abs() < 5 * (exact * (1 - exact) / runs).sqrt()).all())
    assert exact[3] > 0.02


def test_survival_is_unbiased_if_the_product_of_alphas_is_not() -> None:
    exact = enumerated(biased_language, 2)
    torch.testing.assert_close(exact, torch.tensor([0.6, 0.5]).double())
    torch.testing.assert_close(estimated(biased_language, 2, 2, sampled_step), exact)


def test_survival_is_exact_for_the_most_likely_draft_and_the_surrogate_converges_to_it() -> None:
    language = random_language(4, 3)
    limit = estimated(language, 3, 3, greedy_step)
    torch.testing.assert_close(limit, enumerated(language, 3, greedy=True))

    def surrogate(sharpness: float) -> Tensor:
        return estimated(language, 3, 3, lambda q, p, token: greedy_step(q, p, token, sharpness))

    gaps = [float((surrogate(sharpness) - limit).abs().max()) for sharpness in (1.0, 4.0, 16.0, 4096.0)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.05 and gaps[-1] < 1e-6
    p, q = language(())
    sharpened = q[:3] ** 4.0 / (q[:3] ** 4.0).sum()
    assert float(surrogate(4.0)[0]) == pytest.approx(float((sharpened * p[:3]).sum()))


@pytest.mark.parametrize("probability", [0.0, 1e-42, 1e-38])
def test_an_impossible_token_has_a_finite_gradient(probability: float) -> None:
    """A request at another temperature may have one."""
    scores, p = torch.tensor([[200.0, 0.0, -10.0]], requires_grad=True), torch.tensor([[1.0, probability, probability]])
    step = sampled_step(torch.softmax(scores, -1), p, torch.tensor([1]))
    (step.matched + step.accepted).sum().backward()
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


MAKE_STEP: dict[str, Callable[..., Step]] = {
    "sampled": sampled_step,
    "greedy": lambda q, p, token: greedy_step(q, p, token, 4.0),
}


@pytest.mark.parametrize("kind", MAKE_STEP)
def test_survival_follows_each_chain_from_its_start_and_has_its_gradient(kind: str) -> None:
    scores, p = drawn(3, 2, 6, 4).requires_grad_(), torch.softmax(drawn(2, 6, 4, seed=1), -1)
    tokens = torch.randint(-1, 4, (2, 6), generator=torch.Generator().manual_seed(0))
    inside = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    starts = inside.clone()
    starts[0, 0] = False

    def steps(scores: Tensor) -> list[Step]:
        found = [MAKE_STEP[kind](torch.softmax(s, -1).flatten(0, 1), p.flatten(0, 1), tokens.flatten()) for s in scores]
        return [Step(*(x.view(2, 6) for x in step)) for step in found]

    sums, counts = survival(steps(scores), starts, inside)
    chain = steps(scores.detach())
    for b, k in product(range(2), range(3)):
        whole = [s for s in range(6 - k) if bool(starts[b, s]) and bool(inside[b, s + k])]
        reached = [math.prod(float(chain[i].matched[b, s + i]) for i in range(k)) for s in whole]
        expected = sum(r * float(chain[k].accepted[b, s + k]) for r, s in zip(reached, whole, strict=True))
        assert float(sums[b, k].detach()) == pytest.approx(expected)
        assert int(counts[b, k]) == len(whole)
    assert counts.tolist() == [[5, 4, 3], [4, 3, 2]]
    assert torch.autograd.gradcheck(lambda scores: survival(steps(scores), starts, inside)[0], (scores,))
    (grad,) = torch.autograd.grad(sums.sum(), scores)
    assert bool((grad[:, 0, 3].abs().sum(-1) > 0).all())


# --- seconds saved ---

SURVIVED = torch.tensor([0.8, 0.6, 0.4], dtype=torch.float64)
COSTS = (
    PlanCost(1, 0, 1.0, 1.02),
    PlanCost(1, 2, 1.0, 1.4),
    PlanCost(1, 3, 1.0, 1.7, share=3.0),
    PlanCost(8, 0, 2.0, 2.1, share=0.5),
    PlanCost(8, 2, 2.0, 6.0, share=0.5),
)


@pytest.mark.parametrize(
    ("speedup", "expected"),
    [
        (1.0, 5 * 1.1 - 1 * 0.1),  # batch 1: 2.4 - 1.4 = 1.0 and 2.8 - 1.7 = 1.1; batch 8: 2 - 2.1 and 4.8 - 6
        (2.0, 5 * -0.4 + 1 * (2 - 4.2)),  # batch 1: 2.4 - 2.8 = -0.4 against 2.8 - 3.4 and 1 - 2.04
    ],
)
def test_seconds_saved_by_hand_and_its_gradient_through_the_best_plan(speedup: float, expected: float) -> None:
    """By the envelope theorem; gradcheck chooses the best plan again at every point."""
    assert float(seconds_saved(SURVIVED, COSTS, speedup=speedup)) == pytest.approx(expected / 7)
    survived = SURVIVED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seconds_saved(x, COSTS, speedup=speedup), (survived,))


def test_without_a_worthwhile_plan_the_draft_has_no_gradient() -> None:
    survived = SURVIVED.clone().requires_grad_()
    seconds_saved(survived, [PlanCost(4, 0, 1.0, 1.0), PlanCost(4, 3, 1.0, 9.0)]).backward()
    assert survived.grad is not None and survived.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("num_steps", -1),
        ("plain_s", 0.0),
        ("round_s", math.nan),
        ("share", -1.0),
        ("share", math.inf),
    ],
)
def test_a_cost_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="plan's cost must be"):
        PlanCost(**{"batch_size": 1, "num_steps": 1, "plain_s": 1.0, "round_s": 1.0, name: value})


@pytest.mark.parametrize("costs", [[], [PlanCost(1, 1, 1.0, 1.0, share=0.0)]])
def test_seconds_saved_needs_a_share(costs: list[PlanCost]) -> None:
    with pytest.raises(ValueError, match="costs must be"):
        seconds_saved(SURVIVED, costs)
