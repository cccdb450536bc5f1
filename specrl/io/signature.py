"""Reading a function's signature and docstrings as command line options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

REQUIRED = inspect.Parameter.empty  # the default of an option that must be given
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class Option(NamedTuple):
    """One option of a command."""

    name: str  # as it is written after '--' and in YAML, 'target.dtype' for a field of a group
    kind: Any  # its type
    default: Any  # `REQUIRED` if it must be given
    help: str  # one sentence
    group: str  # title of its group; '' for an option without a group

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is REQUIRED

    @property
    def help_text(self) -> str:
        """The help with the default, escaped for argparse."""
        text, default = self.help.replace("\n", " "), self.default
        if self.required:
            text += " (required)"
        elif default not in (None, "", (), []):
            shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
            text += f" (default: {shown.lower() if isinstance(default, bool) else shown})"
        return text.strip().replace("%", "%%")


class Docstring(NamedTuple):
    """Parts of a docstring in Google's style."""

    text: str  # before 'Args:'
    helps: dict[str, str]  # the first sentence on every argument
    examples: list[str]  # the lines of 'Example:'


def read_signature(function: Callable[..., object]) -> Iterator[Option]:
    """The options of a function or dataclass: parameters, and fields of parameters that are dataclasses."""
    helps = read_docstring(function).helps
    for name, kind, default in read_parameters(function):
        if not dataclasses.is_dataclass(kind):
            yield Option(name, kind, default, helps.get(name, ""), "")
            continue
        group = read_docstring(kind)
        title = f"{name} ({helps.get(name) or group.text.splitlines()[0].rstrip('.')})"
        for field, field_kind, own_default in read_parameters(kind):
            value = getattr(default, field, own_default)  # the group's own default if the parameter has none
            yield Option(f"{name}.{field}", field_kind, value, group.helps.get(field, ""), title)


def read_parameters(of: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of every parameter of a function, or of every field of a dataclass."""
    kinds = typing.get_type_hints(of)
    if not dataclasses.is_dataclass(of):
        yield from ((name, kinds[name], given.default) for name, given in inspect.signature(of).parameters.items())
        return
    for field in dataclasses.fields(of):
        default = REQUIRED if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, kinds[field.name], default


def read_docstring(of: Any) -> Docstring:
    """Read the docstring of a function or class."""
    import docstring_parser

    doc = docstring_parser.parse(of.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    first_sentence = {param.arg_name: re.split(r"\.\s+(?=[A-Z])", param.description or "")[0] for param in doc.params}
    return Docstring(
        "\n\n".join(filter(None, (doc.short_description, doc.long_description))),
        {name: text.rstrip(".") for name, text in first_sentence.items()},
        [line.strip() for part in doc.examples for line in (part.description or "").splitlines()],
    )


def union_members(kind: Any) -> tuple[Any, ...]:
    """The members of a union; one member for any other type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def item_type(kind: Any) -> Any:
    """The type of the items of a list or tuple; None for any other type."""
    found = [typing.get_args(part)[0] for part in union_members(kind) if typing.get_origin(part) in (list, tuple)]
    return found[0] if len(found) == 1 else None


def metavar(kind: Any) -> str:
    """A type in a help text: 'INT', 'FLOAT,...' or '{a,b}'."""
    parts = [part for part in union_members(kind) if part is not type(None)]
    if typing.get_origin(parts[0]) is Literal:
        return "{" + ",".join(map(str, typing.get_args(parts[0]))) + "}"
    item = item_type(parts[0])
    return getattr(parts[0], "__name__", "value").upper() if item is None else f"{metavar(item)},..."


def describe_type(kind: Any) -> str:
    """A type in words, for messages."""
    out = []
    for part in union_members(kind):
        if typing.get_origin(part) is Literal:
            out.append(f"one of {', '.join(map(repr, typing.get_args(part)))}")
        elif item_type(part) is not None:
            item = NAMES.get(item_type(part), "values").rpartition(" ")[2]
            out.append(f"{item}s with commas between" if not item.endswith("s") else f"{item} with commas between")
        else:
            out.append("null" if part is type(None) else NAMES.get(part, getattr(part, "__name__", str(part))))
    return " or ".join(out)
