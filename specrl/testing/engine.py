"""Checks that every engine must pass: `for check in CHECKS: check(case)`. Each raises AssertionError with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from specrl.core.interfaces import Engine, Request, Session, Workload
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Completion

if TYPE_CHECKING:
    from torch import Tensor

PLANS = parse_plans("0,1/1/2,2/1/3,3/1/4,2/2/4,3/2/6")
BATCH = 3


@dataclass(frozen=True)
class Case:
    """An engine to be checked.

    Args:
        make: returns a new engine with a draft.
        workload: requests of at least 8 new tokens and at most a few dozen, so that they end.
        weights: weights that `load_draft` accepts; None: `load_draft` is not checked.
        exact: whether drafts never change the tokens of greedy decoding (float32), so that all requests are compared
            exactly; otherwise nine in ten must be equal.
    """

    make: Callable[[], Engine]
    workload: Workload
    weights: Mapping[str, Tensor] | None = None
    exact: bool = True

    def start(self, engine: Engine, **options: Any) -> Session:
        """Start a session of three requests that may grow to five."""
        return engine.start(self.workload, **{"batch_size": BATCH, "max_batch_size": BATCH + 2, "seed": 0, **options})

    @contextmanager
    def opened(self, **options: Any) -> Iterator[tuple[Engine, Session, list[Plan]]]:
        """Open a new engine and a session; also yields the plans to run: plan 0, then plans with drafts."""
        engine = self.make()
        try:
            yield engine, self.start(engine, **options), [plan for plan in PLANS if engine.supports(plan)]
        finally:
            engine.close()


@dataclass(frozen=True)
class _Greedy:
    workload: Workload

    def requests(self, seed: int) -> Iterator[Request]:
        return (replace(request, temperature=0.0) for request in self.workload.requests(seed))


def check_is_an_engine(case: Case) -> None:
    """It and its sessions have the parts of the protocols."""
    with case.opened() as (engine, session, plans):
        assert isinstance(engine, Engine), "an engine must inherit from specrl.core.interfaces.Engine"
        assert plans[:1] == [Plan(0)], "every engine must support plan 0"
        assert len(plans) > 1, f"it must support one of {', '.join(map(str, PLANS[1:]))}"
        assert isinstance(session, Session), "a session must inherit from specrl.core.interfaces.Session"
        assert session.batch_size == len(session.context_lengths) == BATCH, "the batch size must be the requested one"


def check_rounds_add_up(case: Case) -> None:
    """Tokens, drafts, seconds and contexts of every round agree with each other and with the session."""
    with case.opened() as (engine, session, plans):
        for index in range(60):
            plan, before = plans[index % len(plans)], list(session.context_lengths)
            done = session.round(plan)
            assert done.plan == plan, f"the round must run {plan}, but ran {done.plan}"
            assert list(done.context_lengths) == before, "context_lengths must be those before the round"
            assert done.batch_size == BATCH and len(set(done.request_ids.tolist())) == BATCH, "requests must differ"
            assert (done.correct_drafts >= 0).all(), "correct_drafts must be at least 0"
            parts = (done.draft_s, done.verify_s, done.other_s, done.prefill_s)
            assert min(parts) >= 0.0 and done.seconds > 0.0, f"seconds must be positive, but got {parts}"
            assert done.draft_version == engine.draft_version, "the round must name the draft that serves"
            ended = np.isin(done.request_ids, [completion.request_id for completion in done.finished])
            dropped = done.correct_drafts + 1 - done.tokens
            assert (done.tokens >= 1).all() and (dropped >= 0).all(), "a request must have 1 to correct + 1 tokens"
            assert (dropped[~ended] == 0).all(), "only a request that ends may drop tokens"
            grown = (np.array(session.context_lengths) - before)[~ended].tolist()
            assert grown == done.tokens[~ended].tolist(), f"contexts must grow by the tokens, but grew by {grown}"
            assert session.batch_size == BATCH, "a finished request must be replaced"


def check_every_request_is_handed_out_once(case: Case) -> None:
    """Finished requests are complete, once each, with the tokens that their rounds committed."""
    committed: dict[int, int] = {}
    finished: list[Completion] = []
    with case.opened() as (_, session, plans):
        while len(finished) < 3 * BATCH:
            done = session.round(plans[1])
            for request, tokens in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
                committed[request] = committed.get(request, 0) + tokens
            finished += done.finished
    assert len({completion.request_id for completion in finished}) == len(finished), "a request finished twice"
    for completion in finished:
        tokens, expected = len(completion.tokens), committed.get(completion.request_id, 0) + 1
        assert tokens == expected, f"a request has {tokens} tokens, but prefill and rounds committed {expected}"


def check_greedy_decoding_is_plain(case: Case) -> None:
    """At temperature 0 the drafts do not change a request's tokens."""
    case = replace(case, workload=_Greedy(case.workload))
    with case.opened(plain=True) as (engine, session, plans):
        plain, outputs = _outputs(session, [Plan(0)]), _outputs(case.start(engine), plans)
    same = sum(plain[request] == outputs[request] for request in plain)
    assert same >= len(plain) * (1.0 if case.exact else 0.9), f"{len(plain) - same} of {len(plain)} requests differ"


