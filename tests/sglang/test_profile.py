"""Commands of the local engine on real servers: a recorded profile that simulates, and choosers in turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from server import ON_A_CPU

import specrl  # noqa: F401 - registers the environments
from specrl.commands.evaluate import evaluate
from specrl.commands.profile import profile
from specrl.config import DraftConfig, EngineConfig, TargetConfig, WorkloadConfig
from specrl.core.batch_schedule import parse_traffic
from specrl.core.plan import Plan, parse_plans
from specrl.core.registry import make_engine
from specrl.evaluation.live import open_live
from specrl.evaluation.simulation import Schedule
from specrl.models.draft import Draft
from specrl.sglang.client.engine import SGLangEngine
from specrl.sglang.client.factory import attach_engine
from specrl.simulation.profile import load_profile

PLANS = "0,3"
SHORT = WorkloadConfig(prompt_tokens=24, max_new_tokens=32, temperature=0.0)


@pytest.fixture(scope="module")
def engine(draft: Draft, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    folder = tmp_path_factory.mktemp("draft")
    draft.save(folder)
    engine = make_engine(
        "sglang", target="embedded", draft=folder, plans=parse_plans(PLANS), flags=ON_A_CPU,
        plain_flags=("--disable-overlap-schedule",),
    )  # fmt: skip
    assert isinstance(engine, SGLangEngine)
    yield engine
    engine.close()


@pytest.fixture
def kept(engine: SGLangEngine, monkeypatch: pytest.MonkeyPatch) -> SGLangEngine:
    """The servers in the place of ones that a command would launch; they outlive the command."""
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setattr("specrl.core.registry.make_engine", lambda *_, **__: engine)
    return engine


def test_a_recorded_profile_reproduces_the_server(kept: SGLangEngine, tmp_path: Path) -> None:
    fitted = profile(
        engine=EngineConfig("sglang"), workload=SHORT, batch_sizes=(1, 2), plans=PLANS, seconds=1.0, output_dir=tmp_path
    )
    path = tmp_path / "profile.json"
    read = load_profile(path)
    assert read.plans == fitted.plans == parse_plans(PLANS) and read.batch_sizes == (1, 2) and read.delay == 0
    assert read.provenance["engine"] == "sglang" and read.provenance["sglang"] == kept.server.version
    for batch_size in (1, 2):
        zero, three = (read.cost(batch_size, plan) for plan in parse_plans(PLANS))
        assert zero.draft_share < three.draft_share < 1.0 and read.cost(batch_size, None).seconds > 0.0
    assert 1.2 < read.accept_length(Plan(3)) < 4.0, "it learned"
    rows = evaluate(
        profiles=(str(path),),
        choosers=("adaptive", "3/1/4"),
        reference="3/1/4",
        seeds=2,
        schedule=Schedule("1x10,2x10", 60),
    )
    assert {row["chooser"] for row in rows} == {"adaptive", "3/1/4"}
    env = gym.make("SpecRL/Simulated-v0", profile=str(path), batch_size=2, max_rounds=8)
    env.reset(seed=0)
    assert env.step(1)[4]["plan"] == "3/1/4"
    env.close()


def test_choosers_take_turns_on_the_live_server(kept: SGLangEngine) -> None:
    backend = open_live(
        EngineConfig("sglang"), TargetConfig(), DraftConfig(), SHORT, parse_plans(PLANS), parse_traffic("1x6,2x6"), 3
    )
    found = backend.evaluate(("adaptive", "3/1/4"), range(1), lambda _: None)
    for scores in found.scores.values():
        assert len(scores[0].speedups) == 3 and (scores[0].speedups > 0.0).all()
    assert set(found.scores["3/1/4"][0].choices.tolist()) == {1} and found.source == "live-sglang"
    assert found.cycles is not None and 0.0 < found.bounds["best plan"] <= found.bounds["best table"] * (1 + 1e-9)


def attached(engine: SGLangEngine, *, plugin: bool = True, baseline: bool = True) -> SGLangEngine:
    """The same two servers, as if they had been found running; of the plain one HTTP alone."""
    assert engine.plain is not None
    ours, beside = engine.server, engine.plain.server.client
    known = {"plain_url": beside.url, "plain_api_key": beside.api_key} if baseline else {}
    sockets = ours.sockets if plugin else None
    return attach_engine(ours.client.url, api_key=ours.client.api_key, sockets=sockets, **known)


@pytest.mark.parametrize("plugin", [True, False])
def test_a_running_server_is_rewarded_against_one_without_speculation(engine: SGLangEngine, plugin: bool) -> None:
    found = attached(engine, plugin=plugin)
    env = gym.make(
        "SpecRL/SpecDecode-v0", engine=found, plans=found.plans, batch_size=2, temperature=0.0, max_rounds=4,
        prompt_tokens=24, max_new_tokens=24, ignore_eos=True, allow_parallel=True,
    )  # fmt: skip
    env.reset(seed=0)
    for _ in range(4):
        _, reward, _, _, info = env.step(len(found.plans) - 1)
        assert np.isfinite(reward) and info["plan"] == "3/1/4" and info["t0_s"] > 0.0
    assert info["episode_speedup"] > 0.0
    env.close()
    found.close()


def test_a_running_server_alone_is_compared_with_plan_0(engine: SGLangEngine, caplog: pytest.LogCaptureFixture) -> None:
    found = attached(engine, baseline=False)
    env = gym.make(
        "SpecRL/SpecDecode-v0", engine=found, plans=PLANS, batch_size=2, temperature=0.0, max_rounds=4,
        prompt_tokens=24, max_new_tokens=24, allow_parallel=True,
    )  # fmt: skip
    env.reset(seed=0)
    for _ in range(4):
        _, reward, _, _, info = env.step(1)
        assert np.isfinite(reward) and np.isnan(info["episode_speedup"]) and info["episode_speedup_over_plan0"] > 0.0
    assert "plain_url=" in caplog.text
    env.close()
    found.close()


def test_a_baseline_that_speculates_is_refused(engine: SGLangEngine) -> None:
    ours = engine.server.client
    with pytest.raises(ValueError, match="plain_url must be a server without speculation, but .* runs EAGLE3"):
        attach_engine(ours.url, api_key=ours.api_key, sockets=engine.server.sockets, plain_url=ours.url)
