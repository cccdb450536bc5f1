import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import AUX_LAYERS, Listed, prompts, tiny_target
from torch import Tensor

import specrl
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.models.draft import Draft, ServingDraft, new_draft

QUICK: dict[str, Any] = {"batch_size": 2, "updates_per_request": 1.0, "dtype": "float32"}
VOCABULARY = (1, 2, 3, 5, 8)


def make(draft: Draft | None = None, seed: int = 0, gated: bool = False, **changes: Any) -> OnlineLearner:
    config = LearnerConfig(**{**QUICK, **changes})
    return OnlineLearner(draft or tiny(), tiny_target().embedding, config, seed, gated=gated)


def tiny(vocabulary: Sequence[int] | None = None) -> Draft:
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    return new_draft(tiny_target(), vocabulary=ids, intermediate_size=16, aux_layers=AUX_LAYERS)


def traffic(count: int, seed: int = 0, new_tokens: int = 8, temperature: float = 1.0, length: int = 4) -> list[Trace]:
    """Traces of `count` requests that end together."""
    listed = [Request(prompt, new_tokens, temperature, ignore_eos=True) for prompt in prompts(count, length, seed=seed)]
    engine = specrl.LocalEngine(tiny_target(), tiny(), max_context=32)
    session = engine.start(Listed(listed), batch_size=count, seed=seed, trace=True)
    traces: list[Trace] = []
    while sum(len(trace.finished) for trace in traces) < count:
        session.round(Plan(0))
        traces += session.drain()
    ended = {request for trace in traces for request in trace.finished}
    return [trace for trace in traces if ended.issuperset(trace.request_ids.tolist())]  # not the next ones' prefills


def renumbered(traces: list[Trace]) -> list[Trace]:
    """The same requests with other ids."""
    return [
        replace(trace, request_ids=trace.request_ids + 100, finished=tuple(i + 100 for i in trace.finished))
        for trace in traces
    ]


def weights(learner: OnlineLearner) -> Mapping[str, Tensor]:
    return learner.weights()[1]


def assert_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert list(some) == list(others)
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def assert_finite(metrics: Mapping[str, float], learner: OnlineLearner) -> None:
    assert all(np.isfinite(list(metrics.values())))
    assert all(bool(torch.isfinite(t).all()) for t in weights(learner).values())


def test_metrics_are_means_over_the_updates() -> None:
    traces = traffic(4)
    metrics = make(learning_rate=1e-12, batch_size=4).learn(traces)  # the same four sequences, hardly changed weights
    assert metrics["updates"] == 4.0
    once = make(batch_size=4).update(Assembler().add(traces))
    assert set(once) == {"loss", "gradient_norm", "alpha_1", "alpha_2", "alpha_3"}
    assert set(metrics) == {*once, "updates", "staleness", *make().counts()}
    assert {name: metrics[name] for name in once} == pytest.approx(once, rel=1e-4)
    assert all(0.0 < metrics[f"alpha_{k}"] < 1.0 for k in (1, 2, 3)) and metrics["gradient_norm"] > 0.0


@pytest.mark.parametrize("count", [0, 5])
def test_a_restored_learner_continues_as_if_never_interrupted(count: int) -> None:
    """Sequences are not part of the state; here the later ones fill the replay buffer."""
    before, after = traffic(count, seed=1) if count else [], traffic(4, seed=2)
    settings: dict[str, Any] = {"replay_capacity": 4, "updates_per_request": 1.3}
    learner, restored = make(**settings), make(seed=99 if count else 0, **settings)
    learner.learn(before)
    state = learner.state_dict()
    tensors = {name: tensor.clone() for name, tensor in state.pop("tensors").items()}
    restored.load_state_dict({**json.loads(json.dumps(state)), "tensors": tensors})
    assert restored.version == learner.version == int(1.3 * count)
    assert_same(weights(restored), weights(learner))
    metrics = [{**each.learn(after), "dropped": 0.0} for each in (learner, restored)]
    assert metrics[0] == metrics[1] and metrics[0]["updates"] == 5.0
    assert_same(weights(restored), weights(learner))
    assert learner.requests == restored.requests == 4 + count
    assert_same(learner.state_dict()["tensors"], restored.state_dict()["tensors"])


