"""A function's signature and docstring as command line options, and complaints about them in one line."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def build_parser(prog: str, function: Callable[..., object]) -> ArgumentParser:
    """The parser of a command: its function's keyword parameters, and --config.

    The docstring (Google's style) is the help; lines under 'Example:' are shown as they stand.
    """
    import docstring_parser
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the line breaks of description and examples."""

    doc = docstring_parser.parse(function.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE)
    examples = [line.strip() for part in doc.examples for line in (part.description or "").splitlines()]
    parser = ArgumentParser(
        prog=prog,
        description="\n\n".join(filter(None, (doc.short_description, doc.long_description))),
        epilog="example:\n" + "\n".join(f"  {line}" for line in examples) if examples else None,
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of options; options given beside it win")
    parser.add_function_arguments(function, as_group=False)
    return parser


def read_options(
    parser: ArgumentParser, function: Callable[..., object], words: Sequence[str], *, output_dir: Path
) -> tuple[dict[str, Any], str]:
    """The function's arguments, and the configuration as YAML that --config reads back.

    `output_dir` is the value of the function's parameter of that name, if it has one and none is given.

    Raises:
        ValueError: the words do not fit; one line.
    """
    from jsonargparse import ArgumentError

    try:
        config = parser.parse_args(_bracketed(_named(words, function), function))
    except ArgumentError as error:
        raise ValueError(explain(str(error), parser)) from error
    config.pop("config", None)
    if "output_dir" in config and config["output_dir"] is None:
        config["output_dir"] = output_dir
    return parser.instantiate(config).as_dict(), parser.dump(config, skip_unset=False)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """'; did you mean …?' where something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def explain(message: str, parser: ArgumentParser) -> str:
    """A parser's complaint as rule, value and remedy."""
    remedy = f"see '{parser.prog} --help'"
    options = [option for action in parser._actions for option in action.option_strings if not option.endswith("+")]
    if unknown := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        first = unknown[1].split()[0].partition("=")[0]
        meant = did_you_mean(first, options) or f"; {remedy}"
        return f"an option must be one that the command has, but got {unknown[1]!r}{meant}"
    if unknown := re.match(r"Option '(.*)' is not accepted", message):
        meant = did_you_mean(f"--{unknown[1]}", options).replace("--", "") or f"; {remedy}"
        return f"a configuration must hold the command's options only, but got {unknown[1]!r}{meant}"
    value = re.match(r'Parser key "([^"]*)":\s*(.*)', message, re.DOTALL)
    if value is None:
        return f"{message}; {remedy}"
    key, why = value.groups()
    if "does not exist" in why:
        return f"--{key}: {why}; {remedy}"
    expected = re.search(r"Subtypes: [\[(](.*)[\])]", why) or re.match(r"Expected an? (.*?)\. ", why)
    given = re.search(r"[Gg](?:iven value|ot value): (.*)", why)
    if expected is None or given is None:
        return f"--{key}: {why}; {remedy}"
    kinds = re.sub(r"<class '([\w.]+)'>", r"\1", expected[1]).replace("typing.", "").replace("NoneType", "null")
    kinds = re.sub(r"Literal\[(.*?)\]", r"one of \1", kinds)
    kinds = re.sub(r"(?:, )?(?:list|tuple)\[(\w+)(?:, \.\.\.)?\]", r" or \1,\1,...", kinds).removeprefix(" or ")
    return f"--{key} must be {kinds.replace(', null', ' or null')}, but got {given[1]}; {remedy}"


def _named(words: Sequence[str], function: Callable[..., object]) -> Sequence[str]:
    """Let what must be given stand first without its option's name ('validate RECORD'), or a first None."""
    given = inspect.signature(function).parameters
    first = [name for name, parameter in list(given.items())[:1] if parameter.default is None]
    out = list(words)
    kinds = typing.get_type_hints(function)
    needed = [name for name, parameter in given.items() if parameter.default is parameter.empty]
    if needed and typing.get_origin(kinds[needed[0]]) in (list, tuple):  # 'report RUN RUN'
        count = next((n for n, word in enumerate(words) if word.startswith("-")), len(words))
        out[:count] = [json.dumps(words[:count])] if count else []
    for at, name in enumerate(needed or first):
        if len(out) <= 2 * at or out[2 * at].startswith("-"):
            break
        out.insert(2 * at, f"--{name}")
    return out


def _bracketed(words: Sequence[str], function: Callable[..., object]) -> list[str]:
    """Let lists be written with commas ('--batch_sizes 1,4,16' for '[1,4,16]') and flags alone ('--resume')."""
    kinds = typing.get_type_hints(function)
    out: list[str] = []
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if equals and option[2:] in kinds:
            out.append(f"{option}={_bracket(value, kinds[option[2:]])}")
        else:
            before = out[-1] if out else ""
            out.append(_bracket(word, kinds[before[2:]]) if before[2:] in kinds else word)
            if kinds.get(word[2:]) is bool and (index + 1 == len(words) or words[index + 1].startswith("--")):
                out.append("true")
    return out


def _bracket(value: str, kind: object) -> str:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    lists = [part for part in (typing.get_args(kind) if union else (kind,)) if typing.get_origin(part) in (list, tuple)]
    alone = len(lists) == 1 and not (union and set(typing.get_args(kind)) - {lists[0], type(None)})
    if not lists or not ("," in value or alone) or value.startswith(("[", "--")) or value in ("", "null"):
        return value
    return json.dumps(value.split(",")) if typing.get_args(lists[0])[0] is str else f"[{value}]"
