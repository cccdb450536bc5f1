"""Rounds in fixed shapes decode the same tokens as rounds in live shapes, for any padding."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graph_models import RecordedGraphs, Recorder
from tiny import CONFIG, Listed, prompts, tiny_draft, tiny_target, with_vocabulary

from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.decoding import engine as local
from specrl.decoding import pending_features
from specrl.decoding.engine import LocalEngine
from specrl.decoding.fixed_shape import MAX_CAPTURED_WIDTH
from specrl.decoding.sampling import Drawn
from specrl.decoding.session import LocalSession

PLANS = parse_plans("0,1/1/2,3/1/4,5/1/6,2/2/4,3/2/6,3/4/10,4/3/12")
SIZES: Any = {"batch_size": 5, "max_batch_size": 7}
Story = tuple[dict[int, tuple[int, ...]], list[tuple[list[int], list[int], list[int]]]]


def engine(static: bool, rejection: bool = True, reduced: bool = False) -> LocalEngine:
    draft = with_vocabulary(tiny_draft(), range(2, CONFIG.vocab_size)) if reduced else tiny_draft()
    return LocalEngine(tiny_target(), draft, max_context=400, use_rejection_sampling=rejection, static=static)


def requests(max_new_tokens: int = 30) -> list[Request]:
    """Greedy requests of different lengths; some end early at the end-of-sequence token."""
    texts = [text for n in (1, 3, 9) for text in prompts(6, n, seed=n)]
    return [Request(text, max_new_tokens - i % 5, ignore_eos=i % 3 > 0) for i, text in enumerate(texts)]


def lasting(count: int, length: int = 5, temperatures: tuple[float, ...] = (0.0,)) -> Listed:
    """Requests that do not end within a test."""
    cycled = cycle(temperatures)
    return Listed([Request(text, 380, next(cycled), ignore_eos=True) for text in prompts(count, length)])


def served(session: LocalSession, rounds: int, resize: bool) -> Story:
    """Finished requests, and rounds, of a session with a random plan, and batch size, in each round."""
    draws = np.random.default_rng(0)
    done: dict[int, tuple[int, ...]] = {}
    story = []
    for _ in range(rounds):
        plan, size = PLANS[draws.integers(len(PLANS))], int(draws.integers(1, 8))
        if resize:
            session.resize(size)
        if draws.random() < 0.1:
            session.measure_plain()
        result = session.round(plan)
        done |= {c.request_id: c.tokens for c in result.finished}
        story.append((result.request_ids.tolist(), result.tokens.tolist(), result.correct_drafts.tolist()))
    return done, story


def generated(session: LocalSession) -> list[list[int]]:
    return [live.generated for live in session.state.batch.live]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraphs]:
    """Sessions' graphs, which replay operations as a GPU would."""
    monkeypatch.setattr(RecordedGraphs, "made", [])
    monkeypatch.setattr(local, "Graphs", RecordedGraphs)
    return RecordedGraphs.made


@pytest.mark.parametrize(("resize", "reduced"), [(False, True), (True, False)], ids=["steady", "resized"])
def test_greedy_tokens_are_the_same_for_all_plans_and_batch_sizes(resize: bool, reduced: bool) -> None:
    """Batches of 1 to 7 requests in buckets of 1, 2, 4 and 7; requests end, start, or are parked meanwhile."""
    eager, fixed = (
        served(engine(static, reduced=reduced).start(Listed(requests()), **SIZES, seed=0), 70, resize)
        for static in (False, True)
    )
    assert eager == fixed and len(fixed[0]) > 8
    assert np.mean([n for _, _, correct in fixed[1] for n in correct]) > 0.5  # drafts are accepted


def test_greedy_tokens_are_the_same_if_graphs_replay(recorded: list[RecordedGraphs]) -> None:
    """A graph must not depend on values at capture, nor on memory that graphs share."""
    session = engine(True).start(Listed(requests()), **SIZES, seed=0)
    fixed = served(session, 50, resize=True)
    assert recorded[0].replays > len(recorded[0]) > 20 and not recorded[0].ran_uncaptured
    assert fixed == served(engine(False).start(Listed(requests()), **SIZES, seed=0), 50, resize=True)


