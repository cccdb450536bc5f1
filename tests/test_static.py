"""Rounds in fixed shapes decode what rounds in live shapes decode, whatever fills up their buckets."""

from __future__ import annotations

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
from specrl.models import linear as linear_module
from specrl.models.draft import Draft, ServingDraft
from specrl.models.linear import Linear

PLANS = parse_plans("0,1/1/2,3/1/4,5/1/6,2/2/4,3/2/6,3/4/10,4/3/12")
Story = tuple[dict[int, tuple[int, ...]], list[tuple[list[int], list[int], list[int]]]]


def engine(static: bool, rejection: bool = True, reduced: bool = False) -> LocalEngine:
    draft = with_vocabulary(tiny_draft(), range(2, CONFIG.vocab_size)) if reduced else tiny_draft()
    return LocalEngine(tiny_target(), draft, max_context=400, use_rejection_sampling=rejection, static=static)


def requests(temperature: float = 0.0, most: int = 30) -> list[Request]:
    """Of different lengths, some of which end early at the end-of-sequence token."""
    texts = [text for n in (1, 3, 9) for text in prompts(6, n, seed=n)]
    return [Request(text, most - i % 5, temperature, ignore_eos=i % 3 > 0) for i, text in enumerate(texts)]


def served(session: LocalSession, rounds: int, resize: bool, seed: int = 0) -> Story:
    """Requests done, and rounds, of a session that draws its plans, and its batch sizes, anew every round."""
    draws = np.random.default_rng(seed)
    done: dict[int, tuple[int, ...]] = {}
    seen = []
    for _ in range(rounds):
        plan, size = PLANS[draws.integers(len(PLANS))], int(draws.integers(1, 8))
        if resize:
            session.resize(size)
        if draws.random() < 0.1:
            session.measure_plain()
        found = session.round(plan)
        done |= {c.request_id: c.tokens for c in found.finished}
        seen.append((found.request_ids.tolist(), found.tokens.tolist(), found.correct_drafts.tolist()))
    return done, seen


def generated(session: LocalSession) -> list[list[int]]:
    return [live.generated for live in session.state.batch.live]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraphs]:
    """Sessions' graphs, which replay operations as a GPU would."""
    monkeypatch.setattr(RecordedGraphs, "made", [])
    monkeypatch.setattr(local, "Graphs", RecordedGraphs)
    return RecordedGraphs.made


@pytest.mark.parametrize(("resize", "reduced"), [(False, True), (True, False)], ids=["steady", "resized"])
def test_greedy_tokens_are_the_same_whatever_plan_and_batch_size(resize: bool, reduced: bool) -> None:
    """Batches of 1 to 7 requests in buckets of 1, 2, 4 and 7; requests end and others come, or wait meanwhile."""
    found = []
    for static in (False, True):
        session = engine(static, reduced=reduced).start(Listed(requests()), batch_size=5, max_batch_size=7, seed=0)
        found.append(served(session, 70, resize))
    assert found[0] == found[1] and len(found[0][0]) > 8
    correct = [n for _, _, each in found[0][1] for n in each]
    assert np.mean(correct) > 0.5  # drafts do stand


def test_so_they_are_when_graphs_replay_what_was_captured(recorded: list[RecordedGraphs]) -> None:
    """Nothing of a capture's moment may be left in a graph, nor what it needs lie in memory that graphs share."""
    session = engine(True).start(Listed(requests()), batch_size=5, max_batch_size=7, seed=0)
    found = served(session, 50, resize=True)
    assert recorded[0].replays > len(recorded[0]) > 20 and not recorded[0].ran_uncaptured
    plain = engine(False).start(Listed(requests()), batch_size=5, max_batch_size=7, seed=0)
    assert found == served(plain, 50, resize=True)


