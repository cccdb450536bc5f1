"""`specrl profile`, `evaluate` and `rl` on servers; the servers are other engines here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.commands import evaluate as evaluating
from specrl.commands import profile as profiling
from specrl.commands import rl_live as learning
from specrl.config import EngineConfig
from specrl.core.interfaces import Request
from specrl.core.plan import parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.evaluation import backends as sources
from specrl.simulation.engine import SimulatedEngine


class Kept(LocalEngine):
    """Counts its sessions, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__(tiny_target(), tiny_draft(), max_context=64)
        self.started: list[bool] = []
        self.closed = 0

    def start(self, *args: Any, **kwargs: Any) -> Any:
        self.started.append(kwargs.get("plain", False))
        return super().start(*args, **kwargs)

    def close(self) -> None:
        self.closed += 1
        super().close()


def test_a_profile_is_recorded_of_servers_that_are_launched_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[Any, ...]] = []
    closed: list[bool] = []

    def launch(*asked: Any) -> SimulatedEngine:
        launched.append(asked)
        engine = SimulatedEngine("aurora-minimax-m2.1")
        monkeypatch.setattr(engine, "close", lambda: closed.append(True))
        return engine

    monkeypatch.setattr(profiling, "launch", launch)
    monkeypatch.setattr(profiling, "plain_steps", profiling.one_by_one)
    monkeypatch.setattr(profiling, "served_facts", lambda engine, flags: {"engine": "sglang", "flags": flags})
    common: dict[str, Any] = {"engine": "sglang", "batch_sizes": (8,), "seconds": 0.01, "sglang_flags": "--a 'b c'"}
    found = profiling.profile(**common, plans="0,3", draft=Path("d"), sglang_python=Path("p"))
    assert launched == [("embedded", Path("d"), parse_plans("0,3"), Path("p"), ["--a", "b c"])] and closed == [True]
    assert found.provenance["engine"] == "sglang" and "device" not in found.provenance and found.delay == 0
    with pytest.raises(ValueError, match="knows plans"):  # chains by default, of which the profile has not all
        profiling.profile(**common)
    assert launched[-1][2] == parse_plans("0,1,2,3,4") and closed == [True, True], "ended after a failure, too"


def test_lanes_share_a_servers_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(8, 4)])
    engine, launched = Kept(), list[tuple[Any, ...]]()

    def launch(*asked: Any) -> Kept:
        launched.append(asked)
        return engine

    monkeypatch.setattr(sources, "launch", launch)
    monkeypatch.setattr("specrl.workloads.stream.open_stream", lambda *_, **__: listed)
    rows = evaluating.evaluate(
        profiles=("live",), engine="sglang", choosers=("adaptive", "2/1/3"), reference="2/1/3", seeds=1, rounds=16,
        traffic="1x4,4x4", plans="0,2", temperature=0.0, draft="d", sglang_flags="--x 1",
    )  # fmt: skip
    assert launched == [("embedded", Path("d"), parse_plans("0,2"), None, ["--x", "1"])]
    assert engine.started == [True, False] * 2, "of what is known at the start, and of the seed"
    assert {row["source"] for row in rows} == {"live-sglang"} and engine.closed == 1
    assert all(float(str(row["share"])) > 0.0 for row in rows)


def test_an_engine_that_nothing_is_decoded_with_is_refused() -> None:
    with pytest.raises(ValueError, match="--engine is what '--profiles live' decodes with, but got 'sglang' for all"):
        evaluating.evaluate(engine="sglang")


def test_an_agent_is_tuned_on_servers_that_the_environment_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def make(name: str, **arguments: Any) -> Any:
        asked.append({"name": name, **arguments})
        raise ValueError("that will do")

    monkeypatch.setattr("specrl.envs.spec_decode.make_engine", make)
    with pytest.raises(ValueError, match="that will do"):
        learning.rl_live(engine=EngineConfig("sglang", Path("p"), "--x 1"), draft=Path("d"))
    assert asked[0]["name"] == "sglang" and asked[0]["python"] == Path("p") and asked[0]["flags"] == ("--x", "1")
    assert asked[0]["draft"] == Path("d") and all(plan.is_chain for plan in asked[0]["plans"])
