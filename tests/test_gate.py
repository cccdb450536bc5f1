from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Listed, prompts, tiny_draft, tiny_target
from torch import Tensor

from specrl.agents.draft.gate import Gate, expected_rounds, judge_trial
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine

SEEDS = range(5)


@cache
@torch.inference_mode(False)
def sequences(
    seed: int = 1, temperature: float = 1.0, count: int = 32, rounds: int = 24
) -> tuple[TrainingSequence, ...]:
    """What the target said, after prompts that no draft learnt from."""
    listed = [Request(p, rounds, temperature, ignore_eos=True) for p in prompts(count, 4, seed=seed)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    session = engine.start(Listed(listed), batch_size=count, seed=seed, trace=True)
    assembler = Assembler()
    found: list[TrainingSequence] = []
    for _ in range(rounds):
        session.round(Plan(0))
        found += assembler.add(session.drain())
    return tuple(found[:count])


def gate(**changes: Any) -> Gate:
    return Gate(tiny_draft().config, tiny_target().embedding, **changes)


def learnt(rate: float, updates: int = 30, **changes: Any) -> Mapping[str, Tensor]:
    """Candidate weights: the serving draft, learning on from fresh traffic at this rate."""
    config = LearnerConfig(dtype="float32", learning_rate=rate, ema_decay=0.0, **changes)
    learner = OnlineLearner(tiny_draft(), tiny_target().embedding, config)
    fresh = sequences(seed=2, count=64)
    for i in range(updates):
        learner.update(list(fresh[(4 * i) % 64 :][:4]))
    return learner.weights()[1]


def changed(name: str, index: int, value: float) -> Mapping[str, Tensor]:
    tensors = {n: t.clone() for n, t in tiny_draft().tensors.items()}
    tensors[name].view(-1)[index] = value
    return tensors


def rounds_decoded(temperature: float, num_steps: int) -> np.ndarray:
    """Rounds that live speculative decoding of the first 64 requests takes: [64]."""
    listed = [Request(p, 24, temperature, ignore_eos=True) for p in prompts(64, 4, seed=1)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64, use_rejection_sampling=True)
    session = engine.start(Listed(listed), batch_size=64, seed=0)
    rounds = np.zeros(64)
    for _ in range(23):
        ids = session.round(Plan(num_steps)).request_ids
        rounds[ids[ids < 64]] += 1
    return rounds


def rounds_expected(temperature: float, num_steps: int) -> np.ndarray:
    """The gate's, from what plain decoding said: 23 tokens after prefill."""
    given = sequences(1, temperature, 64)
    ours = gate(num_steps=num_steps, sampled=temperature > 0)
    return 23 / ours.accept_lengths(tiny_draft().tensors, given)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_greedy_accept_lengths_are_those_of_decoding(num_steps: int) -> None:
    """Request by request, to the round."""
    live = rounds_decoded(0.0, num_steps)
    np.testing.assert_allclose(rounds_expected(0.0, num_steps), live, atol=1e-4)
    assert len(set(live)) > 5


@pytest.mark.parametrize("num_steps", [1, 3])
def test_sampled_accept_lengths_are_those_of_decoding(num_steps: int) -> None:
    """On other texts of the same target, within 4 standard errors of both: one time in 15,000 they are not."""
    live, computed = rounds_decoded(1.0, num_steps), rounds_expected(1.0, num_steps)
    error = np.hypot(live.std() / 8, computed.std() / 8)
    assert abs(computed.mean() - live.mean()) < 4 * error
    assert error < 0.7 and computed.mean() < 18


def test_expected_rounds_are_those_of_walking_the_tokens() -> None:
    """Two requests, one shorter; within 5 standard errors of 4,000 walks, so less than once in a million."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.arange(7) < torch.tensor([[7], [4]])
    matched = [torch.rand(2, 7, generator=generator) * inside for _ in range(3)]
    for odds in matched:
        odds[torch.arange(2), torch.tensor([6, 3])] = 0.0  # not known
    computed, rng = expected_rounds(matched, inside), np.random.default_rng(0)
    for b, end in enumerate((7, 4)):
        walks = []
        for _ in range(4000):
            t = rounds = 0
            while t < end:
                k = 0
                while k < 3 and t + k < end and rng.random() < float(matched[k][b, t + k]):
                    k += 1
                t, rounds = t + k + 1, rounds + 1
            walks.append(rounds)
        assert abs(float(computed[b, 0]) - np.mean(walks)) < 5 * np.std(walks) / 4000**0.5
        assert float(computed[b, end - 1]) == 1.0 and not computed[b, end:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight", "norm.weight"])
def test_one_number_that_is_not_finite_never_passes(name: str, value: float) -> None:
    verdict = gate().compare(tiny_draft().tensors, changed(name, 3, value), sequences())
    assert not verdict.passed and verdict.harmful
    assert str(verdict) == f"refused: the candidate's {name} is not finite"


def test_weights_that_are_finite_and_overflow_never_pass() -> None:
    huge = {n: t * 1e38 if n == "lm_head.weight" else t for n, t in tiny_draft().tensors.items()}
    verdict = gate().compare(tiny_draft().tensors, huge, sequences())
    assert not verdict.passed and verdict.harmful


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sampled", [True, False])
def test_random_weights_never_pass(seed: int, sampled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    poisoned = {
        n: torch.randn(t.shape, generator=generator) * t.std() if t.ndim > 1 else t
        for n, t in tiny_draft().tensors.items()
    }
    verdict = gate(sampled=sampled, seed=seed).compare(
        tiny_draft().tensors, poisoned, sequences(temperature=float(sampled))
    )
    assert not verdict.passed and verdict.harmful
    assert verdict.interval is not None and verdict.interval.high < -0.1


@pytest.mark.parametrize("rate", [0.5, 5.0])
def test_a_candidate_learnt_a_hundred_times_too_fast_never_passes(rate: float) -> None:
    verdict = gate().compare(tiny_draft().tensors, learnt(rate), sequences())
    assert not verdict.passed and verdict.harmful


def test_words_in_the_wrong_order_never_pass() -> None:
    """Weights that are all plausible, beside a head whose rows were shuffled."""
    rolled = {n: t.roll(1, 0) if n == "lm_head.weight" else t for n, t in tiny_draft().tensors.items()}
    verdict = gate().compare(tiny_draft().tensors, rolled, sequences())
    assert not verdict.passed and verdict.harmful


def test_a_better_candidate_passes_even_where_a_gain_must_be_proven() -> None:
    verdict = gate(min_gain=0.0).compare(tiny_draft(5).tensors, tiny_draft().tensors, sequences())
    assert verdict.passed and not verdict.harmful
    assert verdict.interval is not None and verdict.interval.low > 0
    assert str(verdict).startswith("passed: accept length 1.") and str(verdict).endswith("above 0")
    back = gate(min_gain=0.0).compare(tiny_draft().tensors, tiny_draft(5).tensors, sequences())
    assert not back.passed and back.harmful


def test_the_serving_draft_itself_passes_unless_a_gain_must_be_proven() -> None:
    same = dict(tiny_draft().tensors)
    assert gate().compare(tiny_draft().tensors, same, sequences()).passed
    proven = gate(min_gain=0.0).compare(tiny_draft().tensors, same, sequences())
    assert not proven.passed and not proven.harmful


def test_too_few_or_too_short_sequences_pass_nothing() -> None:
    better = (tiny_draft(5).tensors, tiny_draft().tensors)
    assert gate().compare(*better, sequences()[:8]).passed
    verdict = gate().compare(*better, sequences()[:7])
    assert not verdict.passed and not verdict.harmful and verdict.interval is None
    assert str(verdict) == "refused: 7 held-out sequences are fewer than the required 8"
    short = sequences(seed=3, count=32, rounds=2)  # 4 tokens of a prompt, and 1 whose next is known
    assert "0 held-out" in gate(num_steps=4).compare(*better, short).reason


def test_a_draft_of_a_reduced_vocabulary_is_judged_by_its_own_words() -> None:
    from tiny import with_vocabulary

    some = [with_vocabulary(tiny_draft(), kept) for kept in ((1, 2, 3, 4, 5), (0, 6, 7, 8, 9))]
    whole = gate().accept_lengths(tiny_draft().tensors, sequences())
    for draft in some:
        ours = Gate(draft.config, tiny_target().embedding)
        assert 1.0 < ours.accept_lengths(draft.tensors, sequences()).mean() < whole.mean()


# --- the trial ---


def speeds(ratio: float, pairs: int = 40, noise: float = 0.1, seed: int = 0) -> tuple[Any, Any]:
    """Tokens per second of pairs that share slow and fast moments."""
    rng = np.random.default_rng(seed)
    shared = 100 * np.exp(rng.normal(0, 0.5, pairs))
    ours, theirs = np.exp(rng.normal(0, noise, (2, pairs)))
    return shared * ours, shared * ratio * theirs


@pytest.mark.parametrize(
    ("ratio", "passed", "harmful", "says"),
    [
        (1.1, True, False, "above 0.95"),
        (1.05, True, False, "above 0.95"),
        (0.95, False, False, "not significantly above 0.95"),
        (0.8, False, True, "below 0.95"),
    ],
)
def test_a_trial_judges_the_ratio_of_speeds(ratio: float, passed: bool, harmful: bool, says: str) -> None:
    """The standard error is 0.022; the seed is fixed."""
    verdict = judge_trial(*speeds(ratio), rng=np.random.default_rng(0))
    assert (verdict.passed, verdict.harmful) == (passed, harmful)
    assert verdict.interval is not None and abs(verdict.interval.value / ratio - 1) < 0.05
    assert verdict.reason.endswith(f"over 40 pairs, {says}")


def test_a_trial_of_a_draft_just_too_slow_passes_one_time_in_forty() -> None:
    """Of 400, 10 are expected and 25 come less than once in 10,000."""
    passed = 0
    for seed in range(400):
        passed += judge_trial(*speeds(0.95, pairs=12, seed=seed), rng=np.random.default_rng(seed)).passed
    assert 1 <= passed <= 25


def test_too_few_pairs_pass_nothing() -> None:
    verdict = judge_trial(*speeds(2.0, pairs=7), rng=np.random.default_rng(0))
    assert not verdict.passed and not verdict.harmful and "7 pairs are fewer than the required 8" in verdict.reason


@pytest.mark.parametrize("speed", [0.0, float("nan"), float("inf"), -1.0])
def test_a_candidate_without_a_speed_is_harmful(speed: float) -> None:
    ours, theirs = speeds(2.0)
    theirs[5] = speed
    verdict = judge_trial(ours, theirs, rng=np.random.default_rng(0))
    assert not verdict.passed and verdict.harmful


def test_a_trial_needs_pairs() -> None:
    ours, theirs = speeds(1.0)
    with pytest.raises(ValueError, match="must be paired"):
        judge_trial(ours[1:], theirs, rng=np.random.default_rng(0))
    ours[0] = 0.0
    with pytest.raises(ValueError, match="must be above 0"):
        judge_trial(ours, theirs, rng=np.random.default_rng(0))
