"""`specrl study`: what its files may say, and what becomes of trials."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from specrl.cli import main
from specrl.commands.study import run_trial
from specrl.envs.device_lock import Exclusive
from specrl.measure.local_arms import PlainSetting
from specrl.studies.config import STUDIES, make_study, read_study
from specrl.studies.store import alive, open_study, retry_once, this_process
from specrl.studies.worker import work

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
    "fixed": {"max_new_tokens": 8, "prompt_tokens": 16, "traffic": "4x8", "sync_every": 4, "learner.passes": 1},
    "search": {"learner.learning_rate": {"float": [0.001, 0.01], "log": True}},
    "budget": {"requests": 4, "batch_sizes": [2], "blocks": 2},
}


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of its own, and plain decoding's setting as given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("specrl.studies.live.fastest_plain", lambda *_: PlainSetting("float32", 1, 1e-3))
    monkeypatch.setattr("specrl.studies.live.VOCABULARY_REQUESTS", 4)


def write(found: dict[str, Any], **changes: Any) -> str:
    Path("mine.yaml").write_text(json.dumps({**found, **changes}))
    return "mine.yaml"


def url(directory: str) -> str:
    return f"sqlite:///{Path(directory, 'study.db').resolve()}"


def states(directory: str) -> list[str]:
    """Of the trials so far; [] while there is nothing to read, or it is being written."""
    try:
        with closing(sqlite3.connect(Path(directory, "study.db"), timeout=0.0)) as file:
            return [row[0] for row in file.execute("select state from trials order by number")]
    except sqlite3.OperationalError:
        return []


def error(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(line.split()) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1 and "Traceback" not in out
    return out


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"objectives": ["speedup2"]}, "did you mean 'speedup'?"),
    ({"trial": "learn"}, "trial must be one of train, simulated"),
    ({"serach": {}}, "did you mean 'search'?"),
    ({"search": {}}, "search must name at least one parameter"),
    ({"search": {"learner.learning_rat": {"float": [0.1, 1]}}}, "did you mean 'learner.learning_rate'?"),
    ({"search": {"requests": {"int": [1, 2]}}}, "must name parameters of 'train', but got 'requests'"),
    ({"search": {"learner.passes": {"float": [1, 4]}}}, "search.learner.passes: learner.passes must be int"),
    ({"search": {"learner.passes": {"int": [0, 4]}}}, "learner.passes must be at least 1, but got 0"),
    ({"search": {"learner.loss": {"categorical": ["forward_kl", "kl"]}}}, "learner.loss"),
    ({"search": {"chooser": {"plans": "1/1/2,3/1/7"}}}, "write '3/1/4'"),
    ({"search": {"sync_every": {"int": [8, 4]}}}, "must have low < high"),
    ({"search": {"sync_every": {"int": [0, 4], "log": True}}}, "with log low above 0"),
    ({"search": {"sync_every": [1, 4]}}, "must be one of float, int, categorical and plans"),
    ({"search": {"seed": {"int": [1, 4]}}, "fixed": {"seed": 0}}, "searched or fixed, but 'seed' is both"),
    ({"fixed": {"temperature": "hot"}}, "temperature must be float"),
    ({"objectives": ["requests_to_accept_length"]}, "levels.accept_length go together"),
    ({"objectives": ["requests_to_accept_length"], "levels": {"accept_length": 2}}, "needs one plan, fixed.chooser"),
    ({"constraints": {"memory": 3}}, "peak_memory_mib or pause_ms"),
    ({"objectives": ["speedup", "pause_ms"], "pruner": {}}, "a pruner needs one objective"),
    ({"sampler": "grid"}, "a grid needs categorical, plans or int"),
    ({"sampler": "grid", "search": {"seed": {"int": [0, 1]}}, "trials": 3}, "at most the 2 points of the grid"),
    ({"budget": {"blocks": 1}}, "blocks and seeds of at least 2"),
    ({"budget": {"block": 1}}, "did you mean 'blocks'?"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_file_that_does_not_fit_is_told_why(changes: dict[str, Any], message: str) -> None:
    searched = changes.get("search", {})
    fixed = {name: value for name, value in LIVE["fixed"].items() if name not in searched}
    with pytest.raises(ValueError) as found:
        make_study({**LIVE, "fixed": fixed, **changes}, "mine")
    assert message in str(found.value)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_study_fits_the_commands_and_draws_what_they_take(path: Path) -> None:
    study = read_study(path.stem)
    assert study.about and study.name == path.stem
    for name, found in study.distributions().items():
        for value in study.search[name].extremes():
            assert found._contains(found.to_internal_repr(value))


def test_the_ready_studies_are_the_published_ablations_and_two_searches() -> None:
    assert {path.stem for path in STUDIES.iterdir()} == {
        "kl_direction", "sync_interval", "discard_topk", "lookahead", "learning_rate", "learner", "chooser",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["kl_direction", "sync_interval", "discard_topk", "lookahead", "learning_rate", "learner"]
)
def test_a_trial_of_each_ready_live_study_runs(name: str) -> None:
    small = {"budget": {**LIVE["budget"]}, "trials": 1}
    import yaml  # type: ignore[import-untyped]

    found = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    short = {key: value for key, value in LIVE["fixed"].items() if key not in found["search"]}
    study = make_study({**found, **small, "fixed": {**found["fixed"], **short}}, name)
    params = {key: dimension.extremes()[-1] for key, dimension in study.search.items()}
    values = run_trial(study, params, Path("trial"))
    assert set(study.objectives) <= set(values) and values["speedup"] > 0 and values["accept_length"] >= 1
    assert values["pause_ms"] > 0 and values["learner_seconds"] >= values["pause_ms"] / 1e3


def test_a_simulated_study_ends_with_its_results_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"study --spec {write(CHOOSER, trials=5)} --output_dir out".split()) == 0
    printed = capsys.readouterr().out
    assert "5/5 trial 4: share" in printed and "the best settings: " in printed and "optuna-dashboard" in printed
    rows = list(csv.DictReader(Path("out/trials.csv").read_text().splitlines()))
    shares = {int(row["trial"]): float(row["share"]) for row in rows}
    best = json.loads(Path("out/study.json").read_text())["best"]
    assert [trial["share"] for trial in best] == sorted(shares.values(), reverse=True)
    assert all(float(row["share_low"]) <= float(row["share"]) <= float(row["share_high"]) for row in rows)
    for plot in ("history", "slice", "importance", "blocks"):
        assert Path(f"out/{plot}.png").stat().st_size > 5000
    means = list(csv.DictReader(Path("out/values.csv").read_text().splitlines()))
    assert [row["value"] for row in means] == ["adaptive", "ucb1"] and sum(int(row["trials"]) for row in means) == 5

    again = run_trial("out/study.yaml", {key: best[0][key] for key in CHOOSER["search"]}, Path("again"))
    assert again["share"] == best[0]["share"], "simulated trials are repeatable"

    assert main("study --output_dir out --trials 6".split()) == 0
    assert states("out") == ["COMPLETE"] * 6
    changed = write(CHOOSER, fixed={**CHOOSER["fixed"], "traffic": "2x10"})
    assert "goes on as it began, but fixed of 'mine' changed" in error(
        f"study --spec {changed} --output_dir out", capsys
    )


def test_killed_half_way_it_ends_with_the_trials_asked_for() -> None:
    spec = write(CHOOSER, trials=12)  # so many that it does not end between two looks
    command = [sys.executable, "-m", "specrl", "study", "--spec", spec, "--output_dir", "out"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)
        # Once it has stopped, or ended, what is seen stays so until it is killed.
        os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found = states("out")
        if found.count("COMPLETE") >= 2 and found[-1] == "RUNNING":
            break
        first.send_signal(signal.SIGCONT)
        assert first.poll() is None, "it ended by itself"
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = states("out")
    assert "RUNNING" in before and before.count("COMPLETE") < 12

    subprocess.run([*command[:4], "--output_dir", "out"], check=True, stdout=subprocess.DEVNULL)
    after = states("out")
    assert after.count("COMPLETE") == 12 and "RUNNING" not in after and after.count("FAIL") <= 1
    study = optuna.load_study(study_name="mine", storage=url("out"))
    killed = study.trials[before.index("RUNNING")]
    retried = [trial for trial in study.trials if trial.user_attrs.get("retry_of") == killed.number]
    if killed.params:  # else it was killed before it drew any; those it had not drawn are drawn now
        assert [{name: trial.params[name] for name in killed.params} for trial in retried] == [killed.params]


def test_several_processes_do_one_study_and_no_trial_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"study --spec {write(CHOOSER, trials=7)} --jobs 2 --output_dir out".split()) == 0
    assert states("out").count("COMPLETE") == 7
    study = optuna.load_study(study_name="mine", storage=url("out"))
    drawn = [tuple(trial.params.values()) for trial in study.trials]
    assert len(set(drawn)) == len(drawn), "processes draw apart"


def test_a_dead_process_is_told_from_a_live_one_and_retried_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = this_process()
    theirs = {**me, "pid": child.pid, "started": None}
    assert alive(me) and alive(theirs) and alive({**theirs, "host": "elsewhere"})
    child.communicate(b"\n")
    assert not alive(theirs) and not alive({**me, "started": "0"}), "a number used again is another process"

    study = open_study(make_study(CHOOSER, "mine"), "sqlite:///study.db")
    trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    for _ in range(2):
        retry_once(study, study.trials[-1])
    again = study.trials[1:]
    assert [t.system_attrs["fixed_params"] for t in again] == [trial.params]


def test_trials_surely_worse_on_the_same_blocks_are_pruned() -> None:
    """Plan 0 costs over plain decoding, so its speedup is below the best plan's in every play."""
    found = {**CHOOSER, "objectives": ["speedup"], "search": {"chooser": {"categorical": ["3/1/4", "0"]}}}
    study = make_study(
        {**found, "sampler": "grid", "trials": 2, "pruner": {"p_threshold": 0.1, "n_startup_steps": 4},
         "budget": {"rounds": 40, "seeds": 10}}, "mine",
    )  # fmt: skip
    kept = open_study(study, "sqlite:///study.db")
    kept.enqueue_trial({"chooser": "3/1/4"})
    work(study, "sqlite:///study.db", Path("out"), 1)
    kept.enqueue_trial({"chooser": "0"})
    work(study, "sqlite:///study.db", Path("out"), 2)
    best, worse = kept.trials
    assert worse.state.name == "PRUNED" and len(worse.intermediate_values) < 10 == len(best.intermediate_values)


