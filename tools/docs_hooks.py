"""Renders parts of the documentation before MkDocs does: formulas, environments, commands and options.

A fence ```math holds LaTeX and becomes MathML, which browsers show without a script. A comment, with the line below
it, is replaced by text from the sources:

    <!-- environment: envs/spec_decode.py SpecDecodeEnv -->    the class's docstring, with its arguments as a table
    <!-- options: TargetConfig -->                             the dataclass's description and its fields as a table
    <!-- commands: specrl/cli.py COMMANDS -->                  every command with its description and its options

Links to files of the repository that are not part of the site become their text.
Sources are parsed and not imported, so the documentation builds without torch. An argument without a description is
an error. A group of options is described by its command or by its class.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_GENERATED = re.compile(r"^<!-- (environment|options|commands): (?:(\S+) )?(\w+) -->\n.*$", re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:benchmarks|examples|tests)/[^)]*\)")
_CONFIG_PAGE = "config.md"  # beside the page of the commands; it has a heading for each group of options


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this for every page."""
    render = {"environment": environment, "options": options, "commands": commands}
    markdown = _GENERATED.sub(lambda found: render[found[1]](_place(found[2], found[3]), found[3]), markdown)
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return _MATH.sub(lambda found: formula(found[1]), markdown)


def formula(latex: str) -> str:
    """A displayed formula as MathML."""
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(latex.strip(), display="block")}</div>'


def environment(path: Path, name: str) -> str:
    """The docstring of the class `name` as Markdown.

    Raises:
        ValueError: no such class, or arguments and docstring differ.
    """
    cls = _find(path, name, ast.ClassDef)
    before, _, rest = _docstring(cls).partition("## Arguments\n")
    arguments, _, after = rest.partition("\n\n")
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    table = _table("Argument", _meanings(arguments), {k: ast.unparse(v) if v else "" for k, v in _keywords(init)})
    return f"{before}## Arguments\n\n{table}\n\n{after}"


