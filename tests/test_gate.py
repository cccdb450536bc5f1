from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Listed, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.agents.draft.gate import Gate, Verdict, expected_rounds, judge_trial
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine

TENSORS = tiny_draft().tensors


@cache
@torch.inference_mode(False)
def sequences(
    seed: int = 1, temperature: float = 1.0, count: int = 32, rounds: int = 24
) -> tuple[TrainingSequence, ...]:
    """The target's continuations of prompts that no draft was trained on."""
    listed = [Request(p, rounds, temperature, ignore_eos=True) for p in prompts(count, 4, seed=seed)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    session = engine.start(Listed(listed), batch_size=count, seed=seed, trace=True)
    for _ in range(rounds):
        session.round(Plan(0))
    return tuple(Assembler().add(session.drain())[:count])


def gate(**changes: Any) -> Gate:
    return Gate(tiny_draft().config, tiny_target().embedding, **changes)


def compare(candidate: Mapping[str, Tensor], **changes: Any) -> Verdict:
    return gate(**changes).compare(TENSORS, candidate, sequences())


def trained(learning_rate: float) -> Mapping[str, Tensor]:
    """The serving draft after further training on fresh traffic."""
    config = LearnerConfig(dtype="float32", learning_rate=learning_rate, ema_decay=0.0)
    learner = OnlineLearner(tiny_draft(), tiny_target().embedding, config)
    fresh = sequences(seed=2, count=64)
    for i in range(30):
        learner.update(list(fresh[(4 * i) % 64 :][:4]))
    return learner.weights()[1]


def with_value(name: str, value: float) -> Mapping[str, Tensor]:
    tensors = {n: t.clone() for n, t in TENSORS.items()}
    tensors[name].view(-1)[3] = value
    return tensors


def decoded_rounds(temperature: float, num_steps: int) -> np.ndarray:
    """Rounds that live speculative decoding of the first 64 requests takes: [64]."""
    listed = [Request(p, 24, temperature, ignore_eos=True) for p in prompts(64, 4, seed=1)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64, use_rejection_sampling=True)
    session = engine.start(Listed(listed), batch_size=64, seed=0)
    rounds = np.zeros(64)
    for _ in range(23):
        ids = session.round(Plan(num_steps)).request_ids
        rounds[ids[ids < 64]] += 1
    return rounds


def computed_rounds(temperature: float, num_steps: int) -> np.ndarray:
    """The same, computed by the gate from plain decoding: 23 tokens after prefill."""
    lengths = gate(num_steps=num_steps, sampled=temperature > 0).accept_lengths(TENSORS, sequences(1, temperature, 64))
    return 23 / lengths


@pytest.mark.parametrize("num_steps", [1, 3])
def test_accept_lengths_are_those_of_decoding(num_steps: int) -> None:
    """Greedy: for each request. Sampled: within 4 standard errors on other texts, except one time in 15,000."""
    live = decoded_rounds(0.0, num_steps)
    np.testing.assert_allclose(computed_rounds(0.0, num_steps), live, atol=1e-4)
    assert len(set(live)) > 5
    live, computed = decoded_rounds(1.0, num_steps), computed_rounds(1.0, num_steps)
    error = np.hypot(live.std() / 8, computed.std() / 8)
    assert abs(computed.mean() - live.mean()) < 4 * error
    assert error < 0.7 and computed.mean() < 18


def test_expected_rounds_are_those_of_simulated_rounds() -> None:
    """Two requests, one shorter; within 5 standard errors of 2,000 simulations, so less than once in a million."""
    generator = torch.Generator().manual_seed(0)
    inside = torch.arange(7) < torch.tensor([[7], [4]])
    matched = [torch.rand(2, 7, generator=generator) * inside for _ in range(3)]
    for probability in matched:
        probability[torch.arange(2), torch.tensor([6, 3])] = 0.0  # not known
    computed, rng = expected_rounds(matched, inside), np.random.default_rng(0)
    for b, end in enumerate((7, 4)):
        simulated = []
        for _ in range(2000):
            t = rounds = 0
            while t < end:
                k = 0
                while k < 3 and t + k < end and rng.random() < float(matched[k][b, t + k]):
                    k += 1
                t, rounds = t + k + 1, rounds + 1
            simulated.append(rounds)
        assert abs(float(computed[b, 0]) - np.mean(simulated)) < 5 * np.std(simulated) / 2000**0.5
        assert float(computed[b, end - 1]) == 1.0 and not computed[b, end:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["fc.weight", "lm_head.weight", "norm.weight"])
def test_a_value_that_is_not_finite_never_passes(name: str, value: float) -> None:
    verdict = compare(with_value(name, value))
    assert not verdict.passed and verdict.harmful
    assert str(verdict) == f"refused: the candidate's {name} is not finite"


def random_weights(seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) * t.std() if t.ndim > 1 else t for n, t in TENSORS.items()}


