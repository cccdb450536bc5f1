"""The README and the documentation: their Python blocks run, and their commands, options and files exist."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import specrl
from specrl.agents.choosers.registry import CHOOSERS
from specrl.agents.draft.losses import SLOT_LOSSES
from specrl.cli import COMMANDS, options_of, split_command
from specrl.studies.config import read_study

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


TREES = ("docs/", "examples/", "benchmarks/", "tests/", "tools/", "specrl/", "envs/", "agents/")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [block for name, block in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every 'specrl …' line in a block for the shell, or in code within sentences."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "specrl":
                yield words[1:]


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == README:  # its second block needs names; see the next test
        return
    with patch.dict(CHOOSERS), patch.dict(SLOT_LOSSES):
        for example in BLOCKS.parse(page).examples():
            example.evaluate()


def test_the_readme_runs_an_episode(capsys: pytest.CaptureFixture[str]) -> None:
    example, interfaces = blocks(README, "python")[:2]
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.fullmatch(r"\S+: \d\.\d\d tokens, speedup so far \d+\.\d\d", line) for line in lines)
    names: dict[str, Any] = {"specrl": specrl, "input_ids": torch.tensor([[1, 2, 3]])}
    exec(compile(interfaces, "README.md", "exec"), names)
    assert names["logits"].shape == (1, 3, 512)


@each_page
def test_commands_and_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    """A block of YAML that begins with '# specrl <command>' is a configuration of that command."""
    for words in command_lines(page):
        name, rest = split_command(words)
        if "--config" in rest:  # of a run that does not exist
            at = rest.index("--config")
            del rest[at : at + 2]
        if not set(rest) & {"--help", "--print_config"}:
            options_of(name).parse(rest, output_dir=tmp_path)
    for block in blocks(page, "yaml"):
        if command := re.match(r"# specrl (.*)", block):
            file = tmp_path / "config.yaml"
            file.write_text(block, encoding="utf-8")
            if (name := split_command(command[1].split())[0]) == "study":  # its file holds no options
                read_study(file)
            else:
                options_of(name).parse(["--config", str(file)], output_dir=tmp_path)


@each_page
def test_options_files_and_names_that_are_mentioned_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = code.split()
        if words[0] == "specrl" and len(words) > 1 and not words[1].startswith(("-", "<", "…")):
            name, rest = split_command(words[1:])
            options = options_of(name)
            used = {word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")}
            assert used <= {*options.types, *options.groups, "help", "config", "print_config"}
        for word in words:
            if word.startswith(TREES) and not set("<>*…{") & set(word):
                assert (ROOT / word.partition("#")[0]).exists()
            elif re.fullmatch(r"specrl(\.\w+)+", word):
                resolve_name(word)


def test_reference_pages_come_from_the_sources(tmp_path: Path) -> None:
    hooks = runpy.run_path(str(ROOT / "tools/docs_hooks.py"))
    pages = {name: (ROOT / "docs/reference" / f"{name}.md").read_text(encoding="utf-8") for name in ("cli", "config")}
    commands, keys = (hooks["on_page_markdown"](text) for text in pages.values())
    groups = set(re.findall(r"\(config\.md#(\w+)\)", commands))
    assert re.findall(r"^## specrl (.*)$", commands, re.MULTILINE) == list(COMMANDS)
    assert groups and groups <= set(re.findall(r"^## (\w+)$", keys, re.MULTILINE))

    undocumented = 'class Env:\n    """Text.\n\n    ## Arguments\n        one: first.\n\n    ## End\n    """\n'
    (tmp_path / "env.py").write_text(f"{undocumented}    def __init__(self, *, one: int = 1, two: int = 2): ...\n")
    with pytest.raises(ValueError, match="'two'"):
        hooks["environment"](tmp_path / "env.py", "Env")
