"""`specrl study`: its files, its trials, and their results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from specrl.cli import main
from specrl.envs.device_lock import DeviceLock
from specrl.io.read import read_rows
from specrl.measure.plain import PlainSetting
from specrl.studies.config import STUDIES, Study, make_study, read_study
from specrl.studies.goals import Measured, NotReached, OnBlock
from specrl.studies.optimize import open_study, optimize
from specrl.studies.trial import run_trial

CHOOSER: dict[str, Any] = {
    "trial": "simulated",
    "objectives": ["share"],
    "fixed": {"profiles": ["aurora-minimax-m2.1"], "traffic": "1x10,8x10"},
    "search": {"adaptive.revisit": {"int": [10, 3000], "log": True}, "chooser": {"categorical": ["adaptive", "ucb1"]}},
    "budget": {"rounds": 40, "seeds": 3},
}
LIVE: dict[str, Any] = {
    "trial": "train",
    "objectives": ["speedup"],
    "fixed": {
        "workload.max_new_tokens": 8,
        "workload.prompt_tokens": 16,
        "serving.batch_schedule": "4x8",
        "serving.weight_sync_interval": 4,
        "learner.ttt_steps": 1,
    },
    "search": {"learner.learning_rate": {"float": [0.001, 0.01], "log": True}},
    "budget": {"requests": 4, "batch_sizes": [2], "blocks": 2},
}
URL = "sqlite:///study.db"


@pytest.fixture(autouse=True)
def _small_and_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own, and the fastest setting of plain decoding without a search."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("specrl.studies.live.fastest_plain", lambda *_, **__: PlainSetting("float32", 1, 1, 1e-3))


def write(found: dict[str, Any], **changes: Any) -> str:
    Path("mine.yaml").write_text(json.dumps({**found, **changes}))
    return "mine.yaml"


def trials(directory: str = ".", name: str = "mine") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{directory}/study.db").trials


def states(directory: str = ".", name: str = "mine") -> list[str]:
    return [trial.state.name for trial in trials(directory, name)]


def error(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(line.split()) == 2
    return capsys.readouterr().err


def instant(study: Study, params: Mapping[str, Any], directory: Path, on_block: OnBlock | None = None) -> Measured:
    return Measured({"share": params["adaptive.revisit"] / 3000})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ["speedup2"]}, "objectives .* did you mean 'speedup'"),
        ({"trial": "learn"}, "trial must be"),
        ({"search": {}}, "search"),
        ({"search": {"learner.learning_rat": {"float": [0.1, 1]}}}, "learning_rat"),
        ({"search": {"learner.ttt_steps": {"float": [1, 4]}}}, "search.learner.ttt_steps"),
        ({"search": {"learner.ttt_steps": {"int": [0, 4]}}}, "learner.ttt_steps must be at least 1"),
        ({"search": {"learner.loss": {"categorical": ["forward_kl", "kl"]}}}, "search.learner.loss"),
        ({"search": {"serving.chooser": {"plans": "1/1/2,3/1/7"}}}, "search.serving.chooser: .*num_draft_tokens"),
        ({"search": {"seed": {"int": [8, 4]}}}, "search.seed: .*low <= high"),
        ({"search": {"seed": [1, 4]}}, "search.seed: must be"),
        ({"search": {"seed": {"int": [1, 4]}}, "fixed": {"seed": 0}}, "'seed' is both"),
        ({"objectives": ["requests_to_accept_length"]}, "levels.accept_length go together"),
        ({"objectives": ["requests_to_accept_length"], "levels": {"accept_length": 2}}, "needs a fixed plan"),
        ({"constraints": {"memory": 3}}, "constraints must be"),
        ({"objectives": ["speedup", "pause_ms"], "pruner": {}}, "objectives must be one of .* with a pruner"),
        ({"sampler": "grid"}, "learning_rate must be .* with sampler 'grid'"),
        ({"sampler": "grid", "search": {"seed": {"int": [0, 1]}}, "trials": 3}, "at most the 2 points"),
        ({"budget": {"blocks": 1}}, "budget.blocks must be at least 2"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    fixed = {name: value for name, value in LIVE["fixed"].items() if name not in changes.get("search", {})}
    with pytest.raises(ValueError, match=message):
        make_study({**LIVE, "fixed": fixed, **changes}, "mine")


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_studies_fit_their_trials(path: Path) -> None:
    study = read_study(path.stem)
    assert study.about and study.name == path.stem
    drawn = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask(study.distributions)
    assert study.make_trial(drawn.params)


def test_a_simulated_study_writes_its_results_and_continues(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"study --spec {write(CHOOSER, trials=5)} --output_dir out".split()) == 0
    printed = capsys.readouterr().out
    assert "0 of 5 trials" in printed and "the best settings: " in printed and "optuna-dashboard" in printed
    rows = read_rows(Path("out/trials.csv"))
    best = json.loads(Path("out/study.json").read_text())["best"]
    assert [trial["share"] for trial in best] == sorted((float(row["share"]) for row in rows), reverse=True)
    assert all(float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"]) for row in rows)
    for plot in ("history", "slice", "importance", "blocks"):
        assert Path(f"out/{plot}.png").stat().st_size > 5000
    means = read_rows(Path("out/values.csv"))
    assert [row["value"] for row in means] == ["adaptive", "ucb1"] and sum(int(row["trials"]) for row in means) == 5

    again = run_trial("out/study.yaml", {name: best[0][name] for name in CHOOSER["search"]}, Path("again"))
    assert again.values["share"] == best[0]["share"], "simulated trials are deterministic"

    assert main("study --output_dir out --trials 6".split()) == 0
    assert states("out") == ["COMPLETE"] * 6
    changed = write(CHOOSER, fixed={**CHOOSER["fixed"], "traffic": "2x10"})
    assert "fixed of 'mine' changed" in error(f"study --spec {changed} --output_dir out", capsys)


def test_every_setting_of_the_adaptive_chooser_has_an_effect() -> None:
    base = {"profiles": ["aurora-minimax-m2.1"], "traffic": "1x10,8x10", "shifts": "at=100,cost=1.5,from_steps=2"}
    study = make_study({**CHOOSER, "fixed": base, "budget": {"rounds": 400, "seeds": 2}}, "mine")
    changes = {"revisit": 10, "survival_memory": 20.0, "cost_memory": 5.0, "cost_drift": 0.5}
    blocks = [
        run_trial(study, {f"adaptive.{name}": value}, Path("trial")).blocks["share"]
        for name, value in [("revisit", 600), *changes.items()]
    ]
    assert all(found != blocks[0] for found in blocks[1:])


def test_several_processes_run_one_study() -> None:
    assert main(f"study --spec {write(CHOOSER, trials=7)} --jobs 2 --output_dir out".split()) == 0
    assert 7 <= states("out").count("COMPLETE") <= 8, "two processes may begin the last trial at once"
    drawn = [tuple(trial.params.values()) for trial in trials("out")]
    assert len(set(drawn)) == len(drawn), "processes have random numbers of their own"


HANGS = """
import sys, time
from pathlib import Path
from specrl.studies.config import read_study
from specrl.studies.optimize import optimize