CANDIDATES = {
    "overflow": lambda: {**TENSORS, "lm_head.weight": TENSORS["lm_head.weight"] * 1e38},
    "shuffled head": lambda: {**TENSORS, "lm_head.weight": TENSORS["lm_head.weight"].roll(1, 0)},
    "learning rate 0.5": lambda: trained(0.5),
    "learning rate 5": lambda: trained(5.0),
    "random 0": lambda: random_weights(0),
    "random 1": lambda: random_weights(1),
}


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("sampled", [True, False])
def test_bad_weights_never_pass(candidate: str, sampled: bool) -> None:
    texts = sequences(temperature=float(sampled))
    verdict = gate(sampled=sampled).compare(TENSORS, CANDIDATES[candidate](), texts)
    assert not verdict.passed and verdict.harmful


def test_a_better_candidate_passes_and_a_worse_one_is_harmful() -> None:
    worse = tiny_draft(5).tensors
    verdict = gate(min_gain=0.0).compare(worse, TENSORS, sequences())
    assert verdict.passed and not verdict.harmful
    assert verdict.interval is not None and verdict.interval.low > 0
    assert str(verdict).startswith("passed: accept length 1.") and str(verdict).endswith("above 0")
    back = compare(worse, min_gain=0.0)
    assert not back.passed and back.harmful


def test_equal_weights_pass_unless_a_gain_is_required() -> None:
    assert compare(TENSORS).passed
    verdict = compare(TENSORS, min_gain=0.0)
    assert not verdict.passed and not verdict.harmful


def test_too_few_or_too_short_sequences_pass_nothing() -> None:
    drafts = (tiny_draft(5).tensors, TENSORS)
    assert gate().compare(*drafts, sequences()[:8]).passed
    verdict = gate().compare(*drafts, sequences()[:7])
    assert not verdict.passed and not verdict.harmful and verdict.interval is None
    assert str(verdict) == "refused: 7 held-out sequences are fewer than the required 8"
    short = sequences(seed=3, count=32, rounds=2)  # 4 tokens of a prompt, and 1 whose next is known
    assert "0 held-out" in gate(num_steps=4).compare(*drafts, short).reason


def test_a_reduced_vocabulary_has_a_smaller_accept_length() -> None:
    whole = gate().accept_lengths(TENSORS, sequences())
    for vocabulary in ((1, 2, 3, 4, 5), (0, 6, 7, 8, 9)):
        draft = with_vocabulary(tiny_draft(), vocabulary)
        reduced = Gate(draft.config, tiny_target().embedding).accept_lengths(draft.tensors, sequences())
        assert 1.0 < reduced.mean() < whole.mean()


def judge(ratio: float, pairs: int = 40, seed: int = 0, **changes: float) -> Verdict:
    """Judge pairs that share slow and fast moments; `changes` set a speed of the 'candidate' or the 'serving' draft."""
    rng = np.random.default_rng(seed)
    shared = 100 * np.exp(rng.normal(0, 0.5, pairs))
    noise = np.exp(rng.normal(0, 0.1, (2, pairs)))
    speeds = {"serving": shared * noise[0], "candidate": shared * ratio * noise[1]}
    for name, value in changes.items():
        speeds[name][5] = value
    return judge_trial(**speeds, rng=np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("ratio", "passed", "harmful", "position"),
    [
        (1.1, True, False, "above 0.95"),
        (1.05, True, False, "above 0.95"),
        (0.95, False, False, "not significantly above 0.95"),
        (0.8, False, True, "below 0.95"),
    ],
)
def test_a_trial_judges_the_ratio_of_speeds(ratio: float, passed: bool, harmful: bool, position: str) -> None:
    """The standard error is 0.022; the seed is fixed."""
    verdict = judge(ratio)
    assert (verdict.passed, verdict.harmful) == (passed, harmful)
    assert verdict.interval is not None and abs(verdict.interval.value / ratio - 1) < 0.05
    assert verdict.reason.endswith(f"over 40 pairs, {position}")


def test_a_trial_of_a_draft_just_too_slow_passes_one_time_in_forty() -> None:
    """Of 400, 10 are expected and 25 occur less than once in 10,000."""
    assert 1 <= sum(judge(0.95, pairs=12, seed=seed).passed for seed in range(400)) <= 25


def test_a_trial_needs_pairs_of_valid_speeds() -> None:
    verdict = judge(2.0, pairs=7)
    assert not verdict.passed and not verdict.harmful and "fewer than the required 8" in verdict.reason
    for speed in (0.0, float("nan"), float("inf"), -1.0):
        verdict = judge(2.0, candidate=speed)
        assert not verdict.passed and verdict.harmful
    with pytest.raises(ValueError, match="above 0"):
        judge(1.0, serving=0.0)
    with pytest.raises(ValueError, match="paired"):
        judge_trial(np.ones(9), np.ones(10), rng=np.random.default_rng(0))