def test_attention_may_lay_its_result_out_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels for GPUs put heads next to each other."""
    fused, found = F.scaled_dot_product_attention, []
    for static in (False, True):
        session = engine(static).start(Listed(requests()), batch_size=1, max_batch_size=3, seed=0)
        for index, plan in enumerate(PLANS * 2):
            session.resize(1 + index % 3)
            session.round(plan)
        found.append(generated(session))
        monkeypatch.setattr(
            F,
            "scaled_dot_product_attention",
            lambda *args, **options: fused(*args, **options).transpose(1, 2).contiguous().transpose(1, 2),
        )
    assert found[0] == found[1]


def test_a_round_is_a_copy_to_the_device_replays_and_a_copy_back(recorded: list[RecordedGraphs]) -> None:
    long = [Request(text, 300, 0.8, ignore_eos=True) for text in prompts(3, 5)]
    session = engine(True).start(Listed(long), batch_size=3, max_batch_size=4, seed=0)
    graphs = recorded[0]

    class Outside(Recorder):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if graphs.inside:
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)

    for plan in (Plan(0), Plan(3), Plan(3, 4, 10)):
        for _ in range(3):  # from any number of tokens that wait
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
    heat = (0.0, 0.7, 1.0, 1.3)
    listed = [Request(text, 200, heat[i], ignore_eos=True) for i, text in enumerate(prompts(4, 4))]
    plans = [PLANS[i] for i in np.random.default_rng(3).integers(len(PLANS), size=40)]
    numbers = [torch.rand(4, 200, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    found = []
    for static in (False, True):
        session = engine(static, rejection).start(Listed(listed), batch_size=3, max_batch_size=4, seed=0)
        for plan in PLANS:
            session.prepare(plan)
        correct = []
        for plan, drawn in zip(plans, numbers, strict=True):
            session.source = Drawn(drawn)
            correct.append(session.round(plan).correct_drafts.tolist())
        found.append((correct, generated(session)))
    assert found[0] == found[1]
    assert np.mean(found[0][0]) > 0.5


def test_traces_are_the_same() -> None:
    kept = []
    for static in (False, True):
        session = engine(static).start(Listed(requests()), batch_size=3, max_batch_size=4, seed=0, trace=True)
        served(session, 30, resize=False)
        kept.append(session.drain())
    assert len(kept[0]) == len(kept[1])
    for ours, theirs in zip(*kept, strict=True):
        assert ours.plan == theirs.plan and ours.finished == theirs.finished
        for name in ("tokens", "parents", "path"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("features", "logits"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-3)


def test_features_may_wait_longer_than_any_graph_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of plan 0: the draft catches up in one pass, or earlier if the buffer is full."""
    monkeypatch.setattr(pending_features, "BUFFER_BYTES", 0)  # room for 128
    listed = [Request(text, 380, ignore_eos=True) for text in prompts(3, 5)]
    plans = [*[Plan(0)] * 100, Plan(3), *[Plan(0)] * 140, Plan(3, 4, 10), Plan(5)]
    found = []
    for static in (False, True):
        session = engine(static).start(Listed(listed), batch_size=3, max_batch_size=4, seed=0)
        rounds = [session.round(plan) for plan in plans]
        found.append(([r.correct_drafts.tolist() for r in rounds], generated(session)))
    assert found[0] == found[1]


def test_drafts_of_others_are_verified_between_static_rounds() -> None:
    """`round_with` decodes in live shapes, on the same caches."""
    found = []
    for static in (False, True):
        session = engine(static).start(Listed(requests(most=100)), batch_size=3, seed=0)
        for i in range(12):
            session.round(PLANS[i % len(PLANS)])
            session.round_with(torch.tensor([[1, 2], [3, -1], [4, 5]]))
        found.append(generated(session))
    assert found[0] == found[1]


def test_new_weights_take_the_old_ones_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is packed for a CPU, as on a GPU. The caller's tensors stay as they are."""
    monkeypatch.setattr(linear_module, "_packed", lambda weight: None)
    first = tiny_draft()
    other = {name: t + 0.1 for name, t in first.tensors.items()}
    before = {name: t.clone() for name, t in first.tensors.items()}
    serving = ServingDraft(first, tiny_target())
    serving.load(other, version=1)
    assert all(torch.equal(t, before[name]) for name, t in first.tensors.items())
    fresh = ServingDraft(Draft(first.config, other), tiny_target())
    x = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(serving.logits(x), fresh.logits(x))


def test_graphs_serve_new_weights(recorded: list[RecordedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded between rounds that replay, they draft what they would have drafted from the start."""
    monkeypatch.setattr(linear_module, "_packed", lambda weight: None)
    other = {name: t * 0.5 for name, t in tiny_draft().tensors.items()}
    listed = [Request(text, 200, ignore_eos=True) for text in prompts(4, 6)]
    found = []
    for load in ("never", "first", "captured"):
        ours = engine(True)
        session = ours.start(Listed(listed), batch_size=4, seed=0)
        if load == "first":
            ours.load_draft(other, version=1)
        session.prepare(Plan(4))
        if load == "captured":
            ours.load_draft(other, version=1)
        found.append([session.round(Plan(4)).correct_drafts.tolist() for _ in range(10)])
    assert found[0] != found[1] == found[2]
    assert not recorded[-1].ran_uncaptured and len(recorded[-1]) <= 4  # none is captured again but for a wider catch-up


def test_a_packed_weight_is_packed_anew() -> None:
    weights = [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    loaded, x = Linear(weights[0]), torch.ones(3, 4)
    loaded.load(weights[1])
    torch.testing.assert_close(loaded(x), x @ weights[1].t())
    torch.testing.assert_close(loaded(x[:1]), x[:1] @ weights[1].t())


def test_wide_catch_ups_are_never_captured(recorded: list[RecordedGraphs]) -> None:
    session = engine(True).start(Listed(requests(most=200)), batch_size=2, seed=0)
    for _ in range(MAX_CAPTURED_WIDTH + 10):
        session.round(Plan(0))
    before = len(recorded[0])
    session.round(Plan(2))
    assert len(recorded[0]) == before + 2  # drafting and verifying
