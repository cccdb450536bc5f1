"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_runs_an_episode(capsys: pytest.CaptureFixture[str]) -> None:
    example = BLOCKS[0]
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.fullmatch(r"\S+: \d\.\d\d tokens, speedup so far \d+\.\d\d", line) for line in lines)


def test_the_interfaces_are_there() -> None:
    import specrl

    names = {"specrl": specrl, "input_ids": torch.tensor([[1, 2, 3]])}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    assert names["logits"].shape == (1, 3, 512)  # type: ignore[attr-defined]
