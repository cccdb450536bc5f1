"""What the documentation and the README show runs, parses and exists."""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from specrl.agents.choosers.registry import CHOOSERS
from specrl.agents.draft.losses import SLOT_LOSSES
from specrl.cli import COMMANDS, options_of, split_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCKS = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()], path=str(ROOT))
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
TREES = ("docs/", "examples/", "benchmarks/", "tests/", "tools/", "specrl/", "envs/", "agents/")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every 'specrl …' line in a block for the shell."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "specrl":
                yield words[1:]


def mentions(page: Path) -> Iterator[str]:
    """Code within sentences."""
    yield from CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


# The README's second block shows lines of a session that tests/test_readme.py begins.
@pytest.mark.parametrize("page", PAGES[1:], ids=NAMES[1:])
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with patch.dict(CHOOSERS), patch.dict(SLOT_LOSSES):
        for example in BLOCKS.parse(page).examples():
            example.evaluate()


@each_page
def test_command_lines_parse(page: Path, tmp_path: Path) -> None:
    for words in commands(page):
        name, rest = split_command(words)
        if "--config" in rest:  # of a run that is not there
            at = rest.index("--config")
            del rest[at : at + 2]
        if not set(rest) & {"--help", "--print_config"}:
            options_of(name).parse(rest, output_dir=tmp_path)


@each_page
def test_configurations_are_accepted(page: Path, tmp_path: Path) -> None:
    """A block of YAML that begins with '# specrl <command>' is a configuration of it."""
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml" and (command := re.match(r"# specrl (.*)", block)):
            (tmp_path / "given.yaml").write_text(block, encoding="utf-8")
            name, _ = split_command(command[1].split())
            if name == "study":  # its file is no configuration of its options
                importlib.import_module("specrl.studies.config").read_study(tmp_path / "given.yaml")
                continue
            options_of(name).parse(["--config", str(tmp_path / "given.yaml")], output_dir=tmp_path)


@each_page
def test_options_that_are_mentioned_exist(page: Path) -> None:
    for code in mentions(page):
        words = code.split()
        if words[0] != "specrl" or len(words) == 1 or words[1].startswith(("-", "<", "…")):
            continue
        name, rest = split_command(words[1:])
        options = options_of(name)
        known = {*options.table, *options.groups, "help", "config", "print_config"}
        used = [word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")]
        assert set(used) <= known, f"'specrl {name}' has no {set(used) - known}"


def test_an_option_that_does_not_exist_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Use `specrl bench --presicion`.\n```bash\n.venv/bin/specrl bench --batchsizes 1  # wrong\n```\n")
    with pytest.raises(ValueError, match="batchsizes"):
        test_command_lines_parse(page, tmp_path)
    with pytest.raises(AssertionError, match="presicion"):
        test_options_that_are_mentioned_exist(page)


@each_page
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", link) and not link.startswith("#"):
            assert (page.parent / link.partition("#")[0]).exists(), f"{link} leads nowhere"


@each_page
def test_paths_and_modules_that_are_mentioned_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    scripts = re.findall(r"\bpython ((?:examples|benchmarks|tools)/\S+\.py)", text)
    for code in [*scripts, *" ".join(mentions(page)).split()]:
        if code.startswith(TREES) and not set("<>*…{") & set(code):
            assert (ROOT / code.partition("#")[0]).exists(), f"{code} does not exist"
        elif re.fullmatch(r"specrl(\.\w+)+", code):
            resolve(code)


def resolve(name: str) -> object:
    """The module or what is in it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, last = name.rpartition(".")
        return getattr(resolve(module), last)


@each_page
def test_make_targets_that_are_mentioned_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    blocks = "\n".join(
        block for language, block in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"
    )
    named = re.findall(r"^make ([a-z-]+)", "\n".join([blocks, *mentions(page)]), re.MULTILINE)
    assert set(named) <= set(targets)


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    pages = sorted(path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md"))
    assert re.findall(r"^- \[\d+\]\((\S+)\):", index, re.MULTILINE) == pages


def test_every_example_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    found = [path for path in (ROOT / "examples").glob("*.py") if path.name in tests or f'"{path.stem}"' in tests]
    assert set(found) == set((ROOT / "examples").glob("*.py")), "let tests/test_examples.py run the rest"


@pytest.mark.parametrize("name", ["spec_decode", "draft_tokens", "simulated"])
def test_pages_of_environments_come_from_docstrings(name: str) -> None:
    rendered = render(f"environments/{name}.md")
    assert "| `batch_size` | `" in rendered and "## Version history\n* v0: initial version" in rendered
    assert "    batch_size" not in rendered


def test_reference_comes_from_the_sources() -> None:
    commands, keys = render("reference/cli.md"), render("reference/config.md")
    groups = set(re.findall(r"\(config\.md#(\w+)\)", commands))
    assert re.findall(r"^## specrl (.*)$", commands, re.MULTILINE) == list(COMMANDS)
    assert groups and groups <= set(re.findall(r"^## (\w+)$", keys, re.MULTILINE))
    assert "| `--seed` | `0` |" in commands and "| `betas` | `0.9,0.95` | of AdamW. |" in keys


def test_an_argument_without_a_description_is_an_error(tmp_path: Path) -> None:
    cls = 'class Env:\n    """Text.\n\n    ## Arguments\n        one: first.{}\n\n    ## End\n    """\n'
    init = "    def __init__(self, *, one: int = 1, two: str = 'x') -> None: ...\n"
    (tmp_path / "whole.py").write_text(cls.format("\n        two: second,\n            continued.") + init)
    (tmp_path / "stale.py").write_text(cls.format("") + init)
    table = hooks()["environment"](tmp_path / "whole.py", "Env")
    assert "| `one` | `1` | first. |\n| `two` | `'x'` | second, continued. |\n\n## End" in table
    with pytest.raises(ValueError, match=r"every argument once, but \{'two'\} differ"):
        hooks()["environment"](tmp_path / "stale.py", "Env")
    with pytest.raises(ValueError, match="must define Other"):
        hooks()["environment"](tmp_path / "whole.py", "Other")


def render(page: str) -> str:
    """A page of docs/ as MkDocs gets it."""
    rendered: str = hooks()["on_page_markdown"]((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert "<!--" not in rendered
    return rendered


def hooks() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools/docs_hooks.py"))
