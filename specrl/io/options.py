"""The options of a command, made from a function's signature and docstrings, and read by jsonargparse.

A parameter is an option. A parameter whose type is a dataclass is a group of options, one for each field:
`--target.dtype bfloat16`. This module adds short forms to what jsonargparse reads:

    --target DIR             --target.name=DIR, the first field of the group
    --batch_sizes 1,4,16     --batch_sizes=[1,4,16]
    --resume                 --resume=true
    DIR, before any option   the first parameter, if it has no default or None as default
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from specrl.io.moved import moved
from specrl.io.read import read_mapping

_ALWAYS = ("help", "config", "print_config")  # options that every command has


class Parsed(NamedTuple):
    """A command's arguments, and the same as YAML that --config reads."""

    arguments: dict[str, Any]
    yaml: str


class Options:
    """The options of a command.

    Args:
        command: its name, for messages.
        function: has keyword parameters with types and a docstring in Google's style; or a dataclass.

    Attributes:
        types: the type of each option by its full name, such as 'target.dtype'; without 'or None'.
        groups: the first option of each group.
        parser: jsonargparse's parser, without the short forms.
    """

    def __init__(self, command: str, function: Callable[..., object]) -> None:
        from jsonargparse import ArgumentParser

        self.command, self.function = command, function
        self.types: dict[str, Any] = {}
        self.groups: dict[str, str] = {}
        self._required: list[str] = []
        text, helps, examples = _read_docstring(function)
        layout: Any = partial(argparse.RawDescriptionHelpFormatter, max_help_position=40)
        self.parser = ArgumentParser(description=text, formatter_class=layout, exit_on_error=False)
        for name, kind, default in _parameters(function):
            if not dataclasses.is_dataclass(kind):
                self._add(self.parser, name, kind, default, helps.get(name, ""))
                continue
            about, field_helps, _ = _read_docstring(kind)
            title = helps.get(name) or about.partition("\n")[0]
            group = self.parser.add_argument_group(f"{name} ({title.rstrip('.')})")
            for field, field_kind, field_default in _parameters(kind):
                self.groups.setdefault(name, f"{name}.{field}")
                value = getattr(default, field, field_default)
                self._add(group, f"{name}.{field}", field_kind, value, field_helps.get(field, ""))
        notes = ["--config FILE.yaml reads options from a file; --print_config prints them and runs nothing."]
        for name, first in list(self.groups.items())[:1]:
            notes.append(f"The first option of a group has a short form: --{name} X is --{first} X.")
        self.parser.usage = " ".join([command, *(name.upper() for name in self._required), "[options]"])
        self.parser.epilog = "\n".join([*notes, *(["", "example:"] if examples else []), *examples])

    def parse(self, words: Sequence[str], *, output_dir: Path | None = None) -> Parsed:
        """Read a command line. --help and --print_config print and raise SystemExit.

        Args:
            words: of the command line, after the command.
            output_dir: value of the option of that name if the command has it and it is not set.

        Raises:
            ValueError: the words do not fit; one line.
        """
        values = self._read_words(words)
        if "help" in values:
            self.parser.print_help()
            raise SystemExit(0)
        print_only = values.pop("print_config", False)
        parsed = self.resolve(values, output_dir=output_dir)
        if print_only:
            print(parsed.yaml)
            raise SystemExit(0)
        return parsed

    def resolve(self, values: Mapping[str, Any], *, output_dir: Path | None = None) -> Parsed:
        """Read a mapping, with groups as mappings or with dotted names, and fill in the defaults.

        Raises:
            ValueError: a name or a value does not fit; one line.
        """
        from jsonargparse import ArgumentError

        try:
            config = self.parser.parse_object(self._flat(values))
        except ArgumentError as error:
            raise ValueError(self._explain(str(error))) from error
        if "output_dir" in self.types and config["output_dir"] is None:
            config["output_dir"] = output_dir
        arguments = config.as_dict()
        for name, kind, _ in _parameters(self.function):
            if name in self.groups:
                arguments[name] = kind(**arguments[name])
        return Parsed(arguments, self.parser.dump(config, skip_unset=False))

    def _add(self, section: Any, name: str, kind: Any, default: Any, text: str) -> None:
        """Add an option to the parser or to one of its groups."""
        self.types[name] = _without_none(kind)
        value: dict[str, Any] = {"default": default}
        if default is inspect.Parameter.empty:
            self._required.append(name)
            value, text = {"required": True}, f"{text} (required)"
        elif default not in (None, "", ()):
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text += f" (default: {shown.lower() if isinstance(default, bool) else shown})"
        form = _form(self.types[name])
        section.add_argument(f"--{name}", type=kind, metavar=form, help=text.replace("%", "%%").strip(), **value)

    def _read_words(self, words: Sequence[str]) -> dict[str, Any]:
        """Read the values on a command line by the full names of their options; they override configuration files."""
        count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        configs, values, rest = dict[str, Any](), self._read_positional(words[:count]), list(words[count:])
        while rest:
            option, equals, value = rest.pop(0).partition("=")
            if option in ("-h", "--help", "--print_config"):
                values["help" if option == "-h" else option[2:]] = True
                continue
            if not option.startswith("--"):
                raise ValueError(f"options must be written as --name value, but got {option!r}; {self._see}")
            name = "config" if option == "--config" else self._full_name(option[2:], dashes="--")
            kind = self.types.get(name, Path)
            if not equals and kind is bool and (not rest or rest[0].startswith("--")):
                value = "true"
            elif not equals and rest and (not rest[0].startswith("--") or " " in rest[0]):
                value = rest.pop(0)
            elif not equals:
                raise ValueError(f"{option} must have a value, but got none; {self._see}")
            if name != "config":
                values[name] = _as_list(value, kind)
            elif Path(value).is_file():
                configs |= self._flat(read_mapping(Path(value)))
            else:
                raise ValueError(f"--config must be a YAML file, but there is no {value!r}; {self._see}")
        return {**configs, **values}

    def _read_positional(self, words: Sequence[str]) -> dict[str, Any]:
        """Read the words before the first option: required parameters, or the first one if its default is None."""
        first = next(iter(self.types), "")
        names = self._required or ([first] if words and self.parser.get_default(first) is None else [])
        if words and names and _item_type(self.types[names[0]]) is not None:  # 'report RUN RUN'
            return {names[0]: list(words)}
        if len(words) > len(names):
            raise ValueError(f"options must be written as --name value, but got {words[len(names)]!r}; {self._see}")
        return dict(zip(names, words, strict=False))

    def _full_name(self, name: str, *, dashes: str = "") -> str:
        """Return the full name of an option; messages write `dashes` before names."""
        if name in self.types or name in self.groups:
            return self.groups.get(name, name)
        if new := moved(self.command, name, [*self.types, *self.groups], dashes=dashes):
            raise ValueError(f"{dashes}{name} has moved, use {new}")
        close = difflib.get_close_matches(name, [*_ALWAYS, *self.types, *self.groups], n=1)
        remedy = f"did you mean '{dashes}{close[0]}'?" if close else self._see
        raise ValueError(f"{dashes}{name} must be an option of '{self.command}', but is none; {remedy}")

    def _flat(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the values of nested groups by the full names of their options."""
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if f"{prefix}{key}" in self.groups and isinstance(value, Mapping):
                flat |= self._flat(value, f"{key}.")
            elif f"{prefix}{key}" != "config":
                flat[self._full_name(f"{prefix}{key}")] = value
        return flat

    def _explain(self, message: str) -> str:
        """Return an error of jsonargparse as one line: rule, value and remedy."""
        names = [name for name in re.findall(r'Parser key "([^"]*)"', message) if name in self.types]
        value = re.search(r"(?:Given value|Got value): (.*)", message)
        if not names or value is None:
            return f"{' '.join(message.split())}; {self._see}"
        return f"--{names[-1]} must be {_rule(self.types[names[-1]])}, but got {value[1]}; {self._see}"

    @property
    def _see(self) -> str:
        return f"see '{self.command} --help'"


def _parameters(of: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, type and default of every parameter of a function or dataclass."""
    kinds = typing.get_type_hints(of)
    fields = dataclasses.fields(of) if dataclasses.is_dataclass(of) else ()
    factories = {field.name: field.default_factory for field in fields}
    for name, parameter in inspect.signature(of).parameters.items():
        factory = factories.get(name)
        yield name, kinds[name], factory() if callable(factory) else parameter.default


def _read_docstring(of: Any) -> tuple[str, dict[str, str], list[str]]:
    """Return the text before 'Args:', the first sentence on every argument, and the lines of 'Example:'."""
    import docstring_parser

    doc = docstring_parser.parse(of.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    sentences = {each.arg_name: re.split(r"\.(?:\s+(?=[A-Z])|$)", each.description or "")[0] for each in doc.params}
    return (
        "\n\n".join(filter(None, (doc.short_description, doc.long_description))),
        {name: " ".join(sentence.split()) for name, sentence in sentences.items()},
        [f"  {line.strip()}" for part in doc.examples for line in (part.description or "").splitlines()],
    )


def _without_none(kind: Any) -> Any:
    """Return T for 'T | None'; any other type as it is."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return next(part for part in typing.get_args(kind) if part is not type(None)) if is_union else kind


def _item_type(kind: Any) -> Any:
    """Return the type of the items of a tuple; None for any other type."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None


def _form(kind: Any) -> str:
    """Return how a value is written: 'INT', 'FLOAT,...' or '{a,b}'."""
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(kind))) + "}"
    item = _item_type(kind)
    return getattr(kind, "__name__", "value").upper() if item is None else f"{_form(item)},..."


_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def _rule(kind: Any) -> str:
    """Return what a value must be, in words: 'a whole number' or 'one of local, sglang'."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    item = _item_type(kind)
    return _WORDS.get(kind, _form(kind)) if item is None else f"{_rule(item)}, or several separated by commas"


def _as_list(value: str, kind: Any) -> str:
    """Return a list with commas as JSON, and another value as it is."""
    item = _item_type(kind)
    if item is None or value.startswith("[") or value in ("", "null"):
        return value
    return json.dumps(value.split(",")) if item not in (int, float) else f"[{value}]"
