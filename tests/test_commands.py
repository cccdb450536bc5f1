"""Every command runs through the command line with small settings, and writes the documented files."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specrl.cli import COMMANDS, main, options_of
from specrl.io.moved import MOVED_OPTIONS, MOVED_TO_COMMANDS
from specrl.measure.plain import PlainSetting
from specrl.training import quickstart

SIZES = "--workload.prompt_tokens 16 --workload.max_new_tokens 8"
MEASURE = "--measure.seconds 0.1 --measure.precision 0.5"
ELSEWHERE = {
    "train server",  # tests/test_train_sglang.py, tests/sglang
    "train ray",  # tests/cluster
    "rl live",  # tests/test_rl.py
}
# Command line: files that it writes in output_dir. In the order in which one needs the results of another.
LINES = {
    "quickstart --train_seconds 3 --idle_seconds 1 --measure_seconds 3": "draft/config.json learning.png speedup.png",
    f"train {SIZES} --serving.requests 6 --serving.batch_schedule 2x4 --checkpoint 4": (
        "draft/config.json plans.json checkpoint/state.json config.yaml"
    ),
    f"record {SIZES} --requests 6 --batch_size 3": "index.json shard-00000.safetensors",
    "train offline record": "draft/config.json checkpoint",
    "export train": "bundle/draft/config.json bundle/launch.sh bundle/manifest.json",
    "import train/draft": "draft/model.safetensors",
    "doctor --dtypes float32 --threads 1 --batch_sizes 1 --seconds 0.1": "doctor.json",
    f"bench {SIZES} {MEASURE} --draft train/draft --batch_sizes 1 --plans 3": "bench.json bench.md",
    f"compare train offline/draft {SIZES} {MEASURE} --batch_sizes 1": "compare.json",
    "evaluate --profiles aurora-minimax-m2.1 --choosers adaptive,3 --reference 3 --seeds 2": "evaluate.json regret.png",
    "presets minimax-m2.1": "",
    f"profile {SIZES} --draft train/draft --batch_sizes 1 --plans 0,1 --seconds 0.1": "profile.json",
    "study study.yaml --trials 1": "study.json",
    "report train bench": "report.html",
    "rl --agent.n_timesteps 600 --agent.seconds 5 --batch_sizes 1,8": "policy.json plans.json results.json",
}
STUDY = """
trial: simulated
objectives: [share]
fixed: {profiles: [aurora-minimax-m2.1]}
search: {adaptive.revisit: {int: [100, 3000]}}
budget: {rounds: 40, seeds: 2}
pruner: null
"""
LOG = "seconds requests draft_version serve_s learn_s alpha loss staleness tokens_per_s open held dropped skipped "
LOG += "passed_over opted_out bad_updates rollbacks plan_B speedup_B accept_length_B"
SUMS = "rounds requests tokens plain_s draft_s verify_s other_s accepted_1"
WINDOWS = f"served batch_size plan {SUMS}"
BLOCKS = f"temperature batch_size arm block seconds {SUMS}"
MEASURED = "batch_size plan mean_tps p50_tps p05_tps p95_tps total_tps count speedup low high accept_length round_ms "
MEASURED += "draft_ms verify_ms other_ms prefill_s"
ROUNDS = "batch_size plan context tokens correct_drafts draft_s verify_s other_s prefill_s plain_s draft_version"
# Command: columns of its CSV files. 'speedup' includes speedup_low and speedup_high; B is a batch size.
COLUMNS = {
    "quickstart": {
        "log.csv": LOG,
        "windows.csv": WINDOWS,
        "rounds.csv": ROUNDS,
        "measured.csv": MEASURED,
        "blocks.csv": BLOCKS,
    },
    "train": {"log.csv": LOG, "windows.csv": WINDOWS},
    "offline": {"log.csv": "epoch updates accept_length loss alpha seconds"},
    "bench": {"bench.csv": f"temperature {MEASURED}", "blocks.csv": BLOCKS},
    "compare": {
        "compare.csv": "batch_size plan_a plan_b speedup_a speedup_b ratio probability accept_length_a accept_length_b "
        "tps_a tps_b blocks_a blocks_b"
    },
    "evaluate": {
        "evaluate.csv": "source chooser seeds regret speedup share end better closed_to",
        "regret.csv": "source chooser round regret least greatest",
    },
    "study": {
        "trials.csv": "trial state share measured adaptive.revisit seconds retry_of directory",
        "values.csv": "parameter value trials objective mean low high",
    },
    "rl": {"curve.csv": "timesteps seconds speedup"},
}


def columns(path: Path) -> str:
    """Return the columns of a file as `COLUMNS` writes them."""
    header = next(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    names = [name for name in header if not (name.endswith(("_low", "_high")) or re.match("accepted_[^1]", name))]
    names = [re.sub(r"^(plan|speedup|accept_length)_\d+$", r"\1_B", name) for name in names]
    short = [re.sub(r"^(measured) .*|^(closed) to .*", lambda m: m[1] or "closed_to", name) for name in names]
    return " ".join(dict.fromkeys(short))


def test_every_command_is_in_the_list() -> None:
    named = {name for name in COMMANDS for line in LINES if line.startswith(name)}
    assert named | ELSEWHERE == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    text = capsys.readouterr().out
    assert f"usage: specrl {name} " in text and "--print_config" in text
    assert f"\n  specrl {name}" in text.partition("\nexample:")[2]


def test_moved_options_lead_to_options_that_exist() -> None:
    known = {name for command in COMMANDS for name in options_of(command).types}
    assert {name for names in MOVED_OPTIONS.values() for name in names} <= known
    assert set(MOVED_TO_COMMANDS) <= {f"specrl {name}" for name in COMMANDS}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("commands")
    (directory / "study.yaml").write_text(STUDY)
    return directory


@pytest.mark.parametrize(("line", "files"), LINES.items(), ids=[line.partition(" --")[0] for line in LINES])
def test_the_command_runs(
    line: str, files: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(quickstart, "SERVING", replace(quickstart.SERVING, batch_schedule="1x4,4x4,16x4"))
    monkeypatch.setattr(quickstart, "WORKLOAD", replace(quickstart.WORKLOAD, max_new_tokens=16))
    for module in ("measure.arms", "measure.compare", "training.quickstart"):  # the search takes seconds
        monkeypatch.setattr(f"specrl.{module}.fastest_plain", lambda _, __, b: PlainSetting("float32", 1, b, 0.01))
    words = line.split()
    output = "offline" if line.startswith("train offline") else words[0]
    if files:
        words += ["--output_dir", output]
    assert main(words) == 0, capsys.readouterr().err
    assert not [name for name in files.split() if not (workdir / output / name).exists()]
    written = {path.name: columns(path) for path in (workdir / output).glob("*.csv")}
    assert written == COLUMNS.get(output, {})
    if output == "quickstart":
        check_quickstart(json.loads(capsys.readouterr().out.strip().splitlines()[-1]), workdir / output)


def check_quickstart(result: dict[str, Any], out: Path) -> None:
    assert set(result["batch_sizes"]) == {"1", "4", "16"} and result["wall_s"] > result["train_s"] > 0
    for measured in result["batch_sizes"].values():
        low, high = measured["ci95"]
        assert 0.0 < low <= measured["speedup"] <= high
        assert measured["plain_tps"] > 0 and measured["spec_tps"] > 0 and measured["accept_length"] >= 1.0
    assert result["batch_sizes"]["1"]["without_learning"]["accept_length"] < 1.5
    plans = {batch: measured["plan"] for batch, measured in result["batch_sizes"].items()}
    assert json.loads((out / "plans.json").read_text())["plans"] == plans
    assert json.loads((out / "summary.json").read_text())["environment"]["cores"] >= 1


def test_the_documentation_names_every_column() -> None:
    page = (Path(__file__).parent.parent / "docs/reference/files.md").read_text(encoding="utf-8")
    named = {name.replace(" …", "").replace(" ", "_") for name in re.findall(r"`([^`]+)`", page)}
    used = {name for files in COLUMNS.values() for text in files.values() for name in text.split()}
    assert used - named - {"share", "adaptive.revisit"} == set()  # of the study: its objective and its parameter
