import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import AUX_LAYERS, Listed, prompts, tiny_target
from torch import Tensor

import specrl
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner, product_dtype
from specrl.agents.draft.sequences import Assembler
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.models.draft import Draft, ServingDraft, new_draft
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import load_workload

QUICK: dict[str, Any] = {"batch_size": 2, "updates_per_request": 1.0, "dtype": "float32"}
WORDS = (1, 2, 3, 5, 8)  # of the reduced vocabulary


def make(draft: Draft | None = None, seed: int = 0, **changes: Any) -> OnlineLearner:
    draft = tiny() if draft is None else draft
    return OnlineLearner(draft, tiny_target().embedding, LearnerConfig(**{**QUICK, **changes}), seed)


def tiny(vocabulary: Sequence[int] | None = None) -> Draft:
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    return new_draft(tiny_target(), vocabulary=ids, intermediate_size=16, aux_layers=AUX_LAYERS)


def traffic(count: int, seed: int = 0, new_tokens: int = 8, temperature: float = 1.0, length: int = 4) -> list[Trace]:
    """Traces of `count` requests that end together."""
    listed = [Request(prompt, new_tokens, temperature, ignore_eos=True) for prompt in prompts(count, length, seed=seed)]
    session = specrl.LocalEngine(tiny_target(), tiny(), max_context=32).start(
        Listed(listed), batch_size=count, seed=seed, trace=True
    )
    traces: list[Trace] = []
    while sum(len(trace.finished) for trace in traces) < count:
        session.round(Plan(0))
        traces += session.drain()
    ended = {request for trace in traces for request in trace.finished}
    return [trace for trace in traces if ended.issuperset(trace.request_ids.tolist())]  # not the next ones' prefills


def assert_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert list(some) == list(others)
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def test_learning_from_live_traffic_raises_the_accept_length() -> None:
    """From next to nothing after 48 requests; both numbers are deterministic but for the processor's arithmetic."""
    target = specrl.load_target("embedded")
    draft = new_draft(target, intermediate_size=64, seed=0)
    engine = specrl.LocalEngine(target, draft, max_context=64, use_rejection_sampling=True)
    tokenizer = load_tokenizer(embedded_directory())
    settings: dict[str, Any] = {"prompt_tokens": 16, "max_new_tokens": 32, "temperature": 0.5, "ignore_eos": True}

    def accept_length() -> float:
        workload = load_workload("stdlib", tokenizer, split="held_out", **settings)
        session = engine.start(workload, batch_size=16, seed=1)
        return float(np.mean([session.round(Plan(3)).accept_length for _ in range(20)]))

    before = accept_length()
    learner = OnlineLearner(draft, target.embedding, LearnerConfig(dtype="float32", ema_decay=0.9, batch_size=8))
    session = engine.start(load_workload("stdlib", tokenizer, **settings), batch_size=16, seed=0, trace=True)
    metrics = []
    for _ in range(3):
        for _ in range(31):
            session.round(Plan(0))
        metrics.append(learner.learn(session.drain()))
        version, weights = learner.weights()
        engine.load_draft(weights, version=version)
    assert learner.requests == 48 and engine.draft_version == learner.updates == 72
    assert metrics[2]["loss"] < 0.9 * metrics[0]["loss"] and metrics[2]["alpha_1"] > 1.3 * metrics[0]["alpha_1"]
    assert before < 1.25 and accept_length() > before + 0.25


def test_metrics_are_means_over_the_updates() -> None:
    traces = traffic(4)
    metrics = make(learning_rate=1e-12, batch_size=4).learn(traces)  # the same four sequences, hardly changed weights
    assert metrics["updates"] == 4.0
    once = make(batch_size=4).update(Assembler().add(traces))
    assert set(once) == {"loss", "gradient_norm", "alpha_1", "alpha_2", "alpha_3"}
    assert set(metrics) == {*once, "updates", "staleness", *make().counts()}
    for name, value in once.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4)
    assert all(0.0 < metrics[f"alpha_{k}"] < 1.0 for k in (1, 2, 3)) and metrics["gradient_norm"] > 0.0


def test_the_same_seed_learns_the_same_weights_and_another_does_not() -> None:
    traces = traffic(8)
    weights = []
    for seed in (0, 0, 1):
        learner = make(seed=seed)
        learner.learn(traces)
        weights.append(learner.weights()[1])
    assert_same(weights[0], weights[1])
    assert not torch.equal(weights[0]["fc.weight"], weights[2]["fc.weight"])


def test_a_restored_learner_goes_on_as_if_never_interrupted() -> None:
    """Traffic is not part of the state; here what comes after fills the replay."""
    before, after = traffic(5, seed=1), traffic(4, seed=2)
    learner = make(replay_capacity=4, updates_per_request=1.3)
    learner.learn(before)
    state = learner.state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.pop("tensors").items()}
    text = json.dumps(state)
    again = make(tiny(), seed=99, replay_capacity=4, updates_per_request=1.3)
    again.load_state_dict({**json.loads(text), "tensors": tensors})
    assert again.weights()[0] == learner.weights()[0] == 6
    assert_same(again.weights()[1], learner.weights()[1])
    metrics = [each.learn(after) for each in (learner, again)]
    learnt = [{**each, "dropped": 0.0} for each in metrics]  # the replay is not part of the state
    assert learnt[0] == learnt[1] and learnt[0]["updates"] == 5.0  # 0.5 were owed
    assert_same(again.weights()[1], learner.weights()[1])
    assert learner.requests == again.requests == 9
    assert_same(learner.state_dict()["tensors"], again.state_dict()["tensors"])


