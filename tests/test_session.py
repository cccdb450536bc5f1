"""Greedy decoding is plain decoding, token by token, and the draft's cache is right after every switch."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import pytest
import torch
from tiny import AUX_LAYERS, CONFIG, Listed, prompts, tiny_draft, tiny_target, with_vocabulary

import specrl
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Round, Trace
from specrl.decoding import pending_features
from specrl.decoding.engine import LocalEngine
from specrl.decoding.session import LocalSession
from specrl.measure.machine import keep_large_blocks
from specrl.models.attention import TokenSlots
from specrl.models.draft import Draft
from specrl.models.embedded import embedded_directory
from specrl.models.target import Target
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import load_workload

PLANS = parse_plans("1/1/2,2/1/3,3/1/4,5/1/6,2/2/4,3/2/6,3/4/10")
GAP = 1e-4  # between plain decoding's two best logits: below it, rounding may decide
Choose = Callable[[int], Plan]  # the plan of a round by its number


@dataclass(frozen=True)
class Served:
    """The embedded target, requests and their tokens by plain decoding, and drafts that learnt from them."""

    target: Target
    requests: list[Request]
    plain: list[tuple[int, ...]]
    drafts: dict[str, Draft]

    def engine(self, vocabulary: str, rejection: bool) -> LocalEngine:
        return LocalEngine(self.target, self.drafts[vocabulary], max_context=80, use_rejection_sampling=rejection)

    def check(self, done: dict[int, tuple[int, ...]]) -> None:
        """Check that every request has the tokens of plain decoding, up to a tie."""
        assert done
        for i, tokens in done.items():
            plain = self.plain[i]
            if tokens != plain:
                index = next(k for k, pair in enumerate(zip(tokens, plain, strict=True)) if pair[0] != pair[1])
                ids = torch.tensor([self.requests[i].prompt + plain[:index]])
                best = self.target(ids)[0, -1].topk(2).values
                assert best[0] - best[1] < GAP, f"request {i} differs at token {index}, without a tie"


def decode(
    session: LocalSession, count: int, choose: Choose, resize: Callable[[int], int] | None = None
) -> tuple[dict[int, tuple[int, ...]], list[Round]]:
    """Decode until the first `count` requests are done; returns their tokens, and the rounds."""
    done: dict[int, tuple[int, ...]] = {}
    rounds: list[Round] = []
    while not all(i in done for i in range(count)):
        assert len(rounds) < 2000, "requests that never end"
        if resize is not None:
            session.resize(resize(len(rounds)))
        rounds.append(session.round(choose(len(rounds))))
        done |= {c.request_id: c.tokens for c in rounds[-1].finished if c.request_id < count}
    return done, rounds


def always(plan: Plan) -> Choose:
    return lambda index: plan


def switching(seed: int, plans: Sequence[Plan] = (Plan(0), *PLANS)) -> Choose:
    picks = np.random.default_rng(seed).integers(len(plans), size=2000)
    return lambda index: plans[picks[index]]


@pytest.fixture(scope="module")
def served() -> Served:
    keep_large_blocks()
    target = specrl.load_target("embedded")
    tokenizer = load_tokenizer(embedded_directory())
    source = load_workload("stdlib", tokenizer, prompt_tokens=(4, 16), max_new_tokens=20, temperature=0.0)
    requests = list(islice(source.requests(0), 46))
    requests += [replace(request, prompt=request.prompt[-1:]) for request in requests[:2]]  # one token
    full = specrl.new_draft(target, intermediate_size=128)
    engine = LocalEngine(target, full, max_context=80)
    done, _ = decode(engine.start(Listed(requests), batch_size=16, seed=0, plain=True), 48, always(Plan(0)))
    plain = [done[i] for i in range(48)]
    session = engine.start(Listed(requests), batch_size=16, seed=0, trace=True)
    assert decode(session, 48, always(Plan(0)))[0] == done
    config = LearnerConfig(updates_per_request=1.25, batch_size=8, ttt_steps=2, ema_decay=0.9, dtype="float32")
    learner = OnlineLearner(full, target.embedding, config)
    learner.learn(session.drain())
    learnt = Draft(full.config, learner.weights()[1])
    common = sorted(
        torch.tensor([t for tokens in plain for t in tokens]).bincount(minlength=512).topk(96).indices.tolist()
    )
    return Served(target, requests, plain, {"full": learnt, "reduced": with_vocabulary(learnt, common)})


@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_greedy_decoding_is_plain_decoding(served: Served, plan: Plan, vocabulary: str) -> None:
    for batch, count, rejection in ((1, 1, True), (5, 6, False), (16, 16, True)):
        session = served.engine(vocabulary, rejection).start(Listed(served.requests), batch_size=batch, seed=1)
        done, rounds = decode(session, count, always(plan))
        served.check(done)
        if batch == 16:
            assert np.mean([r.accept_length for r in rounds]) > 1.2  # drafts are accepted


@pytest.mark.parametrize(("vocabulary", "rejection"), [("full", True), ("reduced", False)], ids=["full", "reduced"])
def test_greedy_decoding_is_plain_decoding_if_plan_and_batch_size_change_every_round(
    served: Served, vocabulary: str, rejection: bool
) -> None:
    engine = served.engine(vocabulary, rejection)
    session = engine.start(Listed(served.requests), batch_size=3, max_batch_size=16, seed=1)
    sizes = np.random.default_rng(5).permutation(list(range(1, 17)) * 125)
    done, rounds = decode(session, 20, switching(4), lambda index: int(sizes[index]))
    served.check(done)
    assert len({r.batch_size for r in rounds}) > 12 and len({r.plan for r in rounds}) == 8
    assert np.mean([r.accept_length for r in rounds if r.plan.num_steps > 1]) > 1.2


@pytest.mark.parametrize("rejection", [True, False], ids=["rejection", "target-only"])
def test_greedy_requests_stay_plain_among_sampled_ones(served: Served, rejection: bool) -> None:
    temperatures = cycle((0.0, 0.8, 0.0, 1.2))
    mixed = [replace(r, temperature=t) for r, t in zip(served.requests, temperatures, strict=False)]
    session = served.engine("full", rejection).start(Listed(mixed), batch_size=6, seed=2)
    done, rounds = decode(session, 32, switching(6))
    served.check({i: tokens for i, tokens in done.items() if i % 2 == 0})
    assert sum(done[i] == served.plain[i] for i in range(1, 32, 2)) < 4  # the others are sampled
    assert np.mean([r.accept_length for r in rounds]) > 1.2


def known_tokens(traces: list[Trace]) -> dict[int, list[int]]:
    """Every request's tokens as far as the traces have them: accepted rows, and each bonus by the next round."""
    known: dict[int, list[int]] = {}
    for trace in traces:
        for b, request in enumerate(trace.request_ids.tolist()):
            ids = known.setdefault(request, [])
            del ids[int(trace.positions[b]) :]
            ids += [int(trace.tokens[b, row]) for row in trace.path[b].tolist() if row >= 0]
    return known


