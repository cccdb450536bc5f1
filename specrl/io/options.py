"""Command line options from a function's signature, and its arguments from a command line or a YAML file.

A parameter is an option. A parameter whose type is a dataclass is a group of options, one for every field:
`--target.dtype bfloat16`. `translate` rewrites what may be written shorter before jsonargparse reads it:

    --target DIR             --target.name=DIR, the group's first field
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from specrl.io.moved import moved

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_ALWAYS = ("help", "config", "print_config")  # options that every command has
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


class Option(NamedTuple):
    """One option of a command.

    Attributes:
        name: as it is written after '--' and in YAML, 'target.dtype' for a field of a group.
        kind: its type.
        default: its value if it is not given; `inspect.Parameter.empty` if it must be given.
        help: one sentence.
        group: title of its group; '' for an option without a group.
    """

    name: str
    kind: Any
    default: Any
    help: str
    group: str


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
        table: all options by name.
        groups: name of every group, with the name of its first option.
    """

    def __init__(self, command: str, function: Callable[..., object]) -> None:
        self.command, self.function = command, function
        self.table = {option.name: option for option in _options(function)}
        self.groups: dict[str, str] = {}
        for name in self.table:
            if "." in name:
                self.groups.setdefault(name.partition(".")[0], name)

    def parse(self, words: Sequence[str], *, output_dir: Path | None = None) -> Parsed:
        """Read a command line. --help and --print_config print and raise SystemExit.

        Args:
            words: of the command line, after the command.
            output_dir: value of the option of that name if the command has it and it is not given.

        Raises:
            ValueError: the words do not fit; one line.
        """
        return self._parsed(lambda parser: parser.parse_args(self.translate(words)), output_dir)

    def resolve(self, values: Mapping[str, Any]) -> Parsed:
        """Read a mapping, with groups as mappings or with dotted names, and fill in the defaults.

        Raises:
            ValueError: a name or a value does not fit; one line.
        """
        return self._parsed(lambda parser: parser.parse_object(self._nested(values)), None)

    def translate(self, words: Sequence[str]) -> list[str]:
        """The words in the one form that jsonargparse gets: `--name=value`, with configuration files first.

        Raises:
            ValueError: an option that the command does not have, or a configuration file that cannot be read.
        """
        first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        configs, out = list[str](), self._positional(words[:first])
        rest = list(words[first:])
        while rest:
            word = rest.pop(0)
            option, equals, value = word.partition("=")
            if option in ("-h", "--help", "--print_config"):
                out.append(word)
                continue
            if not option.startswith("--"):
                raise ValueError(f"options must be written as --name value, but got {option!r}; {self._see}")
            name = "config" if option == "--config" else self._known(option[2:], dashes="--")
            kind = self.table[name].kind if name in self.table else str
            if not equals and kind is bool and (not rest or rest[0].startswith("--")):
                value, equals = "true", "="
            elif not equals and rest and (not rest[0].startswith("--") or " " in rest[0]):
                value, equals = rest.pop(0), "="
            if not equals:
                out.append(f"--{name}")
            elif name == "config":
                configs.append(f"--config={json.dumps(self._nested(_read_yaml(Path(value))), default=str)}")
            else:
                out.append(f"--{name}={_bracket(value, kind)}")
        return [*configs, *out]

    def parser(self) -> ArgumentParser:
        """The parser of jsonargparse."""
        from jsonargparse import ArgumentParser

        summary, _, examples = _docstring(self.function)
        needed = [name for name, option in self.table.items() if option.default is inspect.Parameter.empty]
        epilog = ["example:", *(f"  {line}" for line in examples)] if examples else []
        if self.groups:
            group, first = next(iter(self.groups.items()))
            epilog = [f"The first option of a group has a short form: --{group} X is --{first} X.", "", *epilog]
        parser = ArgumentParser(
            prog=self.command,
            usage=" ".join([self.command, *(name.upper() for name in needed), "[options]"]),
            description=summary,
            epilog="\n".join(epilog) or None,
            formatter_class=_Help,
            exit_on_error=False,
            allow_abbrev=False,
            print_config="--print_config",
        )
        parser.add_argument("--config", action="config", metavar="FILE", help="YAML file of options")
        sections: dict[str, Any] = {"": parser}
        for option in self.table.values():
            if option.group not in sections:
                sections[option.group] = parser.add_argument_group(option.group)
            required = option.default is inspect.Parameter.empty
            default: dict[str, Any] = {"required": True} if required else {"default": option.default}
            sections[option.group].add_argument(
                f"--{option.name}", type=option.kind, metavar=_metavar(option.kind), help=_help(option), **default
            )
        return parser

    def _parsed(self, read: Callable[[ArgumentParser], Namespace], output_dir: Path | None) -> Parsed:
        from jsonargparse import ArgumentError

        parser = self.parser()
        try:
            config = read(parser)
        except ArgumentError as error:
            raise ValueError(self._explain(str(error))) from error
        config.pop("config", None)
        if "output_dir" in self.table and config["output_dir"] is None:
            config["output_dir"] = output_dir
        found = parser.instantiate(config).as_dict()
        for name, kind, _ in _parameters(self.function):
            if name in self.groups:
                found[name] = kind(**found[name])
        return Parsed(found, parser.dump(config, skip_unset=False))

    def _positional(self, words: Sequence[str]) -> list[str]:
        """Words before the first option: the first parameters, if they have no default or the first has None."""
        needed = [option for option in self.table.values() if option.default is inspect.Parameter.empty]
        named = needed or [option for option in list(self.table.values())[:1] if option.default is None]
        if words and named and _list_of(named[0].kind) is not None:  # 'report RUN RUN'
            return [f"--{named[0].name}={json.dumps(list(words))}"]
        if len(words) > len(named):
            raise ValueError(f"options must be written as --name value, but got {words[len(named)]!r}; {self._see}")
        return [f"--{option.name}={word}" for option, word in zip(named, words, strict=False)]

    def _known(self, name: str, *, dashes: str = "") -> str:
        """The full name of an option; `dashes` is what stands before names where it is written."""
        if name in self.table or name in self.groups:
            return self.groups.get(name, name)
        if new := moved(self.command, name, [*self.table, *self.groups], dashes=dashes):
            raise ValueError(f"{dashes}{name} has moved, use {new}")
        near = did_you_mean(f"{dashes}{name}", [f"{dashes}{known}" for known in (*_ALWAYS, *self.table, *self.groups)])
        raise ValueError(f"{dashes}{name} must be an option of '{self.command}', but is none{near or '; ' + self._see}")

    def _nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A mapping with dotted names, shorthands and nested groups, as nested groups only."""
        out: dict[str, Any] = {}
        for name, value in self._flat(values):
            group, dot, field = name.partition(".")
            if dot:
                out.setdefault(group, {})[field] = value
            else:
                out[name] = value
        return out

    def _flat(self, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if f"{prefix}{key}" in self.groups and isinstance(value, Mapping):
                yield from self._flat(value, f"{key}.")
            elif f"{prefix}{key}" != "config":
                yield self._known(f"{prefix}{key}"), value

    def _explain(self, message: str) -> str:
        """A complaint of jsonargparse as one line: rule, value and remedy."""
        keys = [key for key in re.findall(r'Parser key "([^"]*)"', message) if key in self.table]
        given = re.search(r"[Gg](?:iven value|ot value): (.*)", message)
        if not keys or given is None:
            return f"{' '.join(message.split())}; {self._see}"
        return f"--{keys[-1]} must be {_words(self.table[keys[-1]].kind)}, but got {given[1]}; {self._see}"

    @property
    def _see(self) -> str:
        return f"see '{self.command} --help'"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of description and epilog, and has a wide column for names."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 36, **settings})


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'; did you mean …?' if something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _options(function: Callable[..., object]) -> Iterator[Option]:
    _, helps, _ = _docstring(function)
    for name, kind, default in _parameters(function):
        if not dataclasses.is_dataclass(kind):
            yield Option(name, kind, default, helps.get(name, ""), "")
            continue
        summary, fields_help, _ = _docstring(kind)
        title = f"{name} ({helps.get(name) or summary.partition(chr(10))[0].rstrip('.')})"
        for field, field_kind, own_default in _parameters(kind):
            value = getattr(default, field, own_default)  # the group's own default if the parameter has none
            yield Option(f"{name}.{field}", field_kind, value, fields_help.get(field, ""), title)


def _parameters(of: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and default of every parameter of a function, or of every field of a dataclass."""
    kinds, empty = typing.get_type_hints(of), inspect.Parameter.empty
    if not dataclasses.is_dataclass(of):
        yield from ((name, kinds[name], given.default) for name, given in inspect.signature(of).parameters.items())
        return
    for field in dataclasses.fields(of):
        default = empty if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, kinds[field.name], default