def test_the_state_of_a_learner_that_never_learnt_restores_too() -> None:
    learner, again = make(), make()
    again.load_state_dict(learner.state_dict())
    traces = traffic(3)
    assert learner.learn(traces) == again.learn(traces)


def test_the_state_of_another_draft_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match=r"must fit its draft: lm_head.weight is \(5, 32\), but got \(10, 32\)"):
        make(tiny(WORDS)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must fit its draft: fc.weight is \(32, 96\), but got none"):
        make().load_state_dict({**state, "tensors": {}})


def test_the_version_counts_updates_and_fractions_are_carried_on() -> None:
    learner = make(updates_per_request=0.4)
    versions = []
    for seed in range(5):
        learner.learn(traffic(1, seed))
        versions.append(learner.weights()[0])
    assert versions == [0, 0, 1, 1, 2]
    assert learner.learn([])["updates"] == 0.0 and learner.weights()[0] == 2


def test_weights_handed_out_stay_as_they_were() -> None:
    learner = make()
    learner.learn(traffic(2))
    _, weights = learner.weights()
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    learner.learn(traffic(2, seed=1))
    assert_same(weights, kept)
    assert not torch.equal(learner.weights()[1]["fc.weight"], kept["fc.weight"])


def test_everything_learns_but_the_embedding_and_the_vocabulary() -> None:
    draft, target = tiny(WORDS), tiny_target()
    start, embedding = {n: t.clone() for n, t in draft.tensors.items()}, target.embedding.clone()
    learner = make(draft)
    learner.learn(traffic(4))
    _, weights = learner.weights()
    assert torch.equal(target.embedding, embedding)
    assert_same(draft.tensors, start)  # the caller's draft is not touched
    assert set(weights) == set(start)
    same = {name for name, tensor in weights.items() if torch.equal(tensor, start[name])}
    assert same == {"d2t", "t2d"}
    assert not any(tensor.requires_grad for tensor in weights.values())
    ServingDraft(draft, target).load(weights, version=4)


def test_the_running_average_is_what_serves() -> None:
    traces = traffic(6)
    latest, averaged = make(ema_decay=0.0), make(ema_decay=0.98)
    for learner in (latest, averaged):
        learner.learn(traces)
    name = "fc.weight"
    start = tiny().tensors[name]
    assert torch.equal(latest.weights()[1][name], latest.parameters[name])
    assert torch.equal(latest.parameters[name], averaged.parameters[name])  # serving changes nothing of learning
    moved = [float((learner.weights()[1][name] - start).norm()) for learner in (latest, averaged)]
    assert 0.0 < moved[1] < moved[0]


def test_without_a_temperature_each_request_has_its_own_and_a_greedy_one_1() -> None:
    for own, stated in ((0.5, 0.5), (0.0, 1.0)):
        sequences = Assembler().add(traffic(3, temperature=own))
        losses = [make(temperature=t).update(sequences)["loss"] for t in (None, stated, 2.0)]
        assert losses[0] == losses[1] != losses[2]


def test_bfloat16_products_learn_nearly_the_same() -> None:
    traces = traffic(4)
    full, half = (make(dtype=dtype).learn(traces) for dtype in ("float32", "bfloat16"))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and half["loss"] != full["loss"]
    assert product_dtype("auto") in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["features", "logits"])
def test_numbers_that_are_not_finite_are_skipped_and_counted(field: str, value: float) -> None:
    good, hurt = traffic(3), traffic(2, seed=5)
    spoilt = getattr(hurt[-1], field).clone()
    spoilt[1, 0, 3] = value  # of the second request's last round
    learner, clean = make(), make()
    metrics = learner.learn([*hurt[:-1], replace(hurt[-1], **{field: spoilt}), *renumbered(good)])
    assert metrics["skipped"] == 1 and learner.requests == 4 and learner.updates == 4
    assert all(np.isfinite(list(metrics.values())))
    assert all(bool(torch.isfinite(t).all()) for t in learner.weights()[1].values())
    assert clean.learn(good)["skipped"] == 0


def renumbered(traces: list[Trace]) -> list[Trace]:
    """The same requests by other ids."""
    return [
        replace(trace, request_ids=trace.request_ids + 100, finished=tuple(i + 100 for i in trace.finished))
        for trace in traces
    ]


def test_if_nothing_is_left_to_learn_from_nothing_changes() -> None:
    learner = make()
    spoilt = [replace(trace, features=trace.features * float("nan")) for trace in traffic(3)]
    metrics = learner.learn(spoilt)
    assert metrics["updates"] == 0.0 and metrics["skipped"] == 3.0 and "loss" not in metrics
    assert learner.requests == 0 and learner.weights()[0] == 0
    assert learner.learn(traffic(3))["updates"] == 3.0


