import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import live_source

from specrl.cli import main
from specrl.commands import validate as module
from specrl.commands.evaluate import evaluate
from specrl.commands.validate import validate
from specrl.evaluation.records import read_record, write_record
from specrl.evaluation.scores import speedup_interval
from specrl.io.output import OutputDir


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate(
        profiles=("aurora-qwen3-coder-next-fp8",),
        choosers=("adaptive",),
        reference="adaptive",
        seeds=4,
        rounds=120,
        shifts="at=60,cost=1.2",
        leaderboard=folder / "board.csv",
        output_dir=folder,
    )
    return folder / "record-aurora-qwen3-coder-next-fp8-adaptive.json"


def tampered(honest: Path, folder: Path, **changes: object) -> Path:
    """A copy with other fields."""
    head = json.loads(honest.read_text())
    (folder / honest.name).write_text(json.dumps({**head, **changes}))
    (folder / honest.name).with_suffix(".npz").write_bytes(honest.with_suffix(".npz").read_bytes())
    return folder / honest.name


def test_an_honest_record_holds(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(honest)]) == 0
    assert "holds: adaptive on aurora-qwen3-coder-next-fp8" in capsys.readouterr().out
    assert main(["validate", "--record", str(honest)]) == 0


def test_a_record_that_claims_more_fails(honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = json.loads(honest.read_text())["claimed"]
    path = tampered(honest, tmp_path, claimed={**claim, "speedup": claim["speedup"] * 1.05})
    assert main(["validate", str(path)]) == 2
    error = capsys.readouterr().err
    assert "the claimed speedup must be what was measured" in error and error.count("\n") == 1


def test_claim_and_samples_raised_together_fail_in_the_replay(honest: Path, tmp_path: Path) -> None:
    record = read_record(honest)
    better = record.samples * 1.05
    forged = replace(record, samples=better, claimed=speedup_interval(better))
    path = write_record(OutputDir(tmp_path), forged)
    with pytest.raises(ValueError, match="by the replay"):
        validate(path)


def test_other_choices_yield_other_tokens(honest: Path, tmp_path: Path) -> None:
    record = read_record(honest)
    choices = record.choices.copy()
    choices[0, :20] = (choices[0, :20] + 1) % len(record.plans)
    with pytest.raises(ValueError, match="must yield the recorded tokens"):
        validate(write_record(OutputDir(tmp_path), replace(record, choices=choices)))


def test_a_changed_file_is_noticed(honest: Path, tmp_path: Path) -> None:
    path = tampered(honest, tmp_path)
    with path.with_suffix(".npz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="another sha256"):
        validate(path)


def test_what_is_no_record_is_told(honest: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="must be a JSON file"):
        validate(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="must say format"):
        validate(tmp_path / "a.json")
    head = json.loads(honest.read_text())
    head.pop("seeds")
    (tmp_path / "a.json").write_text(json.dumps(head))
    with pytest.raises(ValueError, match="has no 'seeds'"):
        validate(tmp_path / "a.json")
    profile = json.loads(honest.read_text())["config"]["profile"].replace('"skill"', '"skil"')
    config = {**json.loads(honest.read_text())["config"], "profile": profile}
    with pytest.raises(ValueError, match="did you mean 'skill'"):
        validate(tampered(honest, tmp_path, config=config))


def test_a_live_record_is_decoded_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a busy machine is not to be relied upon, so the measured speedups of the replay are given here."""
    source = live_source()
    scores = source.run(("adaptive",), range(1), lambda _: None)
    steady = replace(scores["adaptive"][0], speedups=np.array([1.28, 1.3, 1.31, 1.29]))
    record = source.record("adaptive", range(1), [steady])
    path = write_record(OutputDir(tmp_path), record)
    monkeypatch.setattr(module, "live_source", lambda *a, **k: source)
    for factor, holds in ((1.01, True), (0.8, False)):
        monkeypatch.setattr(source, "replay", lambda r, done, factor=factor: r.samples[::-1] * factor)
        if holds:
            validate(path)
        else:
            with pytest.raises(ValueError, match="must agree with a repeated measurement"):
                validate(path)
    wide = replace(record, samples=np.array([1.0, 1.5]), claimed=speedup_interval(np.array([1.0, 1.5])))
    with pytest.raises(ValueError, match="narrow enough to be tested"):
        validate(write_record(OutputDir(tmp_path / "wide"), wide))
    head = json.loads(path.read_text())
    path.write_text(json.dumps({**head, "tokens_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="greedy tokens decoded plainly"):
        validate(path)