def hang(*trial):
    time.sleep(1)  # until the first heartbeat is recorded
    Path("started").touch()
    time.sleep(600)


optimize(read_study("mine.yaml"), sys.argv[1], Path("out"), 3, run=hang, grace_s=1)
"""


def test_a_killed_trial_is_retried_once_its_heartbeat_expires() -> None:
    study = read_study(write(CHOOSER))
    killed = subprocess.Popen([sys.executable, "-c", HANGS, URL])
    while not Path("started").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    optimize(study, URL, Path("out"), 3, run=instant, grace_s=1)
    first, *others = trials()
    assert first.state.name == "FAIL" and [trial.state.name for trial in others] == ["COMPLETE"] * 3
    assert first.params in [trial.params for trial in others]


def raising(error: type[BaseException]) -> Callable[..., Measured]:
    def run(*_: Any) -> Measured:
        raise error("the reason")

    return run


def test_an_interrupted_trial_is_run_again() -> None:
    study = make_study(CHOOSER, "mine")
    with pytest.raises(KeyboardInterrupt):
        optimize(study, URL, Path("out"), 1, run=raising(KeyboardInterrupt))
    optimize(study, URL, Path("out"), 1, run=instant)
    first, second = trials()
    assert (first.state.name, second.state.name) == ("FAIL", "COMPLETE") and first.params == second.params


def test_failed_trials_end_the_study() -> None:
    with pytest.raises(ValueError, match="the last 3 failed"):
        optimize(make_study(CHOOSER, "mine"), URL, Path("out"), 5, run=raising(RuntimeError))
    assert states() == ["FAIL"] * 3


def test_significantly_worse_trials_are_pruned() -> None:
    """Plan 0 costs more than plain decoding, so its speedup is below the best plan's in every simulation."""
    found = {**CHOOSER, "objectives": ["speedup"], "search": {"chooser": {"categorical": ["3/1/4", "0"]}}}
    pruner = {"p_threshold": 0.1, "n_startup_steps": 4}
    study = make_study({**found, "pruner": pruner, "budget": {"rounds": 40, "seeds": 10}}, "mine")
    kept = open_study(study, URL)
    for total, chooser in enumerate(("3/1/4", "0"), 1):
        kept.enqueue_trial({"chooser": chooser})
        optimize(study, URL, Path("out"), total)
    best, worse = kept.trials
    assert worse.state.name == "PRUNED" and len(worse.intermediate_values) < 10 == len(best.intermediate_values)


