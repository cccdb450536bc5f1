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
    """Records its sessions, and counts how often it was closed."""

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

    def make(name: str, **options: Any) -> Engine:
        launches.append(options)
        return engine

    monkeypatch.setattr("specrl.core.registry.make_engine", make)
    return launches


def test_a_profile_is_recorded_on_servers_that_are_launched_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Simulated("aurora-minimax-m2.1")
    launches = launched_as(engine, monkeypatch)
    options: dict[str, Any] = {"engine": SGLANG, "batch_sizes": (8,), "seconds": 0.01}
    recorded = profile(**options, plans="0,3", draft=DraftConfig(Path("d")))
    (launched,) = launches
    assert launched["target"] == "embedded" and launched["draft"] == Path("d") and engine.closed
    assert launched["plans"] == parse_plans("0,3") and launched["python"] == Path("p")
    assert launched["flags"] == ("--a", "b c")
    assert recorded.provenance["flags"] == ["--a", "b c"] and "device" not in recorded.provenance
    assert recorded.delay == 0
    engine.closed = False
    with pytest.raises(ValueError, match="knows plans"):  # the default plans are not all in the profile
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
    assert [(options["draft"], options["flags"]) for options in launches] == [(Path("d"), ("--a", "b c"))]
    assert engine.started == [True, False] * 2, "to measure costs beforehand, and for the seed"
    assert {row["source"] for row in rows} == {"live-sglang"} and engine.closed == 1
    assert all(float(str(row["share"])) > 0.0 for row in rows)


def test_an_engine_that_is_not_used_is_refused() -> None:
    with pytest.raises(ValueError, match="engine"):
        evaluate(engine=SGLANG)


def test_an_agent_is_trained_on_servers_that_the_environment_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []

    def make(name: str, **options: Any) -> Any:
        launches.append({"name": name, **options})
        raise ValueError("launched")

    monkeypatch.setattr("specrl.envs.spec_decode.make_engine", make)
    with pytest.raises(ValueError, match="launched"):
        rl_live(engine=SGLANG, draft=Path("d"))
    (options,) = launches
    assert options["name"] == "sglang" and options["python"] == Path("p") and options["flags"] == ("--a", "b c")
    assert options["draft"] == Path("d") and all(plan.is_chain for plan in options["plans"])
