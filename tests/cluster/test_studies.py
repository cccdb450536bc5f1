"""Two nodes run one study; a trial whose worker is killed runs again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specrl.cluster.studies import trial_runner
from specrl.core.clock import WallClock
from specrl.studies.config import Study, make_study
from specrl.studies.goals import Measured, NotReached, OnBlock
from specrl.studies.optimize import open_study, optimize

SIMULATED = {
    "trial": "simulated",
    "objectives": ["share"],
    "search": {"adaptive.revisit": {"int": [100, 3000], "log": True}},
    "budget": {"rounds": 40, "seeds": 2},
}
TIMED = {
    "trial": "train",
    "objectives": ["accept_length"],
    "search": {"learner.learning_rate": {"float": [1e-3, 1e-2], "log": True}},
}


def pretend(study: Study, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None) -> Measured:
    """A timed trial that takes a moment; the third one's worker is killed once, and the fifth reaches no level."""
    import ray

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
    return Measured({"accept_length": 1.0 + params["learner.learning_rate"]})


def test_a_device_runs_one_trial_at_once_and_a_killed_trial_runs_again(two_nodes: str, tmp_path: Path) -> None:
    study, url = make_study(TIMED, "timed"), f"sqlite:///{tmp_path / 'study.db'}"
    with trial_runner(two_nodes, study, run=pretend) as (run, slots):
        assert slots == 2
        optimize(study, url, tmp_path, 8, run=run, jobs=slots)
    trials = open_study(study, url).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4 + ["PRUNED"] + ["COMPLETE"] * 3
    assert (tmp_path / "trials/0002/killed").exists()
    spans: dict[str, list[tuple[float, float]]] = {}
    for path in tmp_path.glob("trials/*/times.json"):
        found = json.loads(path.read_text())
        spans.setdefault(found["node"], []).append((found["began"], found["ended"]))
    assert len(spans) == 2, "both nodes work"
    for on_node in spans.values():
        on_node.sort()
        assert all(end <= begin for (_, end), (begin, _) in zip(on_node, on_node[1:], strict=False))
    for trial in trials:
        assert trial.state.name == "PRUNED" or trial.values == [1.0 + trial.params["learner.learning_rate"]]


def test_a_study_continues_with_and_without_ray(two_nodes: str, tmp_path: Path) -> None:
    study, url = make_study(SIMULATED, "simulated"), f"sqlite:///{tmp_path / 'study.db'}"
    with trial_runner(two_nodes, study) as (run, slots):
        optimize(study, url, tmp_path, 2, run=run, jobs=slots)
    optimize(study, url, tmp_path, 3)
    trials = open_study(study, url).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert all(0.0 < trial.values[0] <= 1.01 and len(trial.user_attrs["intervals"]["share"]) == 3 for trial in trials)
    assert len({trial.params["adaptive.revisit"] for trial in trials}) == 3
    assert (tmp_path / "trials/0002/trial.json").is_file()