def test_attention_may_return_any_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels for GPUs put heads next to each other."""
    fused, results = F.scaled_dot_product_attention, []
    for static in (False, True):
        session = engine(static).start(Listed(requests()), batch_size=1, max_batch_size=3, seed=0)
        for index, plan in enumerate(PLANS * 2):
            session.resize(1 + index % 3)
            session.round(plan)
        results.append(generated(session))
        monkeypatch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda *args, **options: fused(*args, **options).transpose(1, 2).contiguous().transpose(1, 2),
        )
    assert results[0] == results[1]


def test_a_round_is_a_copy_to_the_device_replays_and_a_copy_back(recorded: list[RecordedGraphs]) -> None:
    session = engine(True).start(lasting(3, temperatures=(0.8,)), batch_size=3, max_batch_size=4, seed=0)
    graphs = recorded[0]

    class Outside(Recorder):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if graphs.inside:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    for plan in (Plan(0), Plan(3), Plan(3, 4, 10)):
        for _ in range(3):  # with different numbers of unread tokens
            session.round(plan)
        with Outside() as outside:
            session.round(plan)
        assert outside.names() == ["copy_", "uniform_", "copy_"]
    session.measure_plain()
    with Outside() as outside:
        session.measure_plain()
    assert outside.names() == 3 * ["copy_", "uniform_", "copy_"]


@pytest.mark.parametrize("rejection", [True, False], ids=["rejection", "target-only"])
def test_the_same_numbers_draw_the_same_tokens(rejection: bool) -> None:
    """Three of four requests are sampled; the numbers of each round are made from its index."""
    plans = [PLANS[i] for i in np.random.default_rng(3).integers(len(PLANS), size=40)]
    numbers = [torch.rand(4, 200, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    results = []
    for static in (False, True):
        listed = lasting(4, 4, (0.0, 0.7, 1.0, 1.3))
        session = engine(static, rejection).start(listed, batch_size=3, max_batch_size=4, seed=0)
        for plan in PLANS:
            session.prepare(plan)
        correct = []
        for plan, drawn in zip(plans, numbers, strict=True):
            session.source = Drawn(drawn)
            correct.append(session.round(plan).correct_drafts.tolist())
        results.append((correct, generated(session)))
    assert results[0] == results[1] and np.mean(results[0][0]) > 0.5


def test_traces_are_the_same() -> None:
    traces = []
    for static in (False, True):
        session = engine(static).start(Listed(requests()), batch_size=3, max_batch_size=4, seed=0, trace=True)
        served(session, 30, resize=False)
        traces.append(session.drain())
    for ours, theirs in zip(*traces, strict=True):
        assert ours.plan == theirs.plan and ours.finished == theirs.finished
        for name in ("tokens", "parents", "path"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("features", "logits"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-3)


def test_the_draft_may_catch_up_on_more_tokens_than_any_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """After many rounds of plan 0 the draft catches up in one pass, or earlier if the buffer is full."""
    monkeypatch.setattr(pending_features, "BUFFER_BYTES", 0)  # room for 128
    plans = [*[Plan(0)] * 100, Plan(3), *[Plan(0)] * 140, Plan(3, 4, 10), Plan(5)]
    results = []
    for static in (False, True):
        session = engine(static).start(lasting(3), batch_size=3, max_batch_size=4, seed=0)
        results.append(([session.round(plan).correct_drafts.tolist() for plan in plans], generated(session)))
    assert results[0] == results[1]


def test_external_drafts_are_verified_between_static_rounds() -> None:
    """`round_with` decodes in live shapes, on the same caches."""
    results = []
    for static in (False, True):
        session = engine(static).start(Listed(requests(max_new_tokens=100)), batch_size=3, seed=0)
        for i in range(12):
            session.round(PLANS[i % len(PLANS)])
            session.round_with(torch.tensor([[1, 2], [3, -1], [4, 5]]))
        results.append(generated(session))
    assert results[0] == results[1]


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is packed, as on a GPU."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


@pytest.mark.usefixtures("unpacked")
def test_graphs_serve_new_weights(recorded: list[RecordedGraphs]) -> None:
    """Weights that are loaded between rounds draft the same as if they were loaded at the start."""
    before = {name: t.clone() for name, t in tiny_draft().tensors.items()}
    other = {name: t * 0.5 for name, t in before.items()}
    results = []
    for load in ("never", "first", "captured"):
        ours = engine(True)
        session = ours.start(lasting(4, 6), batch_size=4, seed=0)
        if load == "first":
            ours.load_draft(other, version=1)
        session.prepare(Plan(4))
        if load == "captured":
            ours.load_draft(other, version=1)
        results.append([session.round(Plan(4)).correct_drafts.tolist() for _ in range(10)])
    assert results[0] != results[1] == results[2]
    assert not recorded[-1].ran_uncaptured and len(recorded[-1]) <= 4  # only a wider catch-up is captured anew
    assert all(torch.equal(t, before[name]) for name, t in tiny_draft().tensors.items())  # loading made copies


def test_wide_catch_ups_are_never_captured(recorded: list[RecordedGraphs]) -> None:
    session = engine(True).start(Listed(requests(max_new_tokens=200)), batch_size=2, seed=0)
    for _ in range(MAX_CAPTURED_WIDTH + 10):
        session.round(Plan(0))
    before = len(recorded[0])
    session.round(Plan(2))
    assert len(recorded[0]) == before + 2  # drafting and verifying