def options(path: Path, name: str) -> str:
    """The description of the dataclass `name`, and its fields as a table.

    Raises:
        ValueError: no such class, or fields and docstring differ.
    """
    cls = _find(path, name, ast.ClassDef)
    fields = [node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    defaults = {node.target.id: _value(path, node.value) for node in fields if isinstance(node.target, ast.Name)}
    text = _sections(_docstring(cls))
    return f"{_escape(text.about)}\n\n{_table('Key', text.meanings, defaults)}"


def commands(path: Path, name: str) -> str:
    """Every command of the dictionary `name`: its description, its options as a table, and its examples.

    Raises:
        ValueError: no such dictionary or command, or options and docstring differ.
    """
    assigned = next((n for n in _parse(path).body if isinstance(n, ast.Assign) and _target(n) == name), None)
    if assigned is None or not isinstance(assigned.value, ast.Dict):
        raise ValueError(f"{path} must assign a dictionary to {name}, but does not")
    out = []
    for key, call in zip(assigned.value.keys, assigned.value.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(call, ast.Call)
        module, _, function = ast.literal_eval(call.args[0]).partition(":")
        out.append(_command(f"specrl {key.value!s}", _file(module), function))
    return "\n\n".join(out)


def _command(title: str, path: Path, function: str) -> str:
    node = _find(path, function, ast.FunctionDef)
    text = _sections(_docstring(node))
    defaults = {
        name: None if isinstance(default, ast.Call) and not default.args else _value(path, default)
        for name, default in _keywords(node)
    }
    described = {name for names, _ in text.meanings for name in names}
    groups = []
    for name, default in _keywords(node):
        if name not in described and defaults[name] is None:  # `TargetConfig()`: described by its class
            cls = ast.unparse(default.func) if isinstance(default, ast.Call) else ""
            about = _docstring(_find(_place(None, cls), cls, ast.ClassDef)).partition("\n")[0]
            groups.append(([name], about[0].lower() + about[1:]))
    table = _table("Option", text.meanings + groups, defaults, dashes="--")
    return f"## {title}\n\n{_escape(text.about)}\n\n```bash\n{text.example}\n```\n\n{table}"


class _Sections(NamedTuple):
    """The parts of a docstring in Google's style."""

    about: str
    meanings: list[tuple[list[str], str]]
    example: str


def _sections(docstring: str) -> _Sections:
    about, *rest = re.split(r"^(Args|Raises|Example|Attributes|Returns):\n", docstring, flags=re.MULTILINE)
    found = dict(zip(rest[::2], rest[1::2], strict=True))
    arguments, example = found.get("Args", ""), found.get("Example", "")
    return _Sections(about.strip(), _meanings(arguments.rstrip()), inspect.cleandoc(example))


def _place(path: str | None, name: str) -> Path:
    """The file of a name; of a class, it is found by searching the package."""
    if path is not None:
        return ROOT / path
    sources = {file.resolve() for folder in ("specrl", "envs", "agents") for file in (ROOT / folder).rglob("*.py")}
    found = [file for file in sources if re.search(rf"^class {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE)]
    if len(found) != 1:
        raise ValueError(f"one file must define the class {name}, but {len(found)} do: {sorted(map(str, found))}")
    return found[0]


def _file(module: str) -> Path:
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(path: Path, name: str, kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> ast.ClassDef | ast.FunctionDef:
    found = next((node for node in _parse(path).body if isinstance(node, kind) and node.name == name), None)
    if found is None:
        raise ValueError(f"{path} must define {name}, but does not")
    return found


def _docstring(node: ast.ClassDef | ast.FunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "")


def _keywords(function: ast.ClassDef | ast.FunctionDef) -> list[tuple[str, ast.expr | None]]:
    """Keyword arguments and their defaults."""
    assert isinstance(function, ast.FunctionDef)
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return [(argument.arg, default) for argument, default in pairs]


def _target(node: ast.Assign) -> str:
    return node.targets[0].id if isinstance(node.targets[0], ast.Name) else ""


def _value(path: Path, default: ast.expr | None) -> str:
    """A default as the command line takes it; '' if there is none."""
    if isinstance(default, ast.Name):
        return _constant(path, default.id)
    if isinstance(default, ast.Call):  # Path("runs"), or field(default_factory=dict)
        default = default.args[0] if default.args else None
    value = None if default is None else ast.literal_eval(default)
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _constant(path: Path, name: str) -> str:
    """The value of a module's constant, which may be imported from another module of the package."""
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and _target(node) == name:
            return _value(path, node.value)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return _value(path, node.value)
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return _constant(_file(str(node.module)), name)
    raise ValueError(f"{path} must define {name}, but does not")


def _meanings(block: str) -> list[tuple[list[str], str]]:
    """Names and their descriptions: entries are indented by four, continuation lines by more."""
    entries: list[str] = []
    for line in block.splitlines():
        if line.startswith("     "):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return [(names.split(", "), meaning.strip()) for names, _, meaning in (entry.partition(":") for entry in entries)]


def _table(
    title: str, meanings: list[tuple[list[str], str]], defaults: Mapping[str, str | None], dashes: str = ""
) -> str:
    """Names, defaults and descriptions. A name whose default is None is a group of options, which has its own table."""
    named = [name for names, _ in meanings for name in names]
    if sorted(named) != sorted(defaults):
        raise ValueError(f"the docstring must name every argument once, but {set(named) ^ set(defaults)} differ")
    lines = [f"| {title} | Default | Meaning |", "|---|---|---|"]
    for names, meaning in meanings:
        for name in names:
            default = defaults[name]
            shown = f"[`{dashes}{name}.…`]({_CONFIG_PAGE}#{name})" if default is None else f"`{dashes}{name}`"
            lines.append(f"| {shown} | `{default or ''}` | {_escape(meaning)} |".replace(" `` ", " "))
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Text whose angle brackets are no HTML; code in backticks is left alone."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;").replace("|", "\\|") for i, part in enumerate(parts))
