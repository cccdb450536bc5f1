from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from test_profile import made_up

from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Round
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Cost, Profile, Shift
from specrl.simulation.vector import VectorSimulator
from specrl.testing.engine import CHECKS, Case

REQUESTS = Requests((4, 8), (8, 24))
LONG = Requests((8, 8), (10_000, 10_000))


def with_trees() -> Profile:
    profile = made_up()
    trees = [Cost(b, plan, 3e-3) for b in (1, 4, 16) for plan in parse_plans("2/2/4,3/2/6")]
    odds = {**profile.log_odds, "2/2/4": (1.5, 1.0), "3/2/6": (1.5, 1.0, 0.5)}
    return replace(profile, costs=(*profile.costs, *trees), log_odds=odds)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check: Callable[[Case], None]) -> None:
    check(Case(lambda: SimulatedEngine(with_trees()), REQUESTS))


def rounds(profile: Profile, plan: Plan, count: int, batch_size: int = 1, **kwargs: object) -> list[Round]:
    session = SimulatedEngine(profile, **kwargs).start(LONG, batch_size=batch_size, seed=0)  # type: ignore[arg-type]
    return [session.round(plan) for _ in range(count)]


def test_the_same_seed_gives_the_same_rounds_and_seconds() -> None:
    engine = SimulatedEngine(made_up())
    runs = []
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


def test_seconds_have_the_mean_and_the_spread_of_the_profile() -> None:
    # 20,000 rounds: the standard errors are 0.1 % (jitter, hiccups) and 0.5 % of the spread.
    profile = made_up(hiccup_share=0.0)
    profile = replace(profile, costs=tuple(replace(c, spread=0.0, per_token=0.0) for c in profile.costs))
    seconds = np.array([done.seconds for done in rounds(profile, Plan(3), 20_000)])
    assert seconds.mean() == pytest.approx(profile.cost(1, Plan(3)).seconds, rel=0.005)
    assert np.log(seconds).std() == pytest.approx(0.05, rel=0.03)
    odd = replace(profile, hiccup_share=0.1, hiccup_extra=4.0)
    slow = np.array([done.seconds for done in rounds(odd, Plan(3), 5_000)])
    assert slow.mean() == pytest.approx(1.4 * seconds.mean(), rel=0.1)  # 1 + 0.1 x 4; standard error 2.5 %


def test_slow_noise_lasts_and_is_shared_with_plain_steps() -> None:
    profile = made_up(memory=50.0, hiccup_share=0.0)
    profile = replace(profile, costs=tuple(replace(c, spread=0.3, jitter=0.0, per_token=0.0) for c in profile.costs))
    session = SimulatedEngine(profile).start(LONG, batch_size=1, seed=0)
    both = np.log([(session.round(Plan(3)).seconds, session.measure_plain().seconds) for _ in range(4_000)]).T
    assert np.corrcoef(both)[0, 1] > 0.999
    x = both[0] - both[0].mean()
    assert (x[50:] * x[:-50]).mean() / x.var() == pytest.approx(np.exp(-1.0), abs=0.25)  # standard error 0.1


def test_context_costs_and_the_clock_moves() -> None:
    engine = SimulatedEngine(made_up(hiccup_share=0.0))
    near, far = (engine.start(Requests((n, n), (64, 64)), batch_size=1, seed=0) for n in (96, 1096))
    began = engine.clock.now()
    first, second = near.round(Plan(0)), far.round(Plan(0))
    assert second.seconds / first.seconds == pytest.approx(1.2, rel=0.001)  # 1,000 tokens x 2e-4
    assert engine.clock.now() - began == pytest.approx(first.seconds + second.seconds)


def test_costs_and_acceptance_shift_in_the_course_of_a_session() -> None:
    calm = made_up(hiccup_share=0.0, skill=0.0)
    shifts = [Shift(1000, cost=1.3, from_steps=3), Shift(1000, log_odds=-1.0)]
    for plan, factor in ((Plan(3), 1.3), (Plan(2), 1.0)):
        pairs = zip(rounds(calm, plan, 1200), rounds(calm, plan, 1200, shifts=shifts), strict=True)
        # contexts differ where less was accepted, so costs are held against 2e-4 a token
        ratios = [b.seconds / a.seconds for a, b in pairs]
        assert ratios[:1000] == pytest.approx([1.0] * 1000)
        assert np.mean(ratios[1000:1020]) == pytest.approx(factor, rel=0.02)
    lengths = [done.accept_length for done in rounds(calm, Plan(3), 4000, shifts=shifts)]
    assert np.mean(lengths[:1000]) > np.mean(lengths[1000:]) + 0.5  # 2.6 and 1.8, standard errors 0.04


