import json
from collections.abc import Iterator

import numpy as np

from specrl.core.plan import Plan
from specrl.core.round import Completion, Round
from specrl.training.drift_watch import DriftWatch

BATCH, ROUNDS = 8, 12  # live requests, and the rounds that each of them lasts


def rounds(alpha: float, requests: int, rng: np.random.Generator, plans: list[Plan], first: int = 0) -> Iterator[Round]:
    """Requests in fleets of `BATCH`; a draft stands with odds of alpha, as long as those before it stood."""
    for ids in np.arange(first, first + requests).reshape(-1, BATCH):
        for number in range(ROUNDS):
            plan = plans[rng.integers(len(plans))]
            correct = (rng.random((BATCH, plan.num_steps)) < alpha).cumprod(-1).sum(-1)
            ended = tuple(Completion(int(i), (1,), (2,)) for i in ids) if number == ROUNDS - 1 else ()
            yield Round(plan, ids, correct + 1, correct, np.full(BATCH, 9), 0.1, 0.1, 0.1, finished=ended)


def seen(watch: DriftWatch, stream: Iterator[Round]) -> int:
    return sum(watch.take(done) for done in stream)


def test_an_alarm_is_raised_when_first_drafts_stand_less_often() -> None:
    """In each of 20 runs, within 96 requests; over 20 x 400 requests before it, 0.4 false ones are expected at most."""
    for seed in range(20):
        rng, watch = np.random.default_rng(seed), DriftWatch(seed)
        assert seen(watch, rounds(0.7, 400, rng, [Plan(3)])) == 0, seed
        assert seen(watch, rounds(0.5, 96, rng, [Plan(3)])) >= 1, seed
        alarm = watch.alarms[0]
        assert 400 < alarm["requests"] <= 496 and 0.65 < alarm["before"] < 0.75 and alarm["after"] < 0.67


def test_neither_other_lengths_nor_a_better_draft_are_drift() -> None:
    rng, watch = np.random.default_rng(0), DriftWatch()
    assert seen(watch, rounds(0.6, 400, rng, [Plan(5)])) == 0
    assert seen(watch, rounds(0.6, 400, rng, [Plan(0), Plan(1), Plan(2)])) == 0
    assert seen(watch, rounds(0.8, 400, rng, [Plan(1)])) == 0
    assert 0.77 < watch.level < 0.83


def test_only_chains_are_watched() -> None:
    rng, watch = np.random.default_rng(0), DriftWatch()
    assert seen(watch, rounds(0.7, 400, rng, [Plan(3, 2, 6)])) == 0
    assert seen(watch, rounds(0.1, 400, rng, [Plan(3, 2, 6), Plan(0)])) == 0
    assert np.isnan(watch.level)


def test_a_watch_goes_on_from_its_state() -> None:
    streams = [list(rounds(alpha, 240, np.random.default_rng(3), [Plan(2)])) for alpha in (0.7, 0.45)]
    whole, first, second = DriftWatch(), DriftWatch(), DriftWatch()
    for done in streams[0]:
        whole.take(done)
        first.take(done)
    first.take(streams[1][0])  # a session that is given up
    first.end_session()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for done in streams[1]:
        assert whole.take(done) == second.take(done)
    assert whole.alarms and whole.state_dict() == second.state_dict()
