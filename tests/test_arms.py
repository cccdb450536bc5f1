"""Arms of a measurement that share the sessions of one engine; `tests/sglang` runs them on real servers."""

from collections.abc import Sequence

import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.cli import main
from specrl.config import MeasureConfig
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.measure.arms import engine_arms
from specrl.measure.paired import AA_CONTROL, PLAIN, ArmResult, SessionPool, measure


class OneSession(LocalEngine):
    """A local engine that says it has one session at a time, as a server does."""

    def __init__(self) -> None:
        super().__init__(tiny_target(), tiny_draft(), max_context=64)

    @property
    def single_session(self) -> bool:
        return True


def requests(prompted: Sequence[tuple[int, ...]]) -> Listed:
    return Listed([Request(prompt, 8, 0.0, ignore_eos=True) for prompt in prompted])


def test_arms_of_a_single_session_continue_the_same_requests() -> None:
    engine = OneSession()
    pool = SessionPool(requests(prompts(8, 5)), batch_size=2, seed=0)
    one, two = (pool.open(engine, plain=False) for _ in range(2))
    plain = pool.open(engine, plain=True)
    before = list(one.context_lengths)
    done = one.round(Plan(2))
    assert list(two.context_lengths) == [a + b for a, b in zip(before, done.tokens.tolist(), strict=True)]
    assert list(plain.context_lengths) == before
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        two.round(Plan(2))


def test_every_plan_is_measured_against_plain_and_plain_against_itself() -> None:
    engine, plans = OneSession(), parse_plans("0,1,3")

    def measured(plans: Sequence[Plan], batch_size: int) -> list[ArmResult]:
        arms, until = engine_arms(engine, plans, control=True), MeasureConfig(0.9, 1.0)
        return measure(arms, requests(prompts(8, 5)), batch_size=batch_size, block_tokens=8, until=until)

    found = measured(plans, 2)
    assert [m.name for m in found] == [PLAIN, AA_CONTROL, "0", "1/1/2", "3/1/4"]
    assert found[0].speedup is None and all(m.speedup is not None and m.speedup.value > 0 for m in found[1:])
    assert [m.accept_length for m in found[:3]] == [1.0, 1.0, 1.0] and found[4].accept_length > found[3].accept_length
    assert [m.batch_size for m in measured(plans[:1], 1)] == [1, 1, 1]


def test_a_tree_beside_chains_gets_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--engine", "sglang", "--plans", "0,3/2/6"]) == 2
    assert "leave out 3/2/6" in capsys.readouterr().err
