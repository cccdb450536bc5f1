"""Every command runs through the command line, with tiny settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from specrl.cli import COMMANDS, main, options_of
from specrl.io.moved import MOVED_OPTIONS, MOVED_TO_COMMANDS

SIZES = "--workload.prompt_tokens 16 --workload.max_new_tokens 8"
MEASURE = "--measure.seconds 0.1 --measure.precision 0.5"
ELSEWHERE = {
    "quickstart",  # tests/test_quickstart.py
    "train server",  # tests/test_train_sglang.py, tests/sglang
    "train ray",  # tests/cluster
    "rl live",  # tests/test_rl.py
}
# Command line: files that it writes in output_dir. In the order in which one needs the results of another.
LINES = {
    f"train {SIZES} --serving.requests 6 --serving.batch_schedule 2x4 --checkpoint 4": (
        "draft/config.json log.csv plans.json checkpoint/state.json config.yaml"
    ),
    f"record {SIZES} --requests 6 --batch_size 3": "index.json shard-00000.safetensors",
    "train offline record": "draft/config.json log.csv checkpoint",
    "export train": "bundle/draft/config.json bundle/launch.sh bundle/manifest.json",
    "import train/draft": "draft/model.safetensors",
    "doctor --dtypes float32 --threads 1 --batch_sizes 1 --seconds 0.1": "doctor.json",
    f"bench {SIZES} {MEASURE} --draft train/draft --batch_sizes 1 --plans 3": "bench.json bench.csv blocks.csv",
    f"compare train offline/draft {SIZES} {MEASURE} --batch_sizes 1": "compare.json compare.csv",
    "evaluate --profiles aurora-minimax-m2.1 --choosers adaptive,3 --reference 3 --seeds 2": "evaluate.csv",
    "presets minimax-m2.1": "",
    f"profile {SIZES} --draft train/draft --batch_sizes 1 --plans 0,1 --seconds 0.1": "profile.json",
    "study study.yaml --trials 1": "study.json trials.csv",
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
    known = {name for command in COMMANDS for name in options_of(command).table}
    new = {name for names in MOVED_OPTIONS.values() for name in names}
    assert {name for name in new - known if not name.startswith("learner.")} == set()
    assert set(MOVED_TO_COMMANDS) <= {f"specrl {name}" for name in COMMANDS}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("commands")
    (found / "study.yaml").write_text(STUDY)
    return found


@pytest.mark.parametrize(("line", "files"), LINES.items(), ids=[line.partition(" ")[0] for line in LINES])
def test_the_command_runs(
    line: str, files: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("specrl.measure.plain.DTYPES", ("float32",))  # bfloat16 is slow on some processors
    words = line.split()
    output = "offline" if line.startswith("train offline") else words[0]
    if files:
        words += ["--output_dir", output]
    assert main(words) == 0, capsys.readouterr().err
    missing = [name for name in files.split() if not (workdir / output / name).exists()]
    assert not missing
