"""Two nodes do one study; a trial whose worker is killed runs again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from specrl.cluster.studies import tune_study
from specrl.io.output import OutputDir
from specrl.studies.config import Study, make_study
from specrl.studies.objective import NotReached
from specrl.studies.report import write_report
from specrl.studies.store import open_study

pytestmark = pytest.mark.usefixtures("two_nodes")
SEARCH = {"adaptive.revisit": {"int": [100, 3000], "log": True}}
SIMULATED = {"trial": "simulated", "objectives": ["share"], "search": SEARCH, "budget": {"rounds": 40, "seeds": 2}}
TIMED = {
    "trial": "train",
    "objectives": ["accept_length"],
    "search": {"learner.learning_rate": {"float": [1e-3, 1e-2], "log": True}},
    "constraints": {"pause_ms": 5.0},
}


def pretend(spec: Study, params: Mapping[str, Any], directory: Path) -> dict[str, float]:
    """A timed trial that takes a moment; the third one's worker is killed once, and the fifth reaches nothing."""
    import ray

    from specrl.core.clock import WallClock

    clock = WallClock()
    directory.mkdir(parents=True, exist_ok=True)
    began, number = clock.now(), int(directory.name)
    if number == 2 and not (directory / "killed").exists():
        (directory / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        raise NotReached("a level")
    while clock.now() - began < 0.3:
        pass
    times = {"node": ray.get_runtime_context().get_node_id(), "began": began, "ended": clock.now()}
    (directory / "times.json").write_text(json.dumps(times))
    return {"accept_length": 1.0 + params["learner.learning_rate"], "pause_ms": float(number)}


def test_two_nodes_do_one_study_each_device_has_one_trial_and_a_killed_one_runs_again(tmp_path: Path) -> None:
    spec, url = make_study(TIMED, "timed"), f"sqlite:///{tmp_path / 'study.db'}"
    told: list[tuple[int, str]] = []
    tune_study(spec, url, tmp_path, 8, run=pretend, say=lambda *what: told.append(what))
    trials = open_study(spec, url).get_trials()
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") == 7 and states[4] == "PRUNED" and len(states) == 8
    assert (tmp_path / "trials/0002/killed").exists() and states[2] == "COMPLETE"
    times = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("trials/*/times.json"))]
    by_node: dict[str, list[tuple[float, float]]] = {}
    for found in times:
        by_node.setdefault(found["node"], []).append((found["began"], found["ended"]))
    assert len(by_node) == 2, "both nodes work"
    for spans in by_node.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:], strict=False))
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    for trial in complete:
        assert trial.values == [1.0 + trial.params["learner.learning_rate"]]
        assert trial.user_attrs["node"] in by_node and trial.user_attrs["values"]["pause_ms"] == trial.number
    found = write_report(open_study(spec, url), spec, OutputDir(tmp_path))
    assert all(row["trial"] <= 5 for row in found["best"]), "the others' pauses are too long"
    assert len(told) == 8 and told[-1][0] >= 7


def test_the_study_is_the_same_one_that_goes_on_without_ray(tmp_path: Path) -> None:
    spec, url = make_study(SIMULATED, "simulated"), f"sqlite:///{tmp_path / 'study.db'}"
    tune_study(spec, url, tmp_path, 2)
    tune_study(spec, url, tmp_path, 3)
    trials = open_study(spec, url).get_trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert all(0.0 < trial.values[0] <= 1.01 and len(trial.user_attrs["intervals"]["share"]) == 3 for trial in trials)
    assert len({trial.params["adaptive.revisit"] for trial in trials}) == 3
    assert (tmp_path / "trials/0002/trial.json").is_file()
