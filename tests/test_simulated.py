from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_profile import SOURCE, made_up

from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Round
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Cost, Profile
from specrl.simulation.shifts import Shift
from specrl.simulation.vector import VectorSimulator
from specrl.testing.engine import CHECKS, Case

REQUESTS = Requests((4, 8), (8, 24))
LONG = Requests((8, 8), (10_000, 10_000))


def with_trees() -> Profile:
    profile = made_up()
    trees = [Cost(b, plan, 3e-3) for b in (1, 4, 16) for plan in parse_plans("2/2/4,3/2/6")]
    odds = {**profile.log_odds, "2/2/4": (1.5, 1.0), "3/2/6": (1.5, 1.0, 0.5)}
    return replace(profile, costs=(*profile.costs, *trees), log_odds=odds)


def smooth(**noise: Any) -> Profile:
    """The profile without hiccups and without growth with context, with other noise in all costs."""
    profile = made_up(hiccup_share=0.0, memory=50.0)
    return replace(profile, costs=tuple(replace(cost, per_token=0.0, **noise) for cost in profile.costs))


def rounds(profile: Profile, plan: Plan, count: int, batch_size: int = 1, **kwargs: Any) -> list[Round]:
    session = SimulatedEngine(profile, **kwargs).start(LONG, batch_size=batch_size, seed=0)
    return [session.round(plan) for _ in range(count)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_simulated_engine_conforms(check: Callable[[Case], None]) -> None:
    check(Case(lambda: SimulatedEngine(with_trees()), REQUESTS))


def test_seed_determines_the_rounds() -> None:
    engine, runs = SimulatedEngine(made_up()), []
    for seed in (5, 5, 6):
        session = engine.start(REQUESTS, batch_size=3, seed=seed)
        runs.append([session.round(Plan(i % 4)) for i in range(30)])
    assert runs[0] == runs[1] != runs[2]


def test_plans_are_compared_on_common_random_numbers() -> None:
    long, short = (rounds(made_up(), plan, 1, batch_size=16)[0] for plan in (Plan(5), Plan(2)))
    assert short.correct_drafts.tolist() == np.minimum(long.correct_drafts, 2).tolist()
    assert long.correct_drafts.max() > 2
    ratio = long.seconds / short.seconds  # the noise of a round does not depend on its plan
    assert ratio == pytest.approx(made_up().cost(16, Plan(5)).seconds / made_up().cost(16, Plan(2)).seconds)


def test_foresee_returns_the_correct_drafts_of_the_next_round() -> None:
    session = SimulatedEngine(made_up(drift=0.5)).start(LONG, batch_size=16, seed=0)
    foreseen = session.foresee(Plan(5)).tolist()
    assert foreseen == session.foresee(Plan(5)).tolist() == session.round(Plan(5)).correct_drafts.tolist()


def test_seconds_have_mean_and_spread_of_the_profile() -> None:
    # 8,000 rounds: the standard errors are 0.06 % of the mean and 0.8 % of the spread.
    profile = smooth(spread=0.0)
    seconds = np.array([done.seconds for done in rounds(profile, Plan(3), 8_000)])
    assert seconds.mean() == pytest.approx(profile.cost(1, Plan(3)).seconds, rel=0.005)
    assert np.log(seconds).std() == pytest.approx(0.05, rel=0.04)
    with_hiccups = replace(profile, hiccup_share=0.1, hiccup_extra=4.0)
    slow = np.array([done.seconds for done in rounds(with_hiccups, Plan(3), 4_000)])
    assert slow.mean() == pytest.approx(1.4 * seconds.mean(), rel=0.1)  # 1 + 0.1 x 4; standard error 2 %


def test_slow_noise_lasts_and_is_shared_with_plain_steps() -> None:
    session = SimulatedEngine(smooth(spread=0.3, jitter=0.0)).start(LONG, batch_size=1, seed=0)
    both = np.log([(session.round(Plan(3)).seconds, session.measure_plain().seconds) for _ in range(4_000)]).T
    assert np.corrcoef(both)[0, 1] > 0.999
    x = both[0] - both[0].mean()
    assert (x[50:] * x[:-50]).mean() / x.var() == pytest.approx(np.exp(-1.0), abs=0.25)  # standard error 0.1


def test_context_adds_cost_and_the_clock_advances() -> None:
    engine = SimulatedEngine(made_up(hiccup_share=0.0))
    near, far = (engine.start(Requests((n, n), (64, 64)), batch_size=1, seed=0) for n in (96, 1096))
    began = engine.clock.now()
    first, second = near.round(Plan(0)), far.round(Plan(0))
    assert second.seconds / first.seconds == pytest.approx(1.2, rel=0.001)  # 1,000 tokens x 2e-4
    assert engine.clock.now() - began == pytest.approx(first.seconds + second.seconds)


def test_shifts_change_costs_and_acceptance() -> None:
    calm = made_up(hiccup_share=0.0, request_spread=0.0)
    shifts = [Shift(500, cost=1.3, from_steps=3), Shift(500, log_odds=-1.0)]
    for plan, factor in ((Plan(3), 1.3), (Plan(2), 1.0)):
        pairs = zip(rounds(calm, plan, 600), rounds(calm, plan, 600, shifts=shifts), strict=True)
        ratios = [b.seconds / a.seconds for a, b in pairs]
        assert ratios[:500] == pytest.approx([1.0] * 500)
        assert np.mean(ratios[500:520]) == pytest.approx(factor, rel=0.02)  # contexts soon differ: 2e-4 a token
    lengths = [done.accept_length for done in rounds(calm, Plan(3), 1500, shifts=shifts)]
    assert np.mean(lengths[:500]) > np.mean(lengths[500:]) + 0.5  # 2.6 and 1.8, standard errors 0.06


def test_plain_session_has_the_cost_of_plain_decoding() -> None:
    profile = made_up(hiccup_share=0.0)
    session = SimulatedEngine(profile).start(LONG, batch_size=4, seed=0, plain=True)
    seconds = np.mean([session.round(Plan(0)).seconds for _ in range(50)])
    assert seconds == pytest.approx(profile.cost(4, None).seconds, rel=0.1)


def test_requests_that_end_at_prefill_are_returned() -> None:
    session = SimulatedEngine(made_up()).start(Requests((4, 4), (1, 3)), batch_size=2, seed=0)
    done = [c for _ in range(40) for c in session.round(Plan(0)).finished]
    assert sorted({len(c.tokens) for c in done}) == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Requests((0, 4), (8, 8)), "prompt_tokens"),
        (lambda: Shift(-1), "a shift needs"),
        (lambda: SimulatedEngine(made_up()).start(Requests((4, 4), (1, 1)), batch_size=2, seed=0), "max_new_tokens"),
        (lambda: SimulatedEngine(made_up()).start(LONG, batch_size=1, seed=0, plain=True).round(Plan(1)), "plan must"),
        (lambda: SimulatedEngine(made_up()).load_draft({}, version=1), "one draft"),
    ],
)
def test_simulated_engine_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("plan", [Plan(2), Plan(5), Plan.parse("3/2/6")], ids=str)
def test_vector_sessions_have_the_distribution_of_single_ones(batch_size: int, plan: Plan) -> None:
    # 150 single sessions against 1,000 at once, 40 rounds each, requests of 8 to 24 tokens. Differences of means over
    # sessions beyond 4.5 standard errors: odds below 1 in 4,000 for all 24 comparisons. The seeds are fixed.
    profile = replace(with_trees(), drift=0.4, memory=20.0)
    engine = SimulatedEngine(profile, shifts=[Shift(20, cost=1.5, from_steps=2, log_odds=-0.5)])
    single = []
    for seed in range(150):
        session = engine.start(REQUESTS, batch_size=batch_size, seed=seed)
        done = [session.round(plan) for _ in range(40)]
        values = [(r.tokens.sum(), (r.correct_drafts >= 2).mean(), r.seconds, r.context_lengths.mean()) for r in done]
        single.append(np.mean(values, axis=0))
    vector = VectorSimulator(engine, REQUESTS, [Plan(0), plan], [1, 4], 1000)
    rng = np.random.default_rng(0)
    vector.reset(None, np.full(1000, [1, 4].index(batch_size)), rng)
    sums = np.zeros((4, 1000))
    for _ in range(40):
        context = vector.context
        result = vector.round(np.ones(1000, dtype=np.int64), rng)
        sums += result.tokens, result.reached[1] / batch_size, result.seconds, context
    one, many = np.array(single).T, sums / 40
    error = np.sqrt(one.var(1) / one.shape[1] + many.var(1) / many.shape[1])
    assert (np.abs(one.mean(1) - many.mean(1)) < 4.5 * error).all(), (one.mean(1), many.mean(1), error)
    assert many.std(1) == pytest.approx(one.std(1), rel=0.3)  # 5 standard errors of 150 sessions


def test_vector_counts_of_many_steps_and_large_batches() -> None:
    costs = tuple(Cost(b, plan, 1e-3) for b in (1, 600) for plan in (None, Plan(9)))
    certain = Profile("certain", SOURCE, costs, {"chain": (20.0,) * 6 + (-20.0,) * 3})
    vector = VectorSimulator(SimulatedEngine(certain), Requests((8, 8), (100, 100)), [Plan(9)], [1, 600], 2)
    rng, plan = np.random.default_rng(0), np.zeros(2, dtype=np.int64)
    vector.reset(None, np.array([0, 1]), rng)
    done = vector.round(plan, rng)
    assert done.tokens.tolist() == [7, 4200] and done.correct.tolist() == [6, 3600]
    assert done.reached.tolist() == [[1, 600]] * 6 + [[0, 0]] * 3
    tokens = [vector.round(plan, rng).tokens.tolist() for _ in range(14)]
    assert tokens[-1] == [1, 600]  # 99 tokens after prefill: 14 rounds of 7, and one token in the last round
    assert vector.context.tolist() == [9.0, 9.0]
