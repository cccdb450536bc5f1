"""Command line options from a function's signature, and its arguments from a command line or a YAML file.

A parameter is an option. A parameter whose type is a dataclass is a group of options, one for every field:
`--target.dtype bfloat16`. Some may be written shorter:

    --target DIR             --target.name=DIR, the group's first field
    --batch_sizes 1,4,16     --batch_sizes=[1,4,16]
    --resume                 --resume=true
    DIR, before any option   the first parameter, if it has no default or None as default
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specrl.io.moved import moved
from specrl.io.signature import (
    NAMES,
    describe_type,
    item_type,
    metavar,
    read_docstring,
    read_parameters,
    read_signature,
    union_members,
)

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

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
        table: all options by name.
        groups: name of every group, with the name of its first option.
    """

    def __init__(self, command: str, function: Callable[..., object]) -> None:
        self.command, self.function = command, function
        self.table = {option.name: option for option in read_signature(function)}
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
        values = self._read_words(words)
        if "help" in values:
            self.parser().print_help()
            raise SystemExit(0)
        print_only = values.pop("print_config", False)
        found = self.resolve(values, output_dir=output_dir)
        if print_only:
            print(found.yaml)
            raise SystemExit(0)
        return found

    def resolve(self, values: Mapping[str, Any], *, output_dir: Path | None = None) -> Parsed:
        """Read a mapping, with groups as mappings or with dotted names, and fill in the defaults.

        Raises:
            ValueError: a name or a value does not fit; one line.
        """
        from jsonargparse import ArgumentError

        parser = self.parser()
        try:
            config = parser.parse_object(self._flat(values))
        except ArgumentError as error:
            raise ValueError(self._explain(str(error))) from error
        if "output_dir" in self.table and config["output_dir"] is None:
            config["output_dir"] = output_dir
        found = config.as_dict()
        for name, kind, _ in read_parameters(self.function):
            if name in self.groups:
                found[name] = kind(**found[name])
        return Parsed(found, parser.dump(config, skip_unset=False))

    def _read_words(self, words: Sequence[str]) -> dict[str, Any]:
        """The values on a command line by the full name of their option; configuration files have less precedence."""
        first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        configs, given, rest = dict[str, Any](), self._positional(words[:first]), list(words[first:])
        while rest:
            option, equals, value = rest.pop(0).partition("=")
            if option in ("-h", "--help", "--print_config"):
                given["help" if option == "-h" else option[2:]] = True
                continue
            if not option.startswith("--"):
                raise ValueError(f"options must be written as --name value, but got {option!r}; {self._see}")
            name = "config" if option == "--config" else self._known(option[2:], dashes="--")
            kind = self.table[name].kind if name in self.table else str
            if not equals and kind is bool and (not rest or rest[0].startswith("--")):
                value = "true"
            elif not equals and rest and (not rest[0].startswith("--") or " " in rest[0]):
                value = rest.pop(0)
            elif not equals:
                raise ValueError(f"{option} must have a value, but got none; {self._see}")
            if name == "config":
                configs |= self._flat(_read_yaml(Path(value)))
            else:
                given[name] = _bracket(value, kind)
        return {**configs, **given}

    def parser(self) -> ArgumentParser:
        """The parser of jsonargparse."""
        from jsonargparse import ArgumentParser

        text, _, examples = read_docstring(self.function)
        needed = [name for name, option in self.table.items() if option.required]
        epilog = ["--config FILE.yaml reads options from a file; --print_config prints them and runs nothing."]
        if self.groups:
            group, first = next(iter(self.groups.items()))
            epilog.append(f"The first option of a group has a short form: --{group} X is --{first} X.")
        if examples:
            epilog += ["", "example:", *(f"  {line}" for line in examples)]
        parser = ArgumentParser(
            prog=self.command,
            usage=" ".join([self.command, *(name.upper() for name in needed), "[options]"]),
            description=text,
            epilog="\n".join(epilog),
            formatter_class=_Help,
            exit_on_error=False,
        )
        sections: dict[str, Any] = {"": parser}
        for option in self.table.values():
            if option.group not in sections:
                sections[option.group] = parser.add_argument_group(option.group)
            default: dict[str, Any] = {"required": True} if option.required else {"default": option.default}
            sections[option.group].add_argument(
                f"--{option.name}", type=option.kind, metavar=metavar(option.kind), help=option.help_text, **default
            )
        return parser

    def _positional(self, words: Sequence[str]) -> dict[str, Any]:
        """Words before the first option: the first parameters, if they have no default or the first has None."""
        needed = [option for option in self.table.values() if option.required]
        named = needed or [option for option in list(self.table.values())[:1] if option.default is None]
        if words and named and item_type(named[0].kind) is not None:  # 'report RUN RUN'
            return {named[0].name: list(words)}
        if len(words) > len(named):
            raise ValueError(f"options must be written as --name value, but got {words[len(named)]!r}; {self._see}")
        return {option.name: word for option, word in zip(named, words, strict=False)}

    def _known(self, name: str, *, dashes: str = "") -> str:
        """The full name of an option; `dashes` is written before names in messages."""
        if name in self.table or name in self.groups:
            return self.groups.get(name, name)
        if new := moved(self.command, name, [*self.table, *self.groups], dashes=dashes):
            raise ValueError(f"{dashes}{name} has moved, use {new}")
        near = did_you_mean(f"{dashes}{name}", [f"{dashes}{known}" for known in (*_ALWAYS, *self.table, *self.groups)])
        raise ValueError(f"{dashes}{name} must be an option of '{self.command}', but is none{near or '; ' + self._see}")

    def _flat(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """The values of nested groups by the full names of their options."""
        out: dict[str, Any] = {}
        for key, value in values.items():
            if f"{prefix}{key}" in self.groups and isinstance(value, Mapping):
                out |= self._flat(value, f"{key}.")
            elif f"{prefix}{key}" != "config":
                out[self._known(f"{prefix}{key}")] = value
        return out

    def _explain(self, message: str) -> str:
        """A complaint of jsonargparse as one line: rule, value and remedy."""
        keys = [key for key in re.findall(r'Parser key "([^"]*)"', message) if key in self.table]
        given = re.search(r"[Gg](?:iven value|ot value): (.*)", message)
        if not keys or given is None:
            return f"{' '.join(message.split())}; {self._see}"
        return f"--{keys[-1]} must be {describe_type(self.table[keys[-1]].kind)}, but got {given[1]}; {self._see}"

    @property
    def _see(self) -> str:
        return f"see '{self.command} --help'"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, and has a wide column for names."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{"max_help_position": 36, **settings})


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'; did you mean …?' if something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]
    from jsonargparse import get_loader

    try:
        found = get_loader("yaml")(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"--config must be a readable YAML file, but got {str(path)!r}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config must be YAML, but {str(path)!r} is not: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"--config must hold options by name, but {str(path)!r} holds {type(found).__name__}")
    return found


def _bracket(value: str, kind: Any) -> str:
    """A list with commas as JSON; another value as it is."""
    item = item_type(kind)
    single = any(part in NAMES for part in union_members(kind))  # 'float | list[float]'
    if item is None or value.startswith("[") or value in ("", "null") or (single and "," not in value):
        return value
    return json.dumps(value.split(",")) if item in (str, Path) else f"[{value}]"
