"""The quickstart, at a hundredth of their length: what it prints and leaves behind."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from specrl.cli import main
from specrl.measure.plain import PlainSetting
from specrl.models.draft import load_draft
from specrl.training import quickstart as training


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_quickstart_ends_in_its_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SERVING", replace(training.SERVING, batch_schedule="1x4,4x4,16x4"))
    monkeypatch.setattr(training, "WORKLOAD", replace(training.WORKLOAD, max_new_tokens=16))
    monkeypatch.setattr(training, "fastest_plain", lambda _, __, batch: PlainSetting("float32", 1, batch, 0.01))
    line = "quickstart --train_seconds 3 --idle_seconds 1 --measure_seconds 3 --output_dir out"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    result = json.loads(printed[-1])
    assert set(result["batch_sizes"]) == {"1", "4", "16"}
    for measured in result["batch_sizes"].values():
        low, high = measured["ci95"]
        assert 0.0 < low <= measured["speedup"] <= high
        assert measured["plain_tps"] > 0 and measured["spec_tps"] > 0 and measured["accept_length"] >= 1.0
    assert result["batch_sizes"]["1"]["without_learning"]["accept_length"] < 1.5
    assert result["wall_s"] > result["train_s"] > 0
    out = Path(result["output_dir"])
    log = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert result["requests_served"] == int(log[-1]["requests"])  # none, where the machine is very busy
    load_draft(out / "draft")
    assert json.loads((out / "plans.json").read_text())["plans"] == {
        batch: measured["plan"] for batch, measured in result["batch_sizes"].items()
    }
    rounds = list(csv.DictReader((out / "rounds.csv").read_text().splitlines()))
    assert rounds and all(float(row["verify_s"]) > 0 for row in rounds)
    assert "train_seconds: 3.0" in (out / "config.yaml").read_text()
    assert json.loads((out / "summary.json").read_text())["environment"]["cores"] >= 1
    for name in ("learning.png", "speedup.png"):
        assert imread(out / name).std() > 0.01


WRONG = {
    "quickstart --train_seconds -1": "train_seconds must be above 0",
    "quickstart --measure_seconds soon": "--measure_seconds must be a number",
    "quickstart --minutes 5": "--minutes must be an option of 'specrl quickstart'",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_wrong_input_ends_in_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