def _docstring(of: Any) -> tuple[str, dict[str, str], list[str]]:
    """The text before 'Args:', the first sentence on every argument, and the lines of 'Example:'."""
    import docstring_parser

    doc = docstring_parser.parse(of.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    first_sentence = {param.arg_name: re.split(r"\.\s+(?=[A-Z])", param.description or "")[0] for param in doc.params}
    helps = {name: text.rstrip(".") for name, text in first_sentence.items()}
    examples = [line.strip() for part in doc.examples for line in (part.description or "").splitlines()]
    return "\n\n".join(filter(None, (doc.short_description, doc.long_description))), helps, examples


def _read_yaml(path: Path) -> Mapping[str, Any]:
    from jsonargparse import get_loader

    try:
        found = get_loader("yaml")(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config must be a readable YAML file, but got {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--config must be YAML, but {str(path)!r} is not: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"--config must hold options by name, but {str(path)!r} holds {type(found).__name__}")
    return found


def _union(kind: Any) -> tuple[Any, ...]:
    """The members of a union; one member for any other type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _list_of(kind: Any) -> Any:
    """The type of the items of a list or tuple; None for any other type."""
    found = [typing.get_args(part)[0] for part in _union(kind) if typing.get_origin(part) in (list, tuple)]
    return found[0] if len(found) == 1 else None


def _bracket(value: str, kind: Any) -> str:
    """A list with commas as JSON; another value as it is."""
    item = _list_of(kind)
    single = any(part in _NAMES for part in _union(kind))  # 'float | list[float]'
    if item is None or value.startswith("[") or value in ("", "null") or (single and "," not in value):
        return value
    return json.dumps(value.split(",")) if item in (str, Path) else f"[{value}]"


def _metavar(kind: Any) -> str:
    parts = [part for part in _union(kind) if part is not type(None)]
    if typing.get_origin(parts[0]) is Literal:
        return "{" + ",".join(map(str, typing.get_args(parts[0]))) + "}"
    item = _list_of(parts[0])
    return getattr(parts[0], "__name__", "value").upper() if item is None else f"{_metavar(item)},..."


def _words(kind: Any) -> str:
    """A type in words, for messages."""
    out = []
    for part in _union(kind):
        if typing.get_origin(part) is Literal:
            out.append(f"one of {', '.join(map(repr, typing.get_args(part)))}")
        elif _list_of(part) is not None:
            item = _NAMES.get(_list_of(part), "values").rpartition(" ")[2]
            out.append(f"{item}s with commas between" if not item.endswith("s") else f"{item} with commas between")
        else:
            out.append("null" if part is type(None) else _NAMES.get(part, getattr(part, "__name__", str(part))))
    return " or ".join(out)


def _help(option: Option) -> str:
    text, default = option.help.replace("\n", " "), option.default
    if default is inspect.Parameter.empty:
        text += " (required)"
    elif default is not None and default != "":
        listed = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        text += f" (default: {listed.lower() if isinstance(default, bool) else listed})"
    return text.strip().replace("%", "%%")
