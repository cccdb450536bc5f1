"""Lanes that share a server's requests; `tests/sglang` runs them on real servers."""

from collections.abc import Sequence

import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.cli import main
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.measure.local_arms import NULL
from specrl.measure.paired import PLAIN
from specrl.measure.sglang_arms import Shared, measure_served


def requests(prompted: Sequence[tuple[int, ...]]) -> Listed:
    return Listed([Request(prompt, 8, 0.0, ignore_eos=True) for prompt in prompted])


def test_lanes_go_on_with_the_same_requests() -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    shared = Shared(engine)
    workload = requests(prompts(8, 5))
    one, two = (shared.start(workload, batch_size=2, seed=0) for _ in range(2))
    plain = shared.start(workload, batch_size=2, seed=0, plain=True)
    before = list(one.context_lengths)
    done = one.round(Plan(2))
    assert list(two.context_lengths) == [a + b for a, b in zip(before, done.tokens.tolist(), strict=True)]
    assert list(plain.context_lengths) == before


def test_every_plan_is_measured_against_plain_and_plain_against_itself() -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    plans = parse_plans("0,1,3")
    found = measure_served(
        engine, plans, requests(prompts(8, 5)), batch_size=2, block_tokens=8, precision=0.9, seconds=1.0
    )
    assert [m.name for m in found] == [PLAIN, NULL, "0", "1/1/2", "3/1/4"]
    assert found[0].speedup is None and all(m.speedup is not None and m.speedup.value > 0 for m in found[1:])
    assert [m.accept_length for m in found[:3]] == [1.0, 1.0, 1.0] and found[4].accept_length > found[3].accept_length
    again = measure_served(
        engine, plans[:1], requests(prompts(8, 5)), batch_size=1, block_tokens=8, precision=0.9, seconds=1.0
    )
    assert [m.batch_size for m in again] == [1, 1, 1]
    engine.close()


def test_a_tree_beside_chains_gets_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--engine", "sglang", "--plans", "0,3/2/6"]) == 2
    assert "leave out 3/2/6, or name it alone" in capsys.readouterr().err
