"""`specrl profile`, `evaluate` and `rl live` on servers, with other engines in the place of the servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_arms import SingleSessionEngine
from tiny import Listed, prompts

from specrl.commands.evaluate import evaluate
from specrl.commands.profile import profile
from specrl.commands.rl import rl_live
from specrl.config import DraftConfig, EngineConfig, WorkloadConfig
from specrl.core.interfaces import Engine, Request
from specrl.core.plan import parse_plans
from specrl.evaluation.simulation import Schedule
from specrl.simulation.engine import SimulatedEngine

SGLANG = EngineConfig("sglang", Path("p"), "--a 'b c'")


class Simulated(SimulatedEngine):
    """Remembers that it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True
        super().close()


class Live(SingleSessionEngine):
    """Counts its sessions, and how often it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[bool] = []
        self.closed = 0

    def start(self, *args: Any, **kwargs: Any) -> Any:
        self.started.append(kwargs.get("plain", False))
        return super().start(*args, **kwargs)

    def close(self) -> None:
        self.closed += 1
        super().close()


def launched_as(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let every launch yield this engine; the arguments of the launches."""
    launches: list[dict[str, Any]] = []

    def make(name: str, **arguments: Any) -> Engine:
        launches.append({"name": name, **arguments})
        return engine

    monkeypatch.setattr("specrl.core.registry.make_engine", make)
    return launches


def test_a_profile_is_recorded_on_servers_that_are_launched_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Simulated("aurora-minimax-m2.1")
    launches = launched_as(engine, monkeypatch)
    options: dict[str, Any] = {"engine": SGLANG, "batch_sizes": (8,), "seconds": 0.01}
    found = profile(**options, plans="0,3", draft=DraftConfig(Path("d")))
    (asked,) = launches
    assert asked["name"] == "sglang" and asked["target"] == "embedded" and asked["draft"] == Path("d")
    assert asked["plans"] == parse_plans("0,3") and asked["python"] == Path("p")
    assert asked["flags"] == ("--a", "b c") and engine.closed
    assert found.provenance["flags"] == ["--a", "b c"] and "device" not in found.provenance and found.delay == 0
    engine.closed = False
    with pytest.raises(ValueError, match="knows plans"):  # by default chains, and the profile does not have all
        profile(**options)
    assert launches[-1]["plans"] == parse_plans("0,1,2,3,4") and engine.closed, "closed after a failure too"


def test_choosers_share_the_sessions_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(8, 4)])
    engine = Live()
    launches = launched_as(engine, monkeypatch)
    monkeypatch.setattr(WorkloadConfig, "open", lambda *_, **__: listed)
    rows = evaluate(
        profiles=("live",), engine=SGLANG, choosers=("adaptive", "2/1/3"), reference="2/1/3", seeds=1,
        schedule=Schedule("1x4,4x4", 16), plans="0,2", draft=DraftConfig(Path("d")),
    )  # fmt: skip
    assert [(asked["draft"], asked["flags"]) for asked in launches] == [(Path("d"), ("--a", "b c"))]
    assert engine.started == [True, False] * 2, "to know costs beforehand, and for the seed"
    assert {row["source"] for row in rows} == {"live-sglang"} and engine.closed == 1
    assert all(float(str(row["share"])) > 0.0 for row in rows)


def test_an_engine_that_is_not_used_is_refused() -> None:
    with pytest.raises(ValueError, match="engine is for '--profiles live', but got 'sglang'"):
        evaluate(engine=SGLANG)


def test_an_agent_is_trained_on_servers_that_the_environment_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def make(name: str, **arguments: Any) -> Any:
        asked.append({"name": name, **arguments})
        raise ValueError("that will do")

    monkeypatch.setattr("specrl.envs.spec_decode.make_engine", make)
    with pytest.raises(ValueError, match="that will do"):
        rl_live(engine=SGLANG, draft=Path("d"))
    assert asked[0]["name"] == "sglang" and asked[0]["python"] == Path("p") and asked[0]["flags"] == ("--a", "b c")
    assert asked[0]["draft"] == Path("d") and all(plan.is_chain for plan in asked[0]["plans"])
