"""Arms of a measurement that share the sessions of one engine; `tests/sglang` runs them on real servers."""

import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.config import MeasureConfig
from specrl.core.interfaces import Request
from specrl.core.plan import PLAIN, Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.measure.arms import engine_arms
from specrl.measure.paired import AA_CONTROL, SessionPool, measure

REQUESTS = Listed([Request(prompt, 8, 0.0, ignore_eos=True) for prompt in prompts(8, 5)])


class SingleSessionEngine(LocalEngine):
    """A local engine with the property of a server that it has one session at a time."""

    def __init__(self) -> None:
        super().__init__(tiny_target(), tiny_draft(), max_context=64)

    @property
    def single_session(self) -> bool:
        return True


def test_arms_of_a_single_session_continue_the_same_requests() -> None:
    engine, pool = SingleSessionEngine(), SessionPool(REQUESTS, batch_size=2, seed=0)
    one, two = (pool.open(engine, plain=False) for _ in range(2))
    plain = pool.open(engine, plain=True)
    before = list(one.context_lengths)
    done = one.round(Plan(2))
    assert list(two.context_lengths) == [a + b for a, b in zip(before, done.tokens.tolist(), strict=True)]
    assert list(plain.context_lengths) == before
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        two.round(Plan(2))


def test_every_plan_and_the_control_are_measured_against_plain() -> None:
    arms = engine_arms(SingleSessionEngine(), parse_plans("0,1,3"), control=True)
    results = measure(arms, REQUESTS, batch_size=2, block_tokens=8, until=MeasureConfig(0.9, 1.0))
    assert [m.name for m in results] == [PLAIN, AA_CONTROL, "0", "1/1/2", "3/1/4"]
    assert results[0].speedup is None and all(m.speedup is not None and m.speedup.value > 0 for m in results[1:])
    lengths = [m.accept_length for m in results]
    assert lengths[:3] == [1.0, 1.0, 1.0] and lengths[4] > lengths[3]
    assert {m.batch_size for m in results} == {2}