def test_a_live_study_trains_measures_exports_and_locks_its_device(capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"constraints": {"pause_ms": 1e9, "peak_memory_mib": 1e6}}
    fixed = {**LIVE["fixed"], "draft.vocab_size": 64}
    spec = write(LIVE, objectives=["speedup", "learner_seconds"], fixed=fixed, trials=2, **limits)
    assert main(f"study --spec {spec} --output_dir out".split()) == 0
    printed = capsys.readouterr().out
    assert states("out") == ["COMPLETE"] * 2 and Path("out/pareto.png").stat().st_size > 5000
    trial = json.loads(Path("out/trials/0001/trial.json").read_text())
    values = trial["values"]
    assert trial["intervals"]["speedup"]["value"] == values["speedup"] and len(trial["blocks"]["speedup"]) == 2
    assert 50 < values["peak_memory_mib"] < 1e5 and 0 < values["pause_ms"] <= 1e3 * values["learner_seconds"]

    command = next(line for line in printed.splitlines() if "specrl export" in line).partition("specrl ")[2]
    assert main([*command.split(), "--output_dir", "exported"]) == 0
    assert Path("exported/bundle/manifest.json").is_file()
    run = "out/trials/0000"
    assert main(f"train --config {run}/config.yaml --resume --serving.requests 12 --output_dir {run}".split()) == 0

    assert "jobs must be 1" in error("study --spec learner --jobs 2", capsys)
    holder = DeviceLock("cpu")
    holder.acquire()
    assert "'cpu' is in use" in error("study --output_dir out --trials 3", capsys)
    with pytest.raises(ValueError, match="in use by another study"):
        run_trial(spec, {"learner.learning_rate": 0.005}, Path("trial"))
    holder.release()


def test_a_level_counts_requests_or_prunes_the_trial() -> None:
    wait = {**LIVE, "objectives": ["requests_to_accept_length"], "fixed": {**LIVE["fixed"], "serving.chooser": "2/1/3"}}
    wait["budget"] = {"requests": 12, "batch_sizes": [2], "blocks": 2}
    params = {"learner.learning_rate": 0.005}
    easy = run_trial(make_study({**wait, "levels": {"accept_length": 0.5}}, "easy"), params, Path("trial"))
    assert 1 <= easy.values["requests_to_accept_length"] <= 12

    hard = make_study({**wait, "levels": {"accept_length": 99.0}}, "hard")
    with pytest.raises(NotReached, match="not within 12 requests"):
        run_trial(hard, params, Path("trial"))
    optimize(hard, URL, Path("out"), 1, run=raising(NotReached))
    assert states(name="hard") == ["PRUNED"]


def test_without_optuna_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install specrl[study]" in error("study --spec chooser", capsys)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