def test_a_plain_session_costs_what_plain_decoding_does() -> None:
    profile = made_up(hiccup_share=0.0)
    session = SimulatedEngine(profile).start(LONG, batch_size=4, seed=0, plain=True)
    seconds = np.mean([session.round(Plan(0)).seconds for _ in range(50)])
    assert seconds == pytest.approx(profile.cost(4, None).seconds, rel=0.1)
    with pytest.raises(ValueError, match="so its only plan is 0"):
        session.round(Plan(1))


def test_requests_that_end_at_prefill_are_handed_out_and_endless_ones_refused() -> None:
    session = SimulatedEngine(made_up()).start(Requests((4, 4), (1, 3)), batch_size=2, seed=0)
    done = [c for _ in range(40) for c in session.round(Plan(0)).finished]
    assert sorted({len(c.tokens) for c in done}) == [1, 2, 3]
    with pytest.raises(ValueError, match="raise max_new_tokens"):
        SimulatedEngine(made_up()).start(Requests((4, 4), (1, 1)), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="prompt_tokens must be a length or two"):
        Requests((0, 4), (8, 8))
    with pytest.raises(ValueError, match="a profile has one draft"):
        SimulatedEngine(made_up()).load_draft({}, version=1)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("plan", [Plan(2), Plan(5), Plan.parse("3/2/6")], ids=str)
def test_batched_sessions_draw_from_the_same_distribution(batch_size: int, plan: Plan) -> None:
    # 150 single sessions against 1,000 batched ones, 40 rounds each, requests of 8 to 24 tokens. Differences of means
    # over sessions beyond 4.5 standard errors: odds below 1 in 4,000 for all 24 comparisons. The seeds are fixed.
    profile = replace(with_trees(), drift=0.4, memory=20.0)
    shifts = [Shift(20, cost=1.5, from_steps=2, log_odds=-0.5)]
    single = []
    for seed in range(150):
        session = SimulatedEngine(profile, shifts=shifts).start(REQUESTS, batch_size=batch_size, seed=seed)
        done = [session.round(plan) for _ in range(40)]
        reached = np.mean([(r.correct_drafts >= 2).mean() for r in done])
        single.append(
            (
                np.mean([r.tokens.sum() for r in done]),
                reached,
                np.mean([r.seconds for r in done]),
                np.mean([r.context_lengths.mean() for r in done]),
            )
        )
    batch = VectorSimulator(SimulatedEngine(profile, shifts=shifts), REQUESTS, [Plan(0), plan], [1, 4], 1000)
    rng = np.random.default_rng(0)
    batch.reset(None, np.full(1000, [1, 4].index(batch_size)), rng)
    sums = np.zeros((4, 1000))
    for _ in range(40):
        context = batch.context
        result = batch.round(np.ones(1000, dtype=np.int64), rng)
        sums += result.tokens, result.reached[1] / batch_size, result.seconds, context
    one, many = np.array(single).T, sums / 40
    error = np.sqrt(one.var(1) / one.shape[1] + many.var(1) / many.shape[1])
    assert (np.abs(one.mean(1) - many.mean(1)) < 4.5 * error).all(), (one.mean(1), many.mean(1), error)
    assert many.std(1) == pytest.approx(one.std(1), rel=0.3)  # 5 standard errors of 150 sessions


def test_batched_sessions_of_many_steps_and_large_batches_count_right() -> None:
    sure = Profile(
        "sure", {"kind": "made up", "source": "a test"},
        tuple(Cost(b, plan, 1e-3) for b in (1, 600) for plan in (None, Plan(9))), {"chain": (20.0,) * 6 + (-20.0,) * 3},
    )  # fmt: skip
    batch = VectorSimulator(SimulatedEngine(sure), Requests((8, 8), (100, 100)), [Plan(9)], [1, 600], 2)
    rng = np.random.default_rng(0)
    batch.reset(None, np.array([0, 1]), rng)
    done = batch.round(np.zeros(2, dtype=np.int64), rng)
    assert done.tokens.tolist() == [7, 4200] and done.correct.tolist() == [6, 3600]
    assert done.reached.tolist() == [[1, 600]] * 6 + [[0, 0]] * 3
    kept = [batch.round(np.zeros(2, dtype=np.int64), rng).tokens.tolist() for _ in range(14)]
    assert kept[-1] == [1, 600]  # 99 tokens after prefill: 14 rounds of 7, and of the last only one
    assert batch.context.tolist() == [9.0, 9.0]