@pytest.mark.parametrize(("length", "new_tokens"), [(1, 1), (2, 1), (1, 2), (1, 3)])
def test_the_shortest_requests_do_no_harm(length: int, new_tokens: int) -> None:
    """With `passes` beyond their length: each pass starts one slot later, and a slot needs the token after its own."""
    learner = make(ttt_steps=7)
    traces = traffic(3, length=length, new_tokens=new_tokens) if new_tokens > 1 else at_prefill(length)
    metrics = learner.learn(traces)
    known = length + new_tokens - 1  # tokens whose next is known
    assert metrics["updates"] == (3.0 if known > 1 else 0.0)
    assert {name for name in metrics if name.startswith("alpha")} == {f"alpha_{k}" for k in range(1, known)}
    assert all(np.isfinite(list(metrics.values())))
    assert all(bool(torch.isfinite(t).all()) for t in learner.weights()[1].values())


def at_prefill(length: int) -> list[Trace]:
    """Three requests that ended with their first token."""
    listed = [Request(prompt, 1) for prompt in prompts(3, length)] + [Request((1, 2), 8, ignore_eos=True)]
    session = specrl.LocalEngine(tiny_target(), tiny(), max_context=32).start(
        Listed(listed), batch_size=1, seed=0, trace=True
    )
    return [trace for trace in session.drain() if trace.finished]


def test_a_short_request_among_longer_ones_does_not_shorten_theirs() -> None:
    learner = make(ttt_steps=3, batch_size=4)
    sequences = Assembler().add([*traffic(3), *renumbered(at_prefill(2))])
    assert sorted(len(s.tokens) for s in sequences)[0] == 2
    metrics = learner.update(sequences)
    assert metrics["alpha_3"] > 0.0 and np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("max_grad_norm", -1.0, "above 0"),
        ("updates_per_request", 0.0, "above 0"),
        ("replay_half_life", 0.0, "above 0"),
        ("stale_half_life", 0.0, "above 0 or null"),
        ("temperature", 0.0, "above 0 or null"),
        ("batch_size", 0, "at least 1"),
        ("ttt_steps", 0, "at least 1"),
        ("replay_capacity", -3, "at least 1"),
        ("ema_decay", 1.0, "in [0, 1)"),
        ("holdout_fraction", 1.0, "in [0, 1)"),
        ("betas", (0.9, 1.0), "in [0, 1)"),
        ("ttt_decay", 0.0, "in (0, 1]"),
        ("request_sample_rate", 0.0, "in (0, 1]"),
        ("weight_decay", -0.1, "at least 0"),
        ("rejected_weight", float("inf"), "finite and at least 0"),
        ("ttt_weights", (1.0, 2.0), "ttt_steps = 3"),
        ("dtype", "float16", "'auto', 'float32' or 'bfloat16'"),
        ("draft_sampling", "best", "'sampled' or 'greedy'"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"learner.{name} must be {rule}")) as error:
        LearnerConfig(**{name: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_what_is_taken_is_learnt_at_the_next_call() -> None:
    at_once, later = make(updates_per_request=1.3), make(updates_per_request=1.3)
    at_once.learn(traffic(5))
    later.take(traffic(5))
    assert later.updates == 0 and later.requests == 5
    later.learn([])
    assert at_once.updates == later.updates == 6
    assert_same(at_once.weights()[1], later.weights()[1])


def test_the_end_of_a_session_forgets_what_is_open_and_who_refused() -> None:
    """The ids of the next session begin anew, and name other requests."""
    traces, learner = traffic(3), make()
    learner.opt_out([0, 1])
    learner.take([trace for trace in traces if not trace.finished])
    assert learner.counts()["open"] == 1.0
    learner.end_session()
    assert learner.counts()["open"] == 0.0
    learner.take(traffic(3))
    assert learner.counts()["held"] == 3.0 and learner.counts()["opted_out"] == 2.0


def test_forgetting_leaves_weights_and_owes_nothing() -> None:
    learner = make(holdout_fraction=0.5)
    learner.take(traffic(6))
    assert len(learner.replay) + len(learner.held_out) == 6 and len(learner.held_out) > 0
    learner.forget()
    assert learner.learn([])["updates"] == 0.0 and len(learner.replay) == len(learner.held_out) == 0
    assert learner.counts()["dropped"] == 0.0


def test_a_gated_learner_comes_back_with_the_weights_that_were_good() -> None:
    target = tiny_target()
    config = LearnerConfig(**QUICK)
    learner, again = (OnlineLearner(tiny(), target.embedding, config, gated=True) for _ in range(2))
    good = learner.weights()[1]
    learner.learn(traffic(4))
    again.load_state_dict(learner.state_dict())
    assert_same(again.weights()[1], learner.weights()[1])
    assert_same(again.snapshot_weights(), good)
    again.roll_back()
    assert_same(again.weights()[1], good)
    again.learn(traffic(4, seed=2))
    again.snapshot()
    assert_same(again.snapshot_weights(), again.weights()[1])
