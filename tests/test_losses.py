import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specrl.agents.draft.losses import (
    CHAIN_LOSSES,
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
from specrl.core.interfaces import PlanCost

SLOTS, WORDS, OUTSIDE = 5, 6, 3  # the target has 3 tokens that the draft cannot say
TOKENS = torch.tensor([0, 5, -1, 2, 2])


def slots(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores [N, Vd] of the draft with gradients, and p [N, Vd + outside] of the target, both float64."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(SLOTS, WORDS, generator=generator, dtype=torch.float64).requires_grad_()
    return scores, torch.softmax(2 * torch.randn(SLOTS, WORDS + OUTSIDE, generator=generator, dtype=torch.float64), -1)


def in_words(name: str, q: Tensor, p: Tensor, tokens: Tensor) -> list[float]:
    """The formulas, number by number, with q = 0 on the tokens that the draft cannot say."""
    out = []
    for q_n, p_n, token in zip(q.tolist(), p.tolist(), tokens.tolist(), strict=True):
        whole = [*q_n, *[0.0] * OUTSIDE]
        pairs = list(zip(p_n, whole, strict=True))
        if name == "forward_kl":  # plus the entropy of what is inside, so that it is a cross-entropy
            kl = sum(a * math.log(a / b) for a, b in pairs if b > 0)
            out.append(kl - sum(a * math.log(a) for a, b in pairs if b > 0))
        elif name == "reverse_kl":
            out.append(sum(b * math.log(b / a) for a, b in pairs if b > 0))
        elif name == "next_token":
            out.append(0.0 if token < 0 else -math.log(q_n[token]))
        elif name == "total_variation":
            out.append(0.5 * sum(abs(a - b) for a, b in pairs))
        else:
            out.append(-math.log(sum(min(a, b) for a, b in pairs)))
    return out


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_loss_is_its_formula_over_the_whole_vocabulary_and_has_its_gradient(name: str) -> None:
    scores, p = slots()

    def loss(scores: Tensor) -> Tensor:
        return SLOT_LOSSES[name](torch.log_softmax(scores, -1), p[:, :WORDS], TOKENS)

    assert loss(scores).shape == (SLOTS,)
    assert loss(scores).tolist() == pytest.approx(in_words(name, torch.softmax(scores, -1), p, TOKENS), abs=1e-9)
    assert torch.autograd.gradcheck(loss, (scores,))


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_loss_is_least_where_the_draft_says_what_the_target_says(name: str) -> None:
    """Of the next token's cross-entropy the mean over p is."""
    scores, p = slots()
    p = p[:, :WORDS] / p[:, :WORDS].sum(-1, keepdim=True)

    def mean(logq: Tensor) -> Tensor:
        if name != "next_token":
            return SLOT_LOSSES[name](logq, p, TOKENS).sum()
        every = [SLOT_LOSSES[name](logq, p, torch.full((SLOTS,), x)) * p[:, x] for x in range(WORDS)]
        return torch.stack(every).sum()

    least = float(mean(p.log()))
    for seed in range(20):
        noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert float(mean(torch.log_softmax(p.log() + 0.3 * noise, -1))) > least + 1e-4


@pytest.mark.parametrize("name", SLOT_LOSSES)
def test_a_slot_loss_is_finite_where_a_distribution_has_zeros(name: str) -> None:
    scores = torch.tensor([[90.0, -90.0, 0.0]], requires_grad=True)
    p = torch.tensor([[0.0, 1.0, 0.0]])
    loss = SLOT_LOSSES[name](torch.log_softmax(scores, -1), p, torch.tensor([1])).sum()
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def test_mass_that_the_draft_cannot_say_is_lost_for_acceptance() -> None:
    p = torch.tensor([[0.3, 0.1]])  # 0.6 outside
    logq = torch.tensor([[0.75, 0.25]]).log()
    assert float(acceptance(logq.exp(), p)) == pytest.approx(0.4)
    assert float(SLOT_LOSSES["total_variation"](logq, p, TOKENS[:1])) == pytest.approx(0.6)
    assert float(SLOT_LOSSES["lk"](logq, p, TOKENS[:1])) == pytest.approx(-math.log(0.4))


def test_the_lk_gradient_is_that_of_total_variation_over_alpha() -> None:
    scores, p = slots()
    logq = torch.log_softmax(scores, -1)
    alpha = acceptance(logq.exp(), p[:, :WORDS]).detach()
    grads = [
        torch.autograd.grad(SLOT_LOSSES[name](logq, p[:, :WORDS], TOKENS).sum(), scores, retain_graph=True)[0]
        for name in ("lk", "total_variation")
    ]
    torch.testing.assert_close(grads[0], grads[1] / alpha[:, None])


def test_a_mixture_is_the_weighted_sum() -> None:
    scores, p = slots()
    args = torch.log_softmax(scores, -1), p[:, :WORDS], TOKENS
    mixture = parse_loss("lk : 0.25 + forward_kl+seconds_saved:2")
    assert mixture.slot == {"lk": 0.25, "forward_kl": 1.0} and mixture.chain == {"seconds_saved": 2.0}
    wanted = 0.25 * SLOT_LOSSES["lk"](*args) + SLOT_LOSSES["forward_kl"](*args)
    torch.testing.assert_close(mixture(*args), wanted)


@pytest.mark.parametrize("name", [*SLOT_LOSSES, *CHAIN_LOSSES])
def test_every_loss_is_known_by_its_name(name: str) -> None:
    mixture = parse_loss(name)
    assert {**mixture.slot, **mixture.chain} == {name: 1.0}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "must be one of forward_kl, .*seconds_saved.*but got ''"),
        ("kl", "must be one of .*but got 'kl'"),
        ("lk+", "must be one of .*but got 'lk\\+'"),
        ("lk+lk", "appear once .*but got 'lk\\+lk'"),
        ("lk:0", "weight above 0, but got 'lk:0'"),
        ("lk:-1", "weight above 0"),
        ("lk:nan", "weight above 0"),
        ("lk:inf", "weight above 0"),
        ("lk:", "weight above 0"),
        ("lk:half", "weight above 0, but got 'lk:half'"),
    ],
)
def test_a_loss_that_cannot_be_read_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_loss(text)


