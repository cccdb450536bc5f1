"""What MkDocs does to a page before it renders it: formulas, and the pages of the environments.

A fence ```math holds LaTeX and becomes MathML, which browsers show by themselves: no script, no network. A comment
<!-- environment: envs/spec_decode.py SpecDecodeEnv -->, with the line below it, which is for readers of the source,
becomes that class's docstring, with its arguments as a table.
Sources are read, not imported, so that the documentation builds without torch. Whatever does not fit raises: a page
cannot go stale silently.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_MATH = re.compile(r"^```math\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ENVIRONMENT = re.compile(r"^<!-- environment: (\S+) (\w+) -->\n.*$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this for every page."""
    markdown = _ENVIRONMENT.sub(lambda found: environment(ROOT / found[1], found[2]), markdown)
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
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        raise ValueError(f"{path} must hold the class {name}, but does not")
    text = inspect.cleandoc(ast.get_docstring(found, clean=False) or "")
    before, _, rest = text.partition("## Arguments\n")
    arguments, _, after = rest.partition("\n\n")
    return f"{before}## Arguments\n\n{_table(_meanings(arguments), _defaults(found))}\n\n{after}"


def _meanings(block: str) -> list[tuple[list[str], str]]:
    """Names and what is said of them: entries are indented by four, their further lines by more."""
    entries: list[str] = []
    for line in block.splitlines():
        if line.startswith("     "):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line.strip())
    return [(names.split(", "), meaning.strip()) for names, _, meaning in (entry.partition(":") for entry in entries)]


def _defaults(cls: ast.ClassDef) -> dict[str, str]:
    """Keyword arguments of `__init__` and what they are unless given."""
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return {argument.arg: "" if default is None else ast.unparse(default) for argument, default in pairs}


def _table(meanings: list[tuple[list[str], str]], defaults: dict[str, str]) -> str:
    named = [name for names, _ in meanings for name in names]
    if sorted(named) != sorted(defaults):
        raise ValueError(f"the docstring must name every argument once, but {set(named) ^ set(defaults)} differ")
    lines = ["| Argument | Default | Meaning |", "|---|---|---|"]
    for names, meaning in meanings:
        for name in names:
            lines.append(f"| `{name}` | `{defaults[name]}` | {meaning} |".replace("``", ""))
    return "\n".join(lines)
