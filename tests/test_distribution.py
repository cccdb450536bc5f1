"""Sampled tokens are distributed as the target's own, for any drafts.

Given the tokens before it, every committed token x must be a draw from the target's p. Over the tokens of a group (all
that follow the same token, or all that came k-th in their round) the counts O_v = Σ 1[x = v] then have mean Σ p and
covariance Σ (diag(p) - p pᵀ), both known exactly, and Σ_groups (O - E)ᵀ C⁻ (O - E) is chi-square distributed with
V - 1 degrees of freedom per group (martingale central limit; thousands of tokens per group).

Odds: each of the 12 statistics is rejected at ALPHA = 8e-6, so the odds of a false failure are below 1e-4 for all
together; the seeds are fixed. Power: in 20,000 tokens grouped by the token before (90 degrees of freedom), 3.5 % of
the target's mass moved to one token is detected with odds above 95 % (`test_the_power_of_the_statistic`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, repeat

import numpy as np
import pytest
import torch
from tiny import CONFIG, Listed, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding import verify
from specrl.decoding.engine import LocalEngine
from specrl.decoding.sampling import Temperatures, distribution, sample
from specrl.decoding.verify import Accepted

ALPHA = 8e-6
V = CONFIG.vocab_size
BATCH, NEW, PROMPT = 250, 80, 3
TEMPERATURES = (0.7, 1.0, 1.5)
REDUCED = (1, 2, 4, 5, 8)
PLAIN, CHAIN, TREE = (Plan(0),), (Plan(3),), (Plan(3, 2, 6),)
SWITCHING = (Plan(2), Plan(0), Plan(3, 2, 6), Plan(5), Plan(1, 3, 4), Plan(0), Plan(1))


def p_value(tokens: Tensor, p: Tensor, groups: Tensor) -> float:
    """Odds of counts at least as far off if `tokens [N]` are drawn from `p [N, V]`; `groups [N]` are known before."""
    stat, freedom = 0.0, 0
    p = p.double()
    for group in groups.unique():
        here = p[groups == group]
        off = torch.bincount(tokens[groups == group], minlength=V) - here.sum(0)
        covariance = torch.diag(here.sum(0)) - here.T @ here
        stat += float(off[1:] @ torch.linalg.solve(covariance[1:, 1:], off[1:]))
        freedom += V - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(stat / 2.0)))


class Decoded:
    """Tokens that a session committed, with the target's distributions and where in its round each came.

    Only the first BATCH requests count, and all of them to their end: stopping after some rounds would favour those
    with many accepted drafts.
    """

    def __init__(self, plans: tuple[Plan, ...], rejection: bool, vocabulary: tuple[int, ...] | None = None) -> None:
        target = tiny_target()
        draft = tiny_draft(updates=10)  # so few that many drafts are rejected
        if vocabulary is not None:
            draft = with_vocabulary(draft, vocabulary)
        listed = [
            Request(prompt, NEW, temperature, ignore_eos=True)
            for prompt, temperature in zip(prompts(BATCH, PROMPT), cycle(TEMPERATURES), strict=False)
        ]
        engine = LocalEngine(target, draft, max_context=640, use_rejection_sampling=rejection)
        session = engine.start(Once(listed), batch_size=BATCH, seed=11, plain=plans == PLAIN)
        done: dict[int, tuple[int, ...]] = {}
        came: dict[int, list[int]] = {i: [0] for i in range(BATCH)}  # the first token is the prefill's
        correct = proposed = 0
        for plan in cycle(plans):
            round_ = session.round(plan)
            correct, proposed = correct + int(round_.correct_drafts.sum()), proposed + BATCH * plan.num_steps
            for request, kept in zip(round_.request_ids.tolist(), round_.tokens.tolist(), strict=True):
                came.setdefault(request, []).extend(range(kept))
            done |= {c.request_id: c.prompt + c.tokens for c in round_.finished if c.request_id < BATCH}
            if len(done) == BATCH:
                break
        self.accept_rate = correct / max(1, proposed)
        ids = torch.tensor([done[i] for i in range(BATCH)])  # [B, PROMPT + NEW]
        logits = torch.cat([target(part) for part in ids.split(50)])[:, PROMPT - 1 : -1]
        temperatures = Temperatures.of([request.temperature for request in listed], "cpu")
        later = slice(1, None)  # without the prefill's token
        self.p = distribution(logits, temperatures)[:, later].flatten(0, 1)
        self.tokens = ids[:, PROMPT:][:, later].flatten()
        self.before = ids[:, PROMPT - 1 : -1][:, later].flatten()
        self.order = torch.tensor([came[i][1:] for i in range(BATCH)]).flatten()

    def p_values(self) -> tuple[float, float]:
        """By the token before, and by the order in the round."""
        return p_value(self.tokens, self.p, self.before), p_value(self.tokens, self.p, self.order)


class Once(Listed):
    """These requests, then others that do not end within the test."""

    def requests(self, seed: int) -> Iterator[Request]:
        yield from self.listed
        yield from repeat(Request((1,), 600, 1.0, ignore_eos=True))


@pytest.mark.parametrize(
    ("plans", "rejection", "vocabulary", "accepted"),
    [
        (PLAIN, True, None, 0.0),
        (CHAIN, True, None, 0.3),
        (CHAIN, True, REDUCED, 0.2),
        (CHAIN, False, None, 0.1),
        (TREE, True, None, 0.2),
        (SWITCHING, True, None, 0.2),
    ],
    ids=["plain", "rejection", "rejection-reduced", "target-only", "tree", "switching"],
)
def test_sampled_tokens_are_the_targets_own(
    plans: tuple[Plan, ...], rejection: bool, vocabulary: tuple[int, ...] | None, accepted: float
) -> None:
    decoded = Decoded(plans, rejection, vocabulary)
    assert decoded.accept_rate >= accepted  # else the acceptance is not tested
    assert min(decoded.p_values()) > ALPHA


def accepted(passes: Tensor, bonus: Callable[[Tensor], Tensor]) -> Accepted:
    """The drafts before the first that does not pass, and the bonus token after this many."""
    correct = passes.long().cumprod(-1).sum(-1)
    rows = torch.arange(passes.shape[1] + 1)
    return Accepted(correct, bonus(correct), torch.where(rows <= correct[:, None], rows, -1))


def wrong_residual(swapped: bool) -> Callable[..., Accepted]:
    """Rejection sampling with a wrong replacement: p instead of the residual, or the residual of q and p swapped."""

    def reject_chain(
        logits: Tensor, drafted: Tensor, q: Tensor, temperatures: Temperatures, rng: torch.Generator
    ) -> Accepted:
        p, index, steps = distribution(logits, temperatures), drafted[..., None], drafted.shape[1]
        rows = torch.arange(len(p))
        coins = torch.rand(drafted.shape, generator=rng)

        def bonus(correct: Tensor) -> Tensor:
            replacement = p[rows, correct]
            if swapped:
                residual = (q[rows, correct.clamp(max=steps - 1)] - replacement).clamp_min(0.0)
                replacement = torch.where((correct < steps)[:, None], residual, replacement)
            return sample(replacement + 1e-30, rng)

        return accepted(coins * q.gather(-1, index)[..., 0] < p[:, :-1].gather(-1, index)[..., 0], bonus)

    return reject_chain


def lenient(chosen: Tensor, drafted: Tensor) -> Accepted:
    """Target-only acceptance that also accepts every fifth draft that the target did not choose."""
    passes = (chosen[:, :-1] == drafted) | (torch.arange(drafted.numel()).view(drafted.shape) % 5 == 0)
    return accepted(passes, lambda correct: chosen.gather(1, correct[:, None])[:, 0])


@pytest.mark.parametrize(
    ("name", "rule", "rejection"),
    [
        ("reject_chain", wrong_residual(swapped=False), True),
        ("reject_chain", wrong_residual(swapped=True), True),
        ("accept_chain", lenient, False),
    ],
    ids=["replaced by p", "residual swapped", "lenient"],
)
def test_wrong_acceptance_is_detected(
    name: str, rule: object, rejection: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, name, rule)
    assert min(Decoded(CHAIN, rejection).p_values()) < ALPHA


def test_the_power_of_the_statistic() -> None:
    """100 runs of 20,000 tokens: none is rejected, but 95 of 100 are if 3.5 % of the mass is moved."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    p = torch.softmax(1.5 * torch.randn(2000, V, generator=generator), -1).repeat(10, 1)
    right, wrong = [], []
    for _ in range(100):
        groups = torch.from_numpy(rng.integers(0, V, len(p)))
        tokens = sample(p, generator)
        right.append(p_value(tokens, p, groups))
        moved = torch.rand(len(p), generator=generator) < 0.035
        wrong.append(p_value(torch.where(moved, 4, tokens), p, groups))
    assert min(right) > ALPHA and 0.3 < np.mean(right) < 0.7
    assert np.mean(np.array(wrong) < ALPHA) > 0.95
