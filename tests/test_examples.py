"""Examples that train run as they are, but for the number of rounds."""

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_ppo_trains_and_its_policy_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = (EXAMPLES / "train_ppo.py").read_text(encoding="utf-8")
    quick = source.replace("1_500_000", "1").replace("512,", "32,").replace('"batch_size": 4096', '"batch_size": 512')
    assert quick.count("1_500_000") == 0 and quick.count(" 32, profile") == 1 and '"batch_size": 512' in quick
    exec(compile(quick, "train_ppo.py", "exec"), {})
    assert (tmp_path / "runs/example-ppo/policy.safetensors").exists()
    printed = capsys.readouterr().out
    assert "batch 32: chose" in printed and "first choice at batch 8: " in printed