def test_top_k_keeps_the_best_and_makes_them_whole() -> None:
    p = torch.tensor([[0.1, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(top_k_of(p, 2), torch.tensor([[0.0, 0.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(top_k_of(p, 9)[0], p[0] / 0.6)


# --- chains: a world is p and q of the next token after every path, [.., V] for each depth ---

World = Callable[[tuple[int, ...]], tuple[Tensor, Tensor]]


def random_world(words: int, said: int, seed: int = 0) -> World:
    """p and q after a path, float64; the draft can say the first `said` tokens."""
    held: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def at(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if path not in held:
            generator = torch.Generator().manual_seed(seed + 1 + sum((x + 1) * 10**i for i, x in enumerate(path)))
            p, q = torch.softmax(1.5 * torch.randn(2, words, generator=generator, dtype=torch.float64), -1)
            q[said:] = 0.0
            held[path] = p, q / q.sum()
        return held[path]

    return at


def field_world(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """p = (.5, .5), q = (.9, .1), and then a draft that is right after token 0 and wrong after token 1."""
    if not path:
        return torch.tensor([0.5, 0.5]).double(), torch.tensor([0.9, 0.1]).double()
    p = torch.tensor([1.0, 0.0]).double()
    return p, p if path == (0,) else p.flip(0)


def rejection_sampling(world: World, depth: int, runs: int, seed: int) -> Tensor:
    """The share of `runs` whose first 1 .. depth drafts all stood (Leviathan et al., 2023, algorithm 1): [depth]."""
    rng, stood = np.random.default_rng(seed), np.zeros(depth)
    for _ in range(runs):
        path: tuple[int, ...] = ()
        for k in range(depth):
            p, q = (x.numpy() for x in world(path))
            draft = int(rng.choice(len(q), p=q))
            if rng.random() >= p[draft] / q[draft]:
                break
            stood[k] += 1
            path = (*path, draft)
    return torch.tensor(stood / runs)


def enumerated(world: World, depth: int, target_only: bool = False) -> Tensor:
    """P_k, exactly, by summing over every chain that could be drafted: [depth]."""
    out = []
    for k in range(1, depth + 1):
        total = 0.0
        for path in product(range(len(world(())[0])), repeat=k):
            odds = 1.0
            for i, x in enumerate(path):
                p, q = world(path[:i])
                odds *= float(p[x]) * (x == int(q.argmax())) if target_only else min(float(p[x]), float(q[x]))
            total += odds
        out.append(total)
    return torch.tensor(out, dtype=torch.float64)


def estimated(world: World, depth: int, said: int, step: Callable[..., Step]) -> Tensor:
    """The exact mean of the estimate over all paths of the target, weighted by their odds: [depth]."""
    paths = list(product(range(len(world(())[0])), repeat=depth))
    weights, steps = torch.ones(len(paths), 1, dtype=torch.float64), []
    for k in range(depth):
        p, q = (torch.stack(x) for x in zip(*(world(path[:k]) for path in paths), strict=True))
        tokens = torch.tensor([path[k] for path in paths])
        weights = weights * p.gather(-1, tokens[:, None])
        found = step(q[:, :said], p[:, :said], torch.where(tokens < said, tokens, -1))
        steps.append(Step(*(torch.zeros(len(paths), depth, dtype=torch.float64) for _ in range(2))))
        for held, value in zip(steps[-1], found, strict=True):
            held[:, k] = value
    starts = torch.zeros(len(paths), depth, dtype=torch.bool)
    starts[:, 0] = True
    sums, counts = survival(steps, starts, torch.ones_like(starts))
    assert bool((counts == 1).all())
    return (sums * weights).sum(0)


@pytest.mark.parametrize(("words", "said"), [(3, 3), (4, 2)])
def test_survival_is_unbiased_for_sampled_drafts(words: int, said: int) -> None:
    world = random_world(words, said)
    exact = enumerated(world, 4)
    torch.testing.assert_close(estimated(world, 4, said, sampled_step), exact)
    runs = 4000
    found = rejection_sampling(world, 4, runs, seed=0)  # a share is within 5 standard errors but once in a million
    assert bool(((found - exact).abs() < 5 * (exact * (1 - exact) / runs).sqrt()).all())
    assert exact[3] > 0.02


def test_the_product_of_alphas_is_biased_and_survival_is_not() -> None:
    exact = enumerated(field_world, 2)
    torch.testing.assert_close(exact, torch.tensor([0.6, 0.5]).double())
    torch.testing.assert_close(estimated(field_world, 2, 2, sampled_step), exact)
    naive = sum(0.5 * 0.6 * alpha for alpha in (1.0, 0.0))
    assert naive == pytest.approx(0.3)


def test_survival_is_exact_for_the_drafts_best_token() -> None:
    world = random_world(4, 3)
    torch.testing.assert_close(estimated(world, 3, 3, greedy_step), enumerated(world, 3, target_only=True))


def test_the_surrogate_is_exact_for_sharpened_drafts_and_tends_to_the_best_token() -> None:
    world = random_world(4, 3)
    limit = estimated(world, 3, 3, greedy_step)

    def soft(sharpness: float) -> Tensor:
        return estimated(world, 3, 3, lambda q, p, token: greedy_step(q, p, token, sharpness))

    gaps = [float((soft(sharpness) - limit).abs().max()) for sharpness in (1.0, 4.0, 16.0, 4096.0)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0.05 and gaps[-1] < 1e-6
    p, q = world(())
    s = q[:3] ** 4.0 / (q[:3] ** 4.0).sum()
    assert float(soft(4.0)[0]) == pytest.approx(float((s * p[:3]).sum()))


def test_a_step_of_a_token_that_the_draft_cannot_say_never_stands() -> None:
    q, p = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.1]])
    for step in (sampled_step, greedy_step):
        assert float(step(q, p, torch.tensor([-1])).matched) == 0.0
    assert float(sampled_step(q, p, torch.tensor([0])).matched) == 1.0
    assert float(sampled_step(q, p, torch.tensor([1])).matched) == pytest.approx(1.0)


@pytest.mark.parametrize("theirs", [0.0, 1e-42, 1e-38])
def test_a_token_that_the_target_never_says_gives_no_wild_gradient(theirs: float) -> None:
    """A request at another temperature may hold one."""
    scores = torch.tensor([[200.0, 0.0, -10.0]], requires_grad=True)
    step = sampled_step(torch.softmax(scores, -1), torch.tensor([[1.0, theirs, theirs]]), torch.tensor([1]))
    (step.matched + step.accepted).sum().backward()
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def drawn_steps(seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Scores of three passes [K, B, T, V], p [B, T, V], and tokens and `inside` of padded requests."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, 2, 6, 4, generator=generator, dtype=torch.float64)
    p = torch.softmax(torch.randn(2, 6, 4, generator=generator, dtype=torch.float64), -1)
    tokens = torch.randint(-1, 4, (2, 6), generator=generator)
    inside = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    return scores, [p, tokens], torch.tensor([[False, True, True, True, True, True], [True] * 6]) & inside, inside


def steps_of(scores: Tensor, p: Tensor, tokens: Tensor, step: Callable[..., Step]) -> list[Step]:
    return [
        Step(
            *(x.view(tokens.shape) for x in step(torch.softmax(s.flatten(0, 1), -1), p.flatten(0, 1), tokens.flatten()))
        )
        for s in scores
    ]


def test_survival_walks_each_chain_from_its_start_and_counts_only_whole_ones() -> None:
    scores, (p, tokens), starts, inside = drawn_steps()
    steps = steps_of(scores, p, tokens, sampled_step)
    sums, counts = survival(steps, starts, inside)
    for b in range(2):
        for k in range(3):
            total, count = 0.0, 0
            for s in range(6):
                if bool(starts[b, s]) and s + k < 6 and bool(inside[b, s + k]):
                    odds = math.prod(float(steps[i].matched[b, s + i]) for i in range(k))
                    total, count = total + odds * float(steps[k].accepted[b, s + k]), count + 1
            assert int(counts[b, k]) == count
            assert float(sums[b, k]) == pytest.approx(total)
    assert counts.tolist() == [[5, 4, 3], [4, 3, 2]]


SURROGATE: dict[str, Callable[..., Step]] = {
    "sampled": sampled_step,
    "greedy": lambda q, p, token: greedy_step(q, p, token, 4.0),
}


@pytest.mark.parametrize("kind", SURROGATE)
def test_survival_has_its_gradient(kind: str) -> None:
    scores, (p, tokens), starts, inside = drawn_steps()

    def sums(scores: Tensor) -> Tensor:
        return survival(steps_of(scores, p, tokens, SURROGATE[kind]), starts, inside)[0]

    assert torch.autograd.gradcheck(sums, (scores.requires_grad_(),))
    assert bool((torch.autograd.grad(sums(scores).sum(), scores)[0][:, 0, 3].abs().sum(-1) > 0).all())


# --- seconds saved ---

SURVIVED = (0.8, 0.6, 0.4)
COSTS = (
    PlanCost(1, 0, 1.0, 1.02),
    PlanCost(1, 2, 1.0, 1.4),
    PlanCost(1, 3, 1.0, 1.7, share=3.0),
    PlanCost(8, 0, 2.0, 2.1, share=0.5),
    PlanCost(8, 2, 2.0, 6.0, share=0.5),
)


def test_the_accept_length_counts_the_targets_own_token_and_no_step_beyond_the_chain() -> None:
    survived = torch.tensor(SURVIVED)
    assert [float(accept_length(survived, n)) for n in (0, 1, 3, 5)] == pytest.approx([1.0, 1.8, 2.8, 2.8])


def test_seconds_saved_by_hand() -> None:
    survived = torch.tensor(SURVIVED, dtype=torch.float64)
    whole = 1.0 + 1.0 + 3.0 + 1.0 + 1.0
    # Batch 1: 2.4 - 1.4 = 1.0 and 2.8 - 1.7 = 1.1; batch 8: 2 - 2.1 = -0.1 and 4.8 - 6 = -1.2.
    assert float(seconds_saved(survived, COSTS)) == pytest.approx((5 * 1.1 - 1 * 0.1) / whole)
    # At λ = 2 the shorter plan is the better one at batch 1: 2.4 - 2.8 = -0.4 against 2.8 - 3.4 and 1 - 2.04.
    assert float(seconds_saved(survived, COSTS, speedup=2.0)) == pytest.approx((5 * -0.4 + 1 * (2 - 4.2)) / whole)


@pytest.mark.parametrize("speedup", [1.0, 2.0])
def test_seconds_saved_has_its_gradient_even_through_the_best_plan(speedup: float) -> None:
    """By the envelope theorem; the differences of gradcheck choose the best plan anew at every point."""
    survived = torch.tensor(SURVIVED, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: seconds_saved(x, COSTS, speedup=speedup), (survived,))


def test_where_no_plan_pays_the_draft_gets_no_gradient() -> None:
    survived = torch.tensor(SURVIVED, requires_grad=True)
    dear = [PlanCost(4, 0, 1.0, 1.0), PlanCost(4, 3, 1.0, 9.0)]
    seconds_saved(survived, dear).backward()
    assert survived.grad is not None and survived.grad.abs().sum() == 0


def test_at_the_runs_own_speedup_the_best_plans_save_nothing_and_any_other_loses() -> None:
    """Dinkelbach: max over plans of the ratio is the λ at which the max of the difference is 0."""
    survived = torch.tensor(SURVIVED, dtype=torch.float64)
    ours = COSTS[:3]
    ratios = [c.plain_s * float(accept_length(survived, c.num_steps)) / c.round_s for c in ours]
    assert float(seconds_saved(survived, ours, speedup=max(ratios))) == pytest.approx(0.0, abs=1e-12)
    for cost in ours:
        assert float(seconds_saved(survived, [cost], speedup=max(ratios))) <= 1e-12


GOOD: dict[str, Any] = {"batch_size": 1, "num_steps": 1, "plain_s": 1.0, "round_s": 1.0}
BAD: dict[str, Any] = {"batch_size": 0, "num_steps": -1, "plain_s": 0.0, "round_s": math.nan, "share": -1.0}


@pytest.mark.parametrize("change", [*BAD.items(), ("share", math.inf)])
def test_a_cost_out_of_range_is_refused(change: tuple[str, Any]) -> None:
    PlanCost(**GOOD)
    with pytest.raises(ValueError, match="plan's cost must be"):
        PlanCost(**{**GOOD, change[0]: change[1]})


def test_seconds_saved_needs_a_share() -> None:
    for costs in ([], [PlanCost(1, 1, 1.0, 1.0, share=0.0)]):
        with pytest.raises(ValueError, match="a plan with a share above 0"):
            seconds_saved(torch.tensor(SURVIVED), costs)
