"""The examples run as they are, in a few rounds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import specrl

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["draft_random", "draft_ngram", "draft_eagle3"])
def test_an_example_runs_and_is_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = load(name).main(rounds=8, batch_size=2, allow_parallel=True)
    assert 1.0 <= result["accept_length"] <= 5.0 and result["speedup"] > 0.0
    assert f"{result['accept_length']:.2f} tokens a round" in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


def test_the_eagle3_draft_learns_by_reinforce_from_a_directory(tmp_path: Path) -> None:
    target = specrl.load_target("embedded")
    specrl.new_draft(target, draft_vocab_size=256, intermediate_size=64).save(tmp_path / "draft")
    result = load("draft_eagle3").main(tmp_path / "draft", rounds=6, batch_size=2, episodes=1, allow_parallel=True)
    assert result["accept_length"] >= 1.0
