"""Checks that every engine must pass: `for check in CHECKS: check(case)`.

A failed check raises AssertionError with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from specrl.core.interfaces import Engine, Request, Session, Workload
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Completion, Round

if TYPE_CHECKING:
    from torch import Tensor

PLANS = parse_plans("0,1/1/2,2/1/3,3/1/4,2/2/4,3/2/6")
BATCH = 3


@dataclass(frozen=True)
class Case:
    """An engine to be checked.

    Args:
        make: returns a new engine with a draft.
        workload: its requests, of at least 8 new tokens and at most a few dozen, so that they end.
        weights: that `load_draft` takes; None: it is not checked.
        exact: whether greedy decoding is the same with and without drafts to the last bit (float32), so that every
            request must have the same tokens; otherwise nine in ten.
    """

    make: Callable[[], Engine]
    workload: Workload
    weights: Mapping[str, Tensor] | None = None
    exact: bool = True

    def start(self, engine: Engine, *, greedy: bool = False, plain: bool = False, seed: int = 0) -> Session:
        """A session of three requests that may grow to five."""
        workload = _Greedy(self.workload) if greedy else self.workload
        return engine.start(workload, batch_size=BATCH, max_batch_size=BATCH + 2, seed=seed, plain=plain)


@dataclass(frozen=True)
class _Greedy:
    workload: Workload

    def requests(self, seed: int) -> Iterator[Request]:
        return (replace(request, temperature=0.0) for request in self.workload.requests(seed))


def _plans(engine: Engine) -> list[Plan]:
    """Plan 0 and at least one plan with drafts, as far as the engine supports them."""
    return [plan for plan in PLANS if engine.supports(plan)]


def check_is_an_engine(case: Case) -> None:
    """It and its sessions have the parts of the protocols."""
    with closing(case.make()) as engine:
        assert isinstance(engine, Engine), "an engine must inherit from specrl.core.interfaces.Engine"
        assert engine.supports(Plan(0)), "every engine supports plan 0"
        assert len(_plans(engine)) > 1, f"it must support one of {', '.join(map(str, PLANS[1:]))}"
        session = case.start(engine)
        assert isinstance(session, Session), "a session must inherit from specrl.core.interfaces.Session"
        assert session.batch_size == len(session.context_lengths) == BATCH, "the batch size must be the requested one"


def check_rounds_add_up(case: Case) -> None:
    """Tokens, drafts, seconds and contexts of every round agree with each other and with the session."""
    with closing(case.make()) as engine:
        session, plans = case.start(engine), _plans(engine)
        for index in range(60):
            plan, before = plans[index % len(plans)], list(session.context_lengths)
            done = session.round(plan)
            assert done.plan == plan, f"asked for {plan}, got {done.plan}"
            assert list(done.context_lengths) == before, "context_lengths must be those before the round"
            _check_round(done)
            assert done.draft_version == engine.draft_version, "the round must name the draft that serves"
            ended = {completion.request_id for completion in done.finished}
            for row, request in enumerate(done.request_ids.tolist()):
                if request in ended:
                    assert 1 <= done.tokens[row] <= done.correct_drafts[row] + 1, "a request that ends may drop tokens"
                else:
                    assert done.tokens[row] == done.correct_drafts[row] + 1, "a round yields its drafts and the bonus"
                    grown = session.context_lengths[row] - before[row]
                    assert grown == done.tokens[row], f"the context grew by {grown}, not by {done.tokens[row]}"
            assert session.batch_size == BATCH, "a finished request must be replaced"


def _check_round(done: Round) -> None:
    assert done.batch_size == BATCH and len(set(done.request_ids.tolist())) == BATCH, "requests must be distinct"
    assert (done.correct_drafts >= 0).all(), "correct_drafts must be at least 0"
    assert len(done.histogram()) == done.plan.num_steps + 1 and done.histogram().sum() == BATCH
    parts = (done.draft_s, done.verify_s, done.other_s, done.prefill_s)
    assert min(parts) >= 0.0 and done.seconds > 0.0, f"seconds must be positive, but got {parts}"
    assert np.isclose(done.seconds, sum(parts[:3])), "prefill is not part of a round's seconds"
    assert 1.0 <= done.accept_length <= done.plan.num_steps + 1.0


def check_every_request_is_handed_out_once(case: Case) -> None:
    """Finished requests come in full, once each, with the tokens that their rounds committed."""
    committed: dict[int, int] = {}
    finished: list[Completion] = []
    with closing(case.make()) as engine:
        session, plan = case.start(engine), _plans(engine)[1]
        while len(finished) < 3 * BATCH:
            done = session.round(plan)
            for request, kept in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
                committed[request] = committed.get(request, 0) + kept
            finished += done.finished
    assert len({completion.request_id for completion in finished}) == len(finished), "handed out twice"
    for completion in finished:
        got, rounds = len(completion.tokens), committed.get(completion.request_id, 0)
        assert got == rounds + 1, f"{got} tokens, but one from the prefill and {rounds} from rounds"


def check_greedy_decoding_is_plain(case: Case) -> None:
    """At temperature 0 a request's tokens do not depend on the drafts."""
    with closing(case.make()) as engine:
        plain = _outputs(case.start(engine, greedy=True, plain=True), [Plan(0)])
        found = _outputs(case.start(engine, greedy=True), _plans(engine))
    same = sum(plain[request] == found[request] for request in plain)
    assert same >= len(plain) * (1.0 if case.exact else 0.9), f"{len(plain) - same} of {len(plain)} requests differ"