def test_a_live_study_trains_measures_exports_and_owns_its_device(capsys: pytest.CaptureFixture[str]) -> None:
    limits = {"constraints": {"pause_ms": 1e9, "peak_memory_mib": 1e6}}
    spec = write(LIVE, objectives=["speedup", "learner_seconds"], trials=2, **limits)
    assert main(f"study --spec {spec} --output_dir out".split()) == 0
    printed = capsys.readouterr().out
    assert states("out") == ["COMPLETE"] * 2 and Path("out/pareto.png").stat().st_size > 5000
    trial = json.loads(Path("out/trials/0001/trial.json").read_text())
    assert trial["intervals"]["speedup"]["value"] == trial["values"]["speedup"] and len(trial["blocks"]["speedup"]) == 2
    assert 50 < trial["values"]["peak_memory_mib"] < 1e5

    command = next(line for line in printed.splitlines() if "specrl export" in line).partition("specrl ")[2]
    assert main([*command.split(), "--output_dir", "exported"]) == 0
    assert Path("exported/bundle/manifest.json").is_file()
    run = "out/trials/0000"
    assert main(f"train --config {run}/config.yaml --resume --requests 12 --output_dir {run}".split()) == 0

    assert "a timed trial owns its device, so jobs must be 1" in error("study --spec learner --jobs 2", capsys)
    holder = Exclusive("cpu")
    holder.take()
    assert "a timed trial owns its device, but 'cpu' is in use" in error("study --output_dir out --trials 3", capsys)
    with pytest.raises(ValueError, match="in use by another study"):
        run_trial(spec, {"learner.learning_rate": 0.005}, Path("trial"))
    holder.give_back()