def _outputs(session: Session, plans: Sequence[Plan], *, measure: bool = False) -> dict[int, object]:
    """Return prompt and tokens of the first 12 requests, with or without plain measurements between the rounds."""
    outputs, plan = dict[int, object](), cycle(plans)
    while not outputs.keys() >= set(range(12)):
        if measure:
            session.measure_plain()
        outputs |= {done.request_id: (done.prompt, done.tokens) for done in session.round(next(plan)).finished}
    session.close()
    return {request: outputs[request] for request in range(12)}


def check_measuring_plain_changes_nothing(case: Case) -> None:
    """Measurements of plain decoding between the rounds do not change the output."""
    with case.opened() as (engine, session, plans):
        before, version = list(session.context_lengths), engine.draft_version
        sample = session.measure_plain()
        assert list(session.context_lengths) == before and engine.draft_version == version, "it must commit nothing"
        if sample is not None:
            assert sample.batch_size == BATCH and sample.seconds > 0.0, "it must measure the live requests"
            assert abs(sample.context - np.mean(before)) <= 1.0, "it must measure at the contexts of the live requests"
        runs = [_outputs(case.start(engine), plans, measure=measure) for measure in (False, True)]
        assert runs[0] == runs[1], "measuring plain decoding must not change the output"


def check_a_seed_reproduces(case: Case) -> None:
    """The same seed and plans give the same requests and tokens."""
    with case.opened() as (engine, _, plans):
        runs = [_outputs(case.start(engine, seed=3), plans) for _ in range(2)]
    assert runs[0] == runs[1], "the same seed must give the same output"


def check_batch_sizes(case: Case) -> None:
    """A session is resized between rounds, up to the largest batch size that it was started for."""
    with case.opened() as (engine, session, plans):
        for size in (BATCH + 2, 1, BATCH, 1, BATCH + 2):
            session.resize(size)
            assert session.batch_size == len(session.context_lengths) == size
            assert session.round(plans[1]).batch_size == session.round(Plan(0)).batch_size == size
        for size in (0, BATCH + 3):
            _refuses(partial(session.resize, size), f"a batch size of {size}")
        _refuses(lambda: case.start(engine, batch_size=0), "a batch size of 0")


def check_plain_sessions_do_not_speculate(case: Case) -> None:
    """Without a draft the only plan is 0."""
    with case.opened(plain=True, trace=True) as (_, session, plans):
        assert (session.round(Plan(0)).tokens == 1).all(), "plan 0 must yield one token for each request"
        _refuses(lambda: session.round(plans[1]), "a plan that speculates in a plain session")


def check_traces_follow_rounds(case: Case) -> None:
    """If traces are kept, each round since the last call has one, with the round's nodes."""
    with case.opened(trace=True) as (engine, session, plans):
        session.drain()
        rounds = [session.round(plans[1]), session.round(Plan(0))]
        traces = [trace for trace in session.drain() if trace.plan is not None]
        assert session.drain() == [], "traces must be returned once"
        for done, trace in zip(rounds, traces, strict=bool(traces)):
            assert trace.plan == done.plan and trace.request_ids.tolist() == done.request_ids.tolist()
            assert list(trace.tokens.shape) == [BATCH, done.plan.num_draft_tokens], "every verified node needs a row"
            assert trace.logits.shape[:2] == trace.features.shape[:2] == trace.parents.shape == trace.tokens.shape
            assert trace.positions.tolist() == (done.context_lengths - 1).tolist(), "row 0 is the last committed token"
            assert ((trace.path >= 0).sum(-1).numpy() == done.correct_drafts + 1).all(), "the path must be accepted"
        untraced = case.start(engine)
        untraced.round(plans[1])
        assert untraced.drain() == [], "traces must be kept only if they are asked for"


def check_a_draft_serves_from_the_next_round_on(case: Case) -> None:
    """`load_draft` sets the version of the engine and of the rounds of live sessions."""
    if case.weights is None:
        return
    with case.opened() as (engine, session, plans):
        version = session.round(plans[1]).draft_version + 5
        engine.load_draft(case.weights, version=version)
        assert engine.draft_version == session.round(plans[1]).draft_version == version, "the new draft must serve"
        wrong = dict(list(case.weights.items())[1:])
        _refuses(lambda: engine.load_draft(wrong, version=version + 1), "a draft that lacks a tensor")
        assert session.round(plans[1]).draft_version == version, "the previous draft must continue to serve"


def check_closing_is_idempotent(case: Case) -> None:
    """Sessions and engines may be closed twice; a closed session refuses to decode."""
    with case.opened() as (engine, first, _):
        second = case.start(engine)
        first.close()
        first.close()
        _refuses(lambda: first.round(Plan(0)), "a round of a closed session")
        second.round(Plan(0))
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
