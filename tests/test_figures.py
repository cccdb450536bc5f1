"""docs/figures.md: every picture of the README has a command, and the commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specrl.cli import options_of, split_command

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/figures.md").read_text(encoding="utf-8")
COMMANDS = [code for code in re.findall("`(.*?)`", PAGE) if code.startswith(("python ", "make ", "specrl "))]


def test_every_picture_of_the_readme_is_listed() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert all(f"`{picture}`" in PAGE and (ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    else:
        name, rest = split_command(words[1:])
        options_of(name).parse(rest, output_dir=tmp_path)