def test_a_level_that_is_not_reached_prunes_and_one_that_is_counts_requests() -> None:
    wait = {**LIVE, "objectives": ["requests_to_accept_length"], "fixed": {**LIVE["fixed"], "chooser": "2/1/3"}}
    wait["budget"] = {"requests": 12, "batch_sizes": [2], "blocks": 2}
    easy = make_study({**wait, "levels": {"accept_length": 0.5}}, "easy")
    values = run_trial(easy, {"learner.learning_rate": 0.005}, Path("trial"))
    assert 1 <= values["requests_to_accept_length"] <= 12
    hard = make_study({**wait, "levels": {"accept_length": 99.0}}, "hard")
    kept = open_study(hard, "sqlite:///study.db")
    work(hard, "sqlite:///study.db", Path("out"), 1)
    assert kept.trials[0].state.name == "PRUNED" and "not within 12 requests" in kept.trials[0].user_attrs["pruned"]


def test_trials_that_cannot_run_end_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("specrl.studies.worker.measure_trial", fail)
    with pytest.raises(ValueError, match="the last 3 failed"):
        work(make_study(CHOOSER, "mine"), "sqlite:///study.db", Path("out"), 5)


def test_without_optuna_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "pip install specrl[study]" in error("study --spec chooser", capsys)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())
