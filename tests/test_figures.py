"""docs/figures.md: what the README shows has a command, and the commands are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specrl.cli import options_of, split_command

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def test_every_picture_of_the_readme_has_a_line() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures and all(any(f"`{picture}`" in row[0] for row in ROWS) for picture in pictures)
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_every_quotation_stands_in_the_readme() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("`", "").split()).lower()
    quoted = [part for row in ROWS for text in re.findall('"(.*?)"', row[0]) for part in text.lower().split(" … ")]
    assert len(quoted) > 5 and [text for text in quoted if text not in readme] == []


@pytest.mark.parametrize("command", [part for row in ROWS for part in re.findall("`(.*?)`", row[-1])])
def test_every_command_is_there(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command) if word != "time"]
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        files = [word.removeprefix("ARGS=") for word in words[2:] if word.endswith(".py")]
        assert all((ROOT / name).is_file() for name in files)
    elif words[0] == "specrl":
        name, rest = split_command(words[1:])
        options_of(name).parse(rest, output_dir=tmp_path)
