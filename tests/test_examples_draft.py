"""The examples run as they are, in a few rounds."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
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
def test_it_runs_and_is_short(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = load(name).main(rounds=8, batch_size=2, allow_parallel=True)
    assert 1.0 <= found["accept_length"] <= 5.0 and found["speedup"] > 0.0
    assert f"{found['accept_length']:.2f} tokens a round" in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


def test_the_n_gram_draft_goes_on_as_the_text_did_before() -> None:
    agent = load("draft_ngram").NgramDraft(3)
    agent.tokens, agent.after = {7: []}, {7: {}}
    agent._extend(7, [1, 2, 3, 4, 5, 2, 9, 1, 2])
    observation, info = {"live": [1, 0]}, {"request_ids": np.array([7])}
    assert agent.act(observation, info).tolist() == [[3, 4, 5], [-1] * 3]  # after (1, 2), not after the latest 2
    agent._extend(7, [8])
    assert agent.act(observation, info).tolist() == [[-1] * 3] * 2


def test_the_eagle3_draft_learns_by_reinforce_from_a_directory(tmp_path: Path) -> None:
    target = specrl.load_target("embedded")
    specrl.new_draft(target, draft_vocab_size=256, intermediate_size=64).save(tmp_path / "draft")
    found = load("draft_eagle3").main(tmp_path / "draft", rounds=6, batch_size=2, episodes=1, allow_parallel=True)
    assert found["accept_length"] >= 1.0