def check_proposals(engine: LocalEngine, traces: list[Trace]) -> int:
    """Check that a session which starts at each round proposes the same; returns the number of proposals."""
    known, compared = known_tokens(traces), 0
    for trace in traces:
        if trace.plan is None or trace.plan.num_steps == 0:
            continue
        texts = [known[i][:length] for i, length in zip(trace.request_ids.tolist(), trace.positions, strict=True)]
        listed = Listed([Request(tuple(text), 9, ignore_eos=True) for text in texts])
        fresh = engine.start(listed, batch_size=len(texts), seed=0, trace=True)
        fresh.round(trace.plan)
        expected = fresh.drain()[-1]
        assert torch.equal(trace.tokens, expected.tokens) and torch.equal(trace.parents, expected.parents)
        compared += len(texts)
    return compared


def check_draft_cache(session: LocalSession) -> None:
    """Check the draft's cache against one that is filled from the target's own hidden states."""
    draft, state, heads = session.draft, session.state, CONFIG.num_kv_heads
    assert draft is not None and state.pending is not None
    for row, read in enumerate(state.pending.read.tolist()):
        if read:
            ids = torch.from_numpy(state.batch.tokens[row, : read + 1])[None]
            cache, fresh = session.target.new_cache(1, read), draft.new_cache(1, read)
            features = session.target.prefill(ids[:, :-1], cache, aux_layers=AUX_LAYERS).aux_hidden_states
            assert features is not None
            draft.decode(ids[:, 1:], draft.fuse(features), fresh, TokenSlots(torch.arange(read)[None], read))
            held = state.pending.cache.data[:, :, row * heads : (row + 1) * heads, :read]
            torch.testing.assert_close(held, fresh.data, rtol=0, atol=1e-3)