def _outputs(session: Session, plans: Sequence[Plan], *, probe: bool = False) -> dict[int, object]:
    """Prompt and tokens of the first 12 requests."""
    found: dict[int, object] = {}
    first, index = range(12), 0
    while not all(request in found for request in first):
        if probe:
            session.measure_plain()
        for completion in session.round(plans[index % len(plans)]).finished:
            found[completion.request_id] = (completion.prompt, completion.tokens)
        index += 1
    session.close()
    return {request: found[request] for request in first}


def check_measuring_plain_changes_nothing(case: Case) -> None:
    """Measurements of plain decoding between the rounds do not change what is decoded."""
    with closing(case.make()) as engine:
        session = case.start(engine)
        before, version = list(session.context_lengths), engine.draft_version
        sample = session.measure_plain()
        assert list(session.context_lengths) == before and engine.draft_version == version, "it must commit nothing"
        if sample is not None:
            assert sample.batch_size == BATCH and sample.seconds > 0.0, "it must measure the live requests"
            off = abs(sample.context - np.mean(before))
            assert off <= 1.0, "it must have the contexts of the requests, or one token less before their prefill"
        runs = [_outputs(case.start(engine), _plans(engine), probe=probe) for probe in (False, True)]
        assert runs[0] == runs[1], "measuring plain decoding changed what was decoded"


def check_a_seed_reproduces(case: Case) -> None:
    """The same seed and plans give the same requests and tokens."""
    with closing(case.make()) as engine:
        runs = [_outputs(case.start(engine, seed=3), _plans(engine)) for _ in range(2)]
    assert runs[0] == runs[1], "the same seed gave something else"


def check_batch_sizes(case: Case) -> None:
    """A session is resized between rounds, up to the largest batch size that it was started for."""
    with closing(case.make()) as engine:
        session, plan = case.start(engine), _plans(engine)[1]
        for size in (BATCH + 2, 1, BATCH, 1, BATCH + 2):
            session.resize(size)
            assert session.batch_size == len(session.context_lengths) == size
            assert session.round(plan).batch_size == session.round(Plan(0)).batch_size == size
        for size in (0, BATCH + 3):
            _refuses(lambda size=size: session.resize(size), f"a batch size of {size}")  # type: ignore[misc]
        _refuses(lambda: engine.start(case.workload, batch_size=0, seed=0), "a batch size of 0")


def check_plain_sessions_do_not_speculate(case: Case) -> None:
    """Without a draft the only plan is 0."""
    with closing(case.make()) as engine:
        session = engine.start(case.workload, batch_size=BATCH, seed=0, plain=True, trace=True)
        assert (session.round(Plan(0)).tokens == 1).all(), "plan 0 yields one token for each request"
        _refuses(lambda: session.round(_plans(engine)[1]), "a plan that speculates in a plain session")


def check_traces_follow_rounds(case: Case) -> None:
    """Where traces are kept, each round since the last call has one, with the round's nodes."""
    with closing(case.make()) as engine:
        session = engine.start(case.workload, batch_size=BATCH, seed=0, trace=True)
        session.drain()
        plan = _plans(engine)[1]
        rounds = [session.round(plan), session.round(Plan(0))]
        traces = [trace for trace in session.drain() if trace.plan is not None]
        assert session.drain() == [], "traces are taken once"
        for done, trace in zip(rounds, traces, strict=bool(traces)):
            assert trace.plan == done.plan and trace.request_ids.tolist() == done.request_ids.tolist()
            assert list(trace.tokens.shape) == [BATCH, done.plan.num_draft_tokens], "every verified node has a row"
            assert trace.logits.shape[:2] == trace.features.shape[:2] == trace.parents.shape == trace.tokens.shape
            assert trace.positions.tolist() == (done.context_lengths - 1).tolist(), "row 0 is the last committed token"
            assert ((trace.path >= 0).sum(-1).numpy() == done.correct_drafts + 1).all(), "the path is what was accepted"
        untraced = engine.start(case.workload, batch_size=BATCH, seed=0)
        untraced.round(plan)
        assert untraced.drain() == [], "nothing is kept unless traces are asked for"


def check_a_draft_serves_from_the_next_round_on(case: Case) -> None:
    """`load_draft` sets the version of the engine and of the rounds of live sessions."""
    if case.weights is None:
        return
    with closing(case.make()) as engine:
        session, plan = case.start(engine), _plans(engine)[1]
        before = session.round(plan).draft_version
        engine.load_draft(case.weights, version=before + 5)
        assert engine.draft_version == before + 5
        assert session.round(plan).draft_version == before + 5, "the new draft must serve"
        wrong = dict(list(case.weights.items())[1:])
        _refuses(lambda: engine.load_draft(wrong, version=before + 6), "a draft that lacks a tensor")
        assert session.round(plan).draft_version == before + 5, "the draft before must serve on"


def check_closing_is_idempotent(case: Case) -> None:
    """Sessions and engines may be closed twice; a closed session refuses to decode."""
    engine = case.make()
    first, second = case.start(engine), case.start(engine)
    first.close()
    first.close()
    _refuses(lambda: first.round(Plan(0)), "a round of a closed session")
    second.round(Plan(0))
    engine.close()
    engine.close()
    _refuses(lambda: second.round(Plan(0)), "a round after its engine was closed")


def _refuses(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except ValueError as error:
        assert str(error), f"{what} must be refused with a message"
    else:
        raise AssertionError(f"{what} must be refused with a ValueError")


CHECKS: tuple[Callable[[Case], None], ...] = (
    check_is_an_engine,
    check_rounds_add_up,
    check_every_request_is_handed_out_once,
    check_greedy_decoding_is_plain,
    check_measuring_plain_changes_nothing,
    check_a_seed_reproduces,
    check_batch_sizes,
    check_plain_sessions_do_not_speculate,
    check_traces_follow_rounds,
    check_a_draft_serves_from_the_next_round_on,
    check_closing_is_idempotent,
)