def test_the_state_of_another_draft_is_refused() -> None:
    state = make().state_dict()
    with pytest.raises(ValueError, match=r"must fit its draft: lm_head.weight is \(5, 32\), but got \(10, 32\)"):
        make(tiny(VOCABULARY)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must fit its draft: fc.weight is \(32, 96\), but got None"):
        make().load_state_dict({**state, "tensors": {}})


def test_fractions_of_updates_add_up_and_returned_weights_do_not_change() -> None:
    learner, versions, first = make(updates_per_request=0.4), [], weights(make())
    for seed in range(5):
        learner.learn(traffic(1, seed))
        versions.append(learner.version)
        if versions == [0, 0, 1]:
            first = weights(learner)
            copy = {name: tensor.clone() for name, tensor in first.items()}
    assert versions == [0, 0, 1, 1, 2]
    assert learner.learn([])["updates"] == 0.0 and learner.version == 2
    assert_same(first, copy)
    assert not torch.equal(weights(learner)["fc.weight"], copy["fc.weight"])


def test_everything_is_trained_except_the_embedding_and_the_vocabulary() -> None:
    draft, target = tiny(VOCABULARY), tiny_target()
    start, embedding = {n: t.clone() for n, t in draft.tensors.items()}, target.embedding.clone()
    learner = make(draft)
    learner.learn(traffic(4))
    assert torch.equal(target.embedding, embedding)
    assert_same(draft.tensors, start)  # the caller's draft does not change
    assert set(weights(learner)) == set(start)
    assert {name for name, t in weights(learner).items() if torch.equal(t, start[name])} == {"d2t", "t2d"}
    assert not any(tensor.requires_grad for tensor in weights(learner).values())
    ServingDraft(draft, target).load(weights(learner), version=4)


def test_the_moving_average_serves() -> None:
    traces, name = traffic(6), "fc.weight"
    latest, averaged = make(ema_decay=0.0), make(ema_decay=0.98)
    for learner in (latest, averaged):
        learner.learn(traces)
    start = tiny().tensors[name]
    assert torch.equal(weights(latest)[name], latest.parameters[name])
    assert torch.equal(latest.parameters[name], averaged.parameters[name])  # the average does not affect learning
    moved = [float((weights(learner)[name] - start).norm()) for learner in (latest, averaged)]
    assert 0.0 < moved[1] < moved[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["features", "logits"])
def test_requests_with_values_that_are_not_finite_are_skipped_and_counted(field: str, value: float) -> None:
    good, bad = traffic(3), traffic(2, seed=5)
    tensor = getattr(bad[-1], field).clone()
    tensor[1, 0, 3] = value  # of the second request's last round
    learner = make()
    metrics = learner.learn([*bad[:-1], replace(bad[-1], **{field: tensor}), *renumbered(good)])
    assert metrics["skipped"] == 1 and learner.requests == 4 and learner.updates == 4
    assert_finite(metrics, learner)
    assert make().learn(good)["skipped"] == 0


@pytest.mark.parametrize("new_tokens", [2, 3])
def test_the_shortest_requests(new_tokens: int) -> None:
    """With more steps than tokens: each step starts one slot later, and a slot needs the token after its own."""
    learner, traces = make(ttt_steps=7), traffic(3, length=1, new_tokens=new_tokens)
    metrics = learner.learn(traces)
    assert metrics["updates"] == 3.0
    assert {name for name in metrics if name.startswith("alpha")} == {f"alpha_{k}" for k in range(1, new_tokens)}
    assert_finite(metrics, learner)
    learner.take_sequences(replace(sequence, tokens=sequence.tokens[:1]) for sequence in Assembler().add(traces))
    assert learner.requests == 3 and learner.learn([])["updates"] == 0.0, "sequences of one token are ignored"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("stale_half_life", 0.0),
        ("batch_size", 0),
        ("ema_decay", 1.0),
        ("betas", (0.9, 1.0)),
        ("ttt_decay", 0.0),
        ("weight_decay", -0.1),
        ("rejected_weight", float("inf")),
        ("ttt_weights", (1.0, 2.0)),
        ("dtype", "float16"),
        ("draft_sampling", "best"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"learner.{name} must be") as error:
        LearnerConfig(**{name: value})
    assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_the_end_of_a_session_discards_unfinished_requests_and_opt_outs() -> None:
    """The ids of the next session start again."""
    learner = make()
    learner.opt_out([0, 1])
    learner.take([trace for trace in traffic(3) if not trace.finished])
    assert learner.counts()["open"] == 1.0
    learner.end_session()
    assert learner.counts()["open"] == 0.0
    learner.take(traffic(3))
    assert learner.counts()["held"] == 3.0 and learner.counts()["opted_out"] == 2.0


def test_forget_discards_sequences_and_due_updates() -> None:
    learner = make(holdout_fraction=0.5)
    learner.take(traffic(6))
    assert len(learner.replay) + len(learner.held_out) == 6 and len(learner.held_out) > 0
    learner.forget()
    assert learner.learn([])["updates"] == 0.0 and len(learner.replay) == len(learner.held_out) == 0
    assert learner.counts()["dropped"] == 0.0


def test_a_gated_learner_restores_its_good_weights() -> None:
    learner, restored = make(gated=True), make(gated=True)
    good = weights(learner)
    learner.learn(traffic(4))
    restored.load_state_dict(learner.state_dict())
    assert_same(weights(restored), weights(learner))
    assert_same(restored.snapshot_weights(), good)
    restored.roll_back()
    assert_same(weights(restored), good)
    restored.learn(traffic(4, seed=2))
    restored.snapshot()
    assert_same(restored.snapshot_weights(), weights(restored))