def tiny_engine(max_context: int = 400, rejection: bool = True) -> LocalEngine:
    return LocalEngine(tiny_target(), tiny_draft(), max_context=max_context, use_rejection_sampling=rejection)


def test_proposals_after_any_switch_are_those_of_a_session_that_never_switched() -> None:
    engine = tiny_engine()
    requests = [Request(prompt, 40, ignore_eos=True) for n in (1, 3, 8) for prompt in prompts(4, n, seed=n)]
    session = engine.start(Listed(requests), batch_size=4, max_batch_size=7, seed=0, trace=True)
    sizes = np.random.default_rng(1).integers(1, 8, size=2000)
    rounds = []
    for index in range(50):
        session.resize(int(sizes[index]))
        rounds.append(session.round(switching(2)(index)))
        check_draft_cache(session)
    assert np.mean([r.accept_length for r in rounds if r.plan.num_steps]) > 1.5
    assert check_proposals(engine, session.drain()) > 90


def test_features_are_read_early_if_the_buffer_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rounds of plan 0 than the buffer has room for, while one of the requests is parked."""
    monkeypatch.setattr(pending_features, "BUFFER_BYTES", 0)  # room for 128
    engine = tiny_engine()
    requests = [Request(prompt, 360, ignore_eos=True) for prompt in prompts(16, 5)]
    session = engine.start(Listed(requests), batch_size=16, seed=0, trace=True)
    plans = [*[Plan(0)] * 128, Plan(3, 4, 10), Plan(2), *[Plan(0)] * 130, Plan(5), Plan(3, 2, 6)]
    for index, plan in enumerate(plans):
        session.resize(15 if 40 < index < 90 else 16)
        session.round(plan)
        if index in (127, 128, 129, 257, 260, 261):
            check_draft_cache(session)
    assert check_proposals(engine, session.drain()) == 64


def test_tokens_after_the_end_of_a_sequence_are_dropped() -> None:
    engine = tiny_engine(rejection=False)
    requests = [Request(prompt, 40) for prompt in prompts(40, 3, seed=7)]
    plain, _ = decode(engine.start(Listed(requests), batch_size=8, seed=0, plain=True), 40, always(Plan(0)))
    done, rounds = decode(engine.start(Listed(requests), batch_size=8, seed=0), 40, always(Plan(3, 2, 6)))
    assert done == plain
    assert any(0 in tokens for tokens in done.values())
    assert all(0 not in tokens[:-1] and (tokens[-1] == 0 or len(tokens) == 40) for tokens in done.values())
    assert any((r.tokens <= r.correct_drafts).any() for r in rounds)  # some ended before their round's last token
    to_the_end = [replace(request, ignore_eos=True) for request in requests]
    on, _ = decode(engine.start(Listed(to_the_end), batch_size=8, seed=0), 40, always(Plan(3, 2, 6)))
    assert all(len(tokens) == 40 and tokens[: len(done[i])] == done[i] for i, tokens in on.items())


def test_every_request_gets_max_new_tokens() -> None:
    """Some end with the first token of their prefill: they finish with the next round."""
    requests = [Request(prompt, 1 + i % 7, 1.0, ignore_eos=True) for i, prompt in enumerate(prompts(21, 2))]
    session = tiny_engine().start(Listed(requests), batch_size=5, seed=0)
    rounds = [session.round(Plan(5)) for _ in range(30)]
    finished = {c.request_id: c for r in rounds for c in r.finished}
    assert sum(len(r.finished) for r in rounds) == len(finished) > 60 and set(range(50)) <= set(finished)
    for i, completion in finished.items():
        request = requests[i % 21]
        assert completion.prompt == request.prompt and len(completion.tokens) == request.max_new_tokens
    live = {i for r in rounds for i in r.request_ids.tolist()}
    assert not live & {i for i, completion in finished.items() if len(completion.tokens) == 1}


def test_a_parked_request_goes_on_where_it_was() -> None:
    engine = tiny_engine()
    requests = [Request(prompt, 30, ignore_eos=True) for prompt in prompts(4, 6)]
    expected, _ = decode(engine.start(Listed(requests), batch_size=4, seed=0), 4, always(Plan(2)))
    session = engine.start(Listed(requests), batch_size=4, seed=0)
    session.round(Plan(2))
    before = session.context_lengths
    session.resize(1)
    for _ in range(3):
        session.round(Plan(3))
    assert session.batch_size == 1 and len(session.context_lengths) == 1
    session.resize(4)
    assert session.context_lengths[1:] == before[1:]
    assert decode(session, 4, always(Plan(1)))[0] == expected


def test_sessions_and_requests_that_cannot_be_served_are_refused() -> None:
    def refused(named: str, request: Request | None = None, max_context: int = 10, **sizes: int) -> None:
        arguments: Any = {"batch_size": 1, **sizes}
        with pytest.raises(ValueError, match=named):
            tiny_engine(max_context).start(Listed([request or Request((1,))]), seed=0, **arguments)

    refused("batch_size must be in .1, max_batch_size=0.", batch_size=0)
    refused("batch_size must be in .1, max_batch_size=2.", batch_size=3, max_batch_size=2)
    refused("batch_size must be in .1, max_batch_size=0.", max_batch_size=0)
    for max_context in (0, 1, 641):
        refused("max_context must be in .2, 640.", max_context=max_context)
    refused("prompt and max_new_tokens must be at most max_context=10 tokens", Request((1, 2, 3), 8))
    for prompt in ((1, CONFIG.vocab_size), (-1,)):
        refused(r"prompt must be .* in \[0, 10\)", Request(prompt, 2))
    refused("raise max_new_tokens", Request((1, 2), 1))


def test_a_request_may_fill_the_context_to_the_last_token() -> None:
    engine = tiny_engine(10)
    for plan in (Plan(0), Plan(60), Plan(3, 4, 37)):
        session = engine.start(Listed([Request((1, 2, 3), 7, ignore_eos=True)]), batch_size=2, seed=0)
        done, _ = decode(session, 4, always(plan))
        assert all(len(tokens) == 7 for tokens in done.values())


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static"])
def test_a_batch_may_have_more_requests_than_slots(static: bool) -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=12, static=static)
    listed = Listed([Request(prompt, 8, ignore_eos=True) for prompt in prompts(160, 4)])
    plain, _ = decode(engine.start(listed, batch_size=160, seed=0, plain=True), 160, always(Plan(0)))
    done, rounds = decode(engine.start(listed, batch_size=160, seed=0), 160, switching(0, (Plan(2), Plan(2, 2, 4))))
    assert done == plain and len({r.plan for r in rounds}) == 2


def test_plans_that_cannot_be_run_are_refused() -> None:
    engine, listed = tiny_engine(), Listed([Request((1, 2), 8)])
    session = engine.start(listed, batch_size=2, seed=0)
    plain = engine.start(listed, batch_size=2, seed=0, plain=True)
    draftless = LocalEngine(tiny_target(), max_context=40)
    for plan in (Plan(64), Plan(9, 9, 10), Plan(2, 11, 20)):
        assert not engine.supports(plan)
        with pytest.raises(ValueError, match="at most (64 tokens per request|the draft's vocabulary of 10 tokens)"):
            session.round(plan)
    assert engine.supports(Plan(63)) and not draftless.supports(Plan(1)) and draftless.supports(Plan(0))
    with pytest.raises(ValueError, match="its only plan is 0, but got 1/1/2"):
        plain.round(Plan(1))
    for size in (0, 3):
        with pytest.raises(ValueError, match="batch_size must be in .1, max_batch_size=2."):
            session.resize(size)
    session.round(Plan(63))  # the session still works
    plain.round(Plan(0))


def test_a_closed_session_frees_its_memory_and_refuses_calls() -> None:
    session = tiny_engine().start(Listed([Request((1, 2), 8)]), batch_size=2, seed=0, trace=True)
    session.round(Plan(1))
    assert session.state.pending is not None
    caches = [weakref.ref(session.state.cache), weakref.ref(session.state.pending.cache)]
    session.close()
    session.close()
    gc.collect()
    assert [ref() for ref in caches] == [None, None] and session.drain() == []
    for call in (lambda: session.round(Plan(0)), session.measure_plain, lambda: session.resize(1)):
        with pytest.raises(ValueError, match="the session is closed"):
            call()


def test_an_engine_does_not_keep_its_sessions_alive() -> None:
    engine = tiny_engine()
    session = weakref.ref(engine.start(Listed([Request((1, 2), 8)]), batch_size=2, seed=0))
    gc.collect()
    assert session() is None
