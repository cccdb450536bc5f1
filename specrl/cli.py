"""The command line: `specrl <command>`.

A command is a function with typed keyword parameters; its signature and docstring make its options and its help
(`specrl.io.options`), and its line in `COMMANDS` makes it known. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import specrl
from specrl.core.checks import require_known
from specrl.io.options import Options


class Command(NamedTuple):
    """The place of a command's function, and its description in one line."""

    target: str  # 'module:function'
    help: str


COMMANDS = {
    "quickstart": Command("specrl.commands.quickstart:quickstart", "train a draft and measure its speedup, in minutes"),
    "train": Command("specrl.commands.train:train", "train a draft, and a plan per batch size, while serving"),
    "train offline": Command("specrl.commands.train:train_offline", "train a draft from recorded traces"),
    "train server": Command(
        "specrl.commands.train:train_server", "train a draft from the traffic of a running SGLang server"
    ),
    "train ray": Command("specrl.commands.train:train_ray", "train a draft while serving on a Ray cluster"),
    "record": Command("specrl.commands.record:record", "serve requests and record traces"),
    "export": Command("specrl.commands.export:export", "write the result of a run as a directory that SGLang serves"),
    "import": Command("specrl.commands.export:import_draft", "convert a published EAGLE3 draft"),
    "doctor": Command("specrl.commands.doctor:doctor", "check this machine, and what would slow it down"),
    "bench": Command("specrl.commands.bench:bench", "measure speculative against plain decoding"),
    "compare": Command("specrl.commands.compare:compare", "measure two drafts or runs, or compare two benchmarks"),
    "evaluate": Command("specrl.commands.evaluate:evaluate", "compare choosers of plans, simulated or live"),
    "presets": Command("specrl.commands.presets:presets", "list published drafts, with sources"),
    "profile": Command("specrl.commands.profile:profile", "record this machine's rounds for simulation"),
    "study": Command("specrl.commands.study:study", "search hyperparameters with Optuna"),
    "report": Command("specrl.commands.report:report", "show runs on one HTML page"),
    "rl": Command("specrl.commands.rl:rl", "train a policy that chooses plans, in simulation"),
    "rl live": Command("specrl.commands.rl:rl_live", "train a policy that chooses plans, on live decoding"),
}

REMOVED_COMMANDS = {  # name: what to use instead
    "validate": "run 'specrl evaluate' again and compare the intervals",
    "watch": "use TensorBoard ('tensorboard --logdir RUN/tensorboard') or 'tail -f RUN/log.csv'",
}

_HELP = """\
usage: specrl <command> [--help] [options]

{about}

commands:
{commands}

Run any command with --help. Options can be read from --config FILE.yaml; options on the command line take precedence.
--print_config prints the configuration and runs nothing. Results and their configuration go to --output_dir.

example:
  specrl quickstart
"""


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run a command line and return the exit status: 0, 2 for wrong input, 130 when interrupted.

    Wrong input is one line on standard error; SPECRL_DEBUG=1 in the environment shows the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = split_command(words, commands)
    first = words[0] if words else "--help"
    prog = f"specrl {name}".rstrip()
    try:
        if name:
            run(name, commands[name], rest)
        elif first in ("-h", "--help"):
            print(_help(commands), end="")
        elif first == "--version":
            print(f"specrl {specrl.__version__}")
        elif first in REMOVED_COMMANDS:
            raise ValueError(f"the command {first!r} was removed; {REMOVED_COMMANDS[first]}")
        else:
            require_known("a command", first, [*commands, "--help", "--version"])
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("SPECRL_DEBUG") == "1":
            raise
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def split_command(words: Sequence[str], commands: Mapping[str, Command] = COMMANDS) -> tuple[str, list[str]]:
    """Return the name of the command that a command line begins with, '' if there is none, and the words after it."""
    for count in (2, 1):  # 'train offline' before 'train'
        if (name := " ".join(words[:count])) in commands:
            return name, list(words[count:])
    return "", list(words)


def options_of(name: str, command: Command | None = None) -> Options:
    """Return the options of a command."""
    module, _, function = (command or COMMANDS[name]).target.partition(":")
    return Options(f"specrl {name}", getattr(importlib.import_module(module), function))


def run(name: str, command: Command, words: Sequence[str]) -> None:
    """Read the options of a command and call its function.

    A function with a parameter `output_dir` gets runs/<command>-<time> by default, and the configuration is
    written there as config.yaml.

    Raises:
        ValueError: the options do not fit.
    """
    from specrl.io.output import OutputDir
    from specrl.measure.machine import keep_large_blocks

    keep_large_blocks()
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    fresh = Path("runs", f"{name.replace(' ', '-')}-{started}-{os.getpid()}")
    options = options_of(name, command)
    arguments, text = options.parse(words, output_dir=fresh)
    if "output_dir" in arguments:
        OutputDir(arguments["output_dir"]).write_text("config.yaml", text)
    try:
        options.function(**arguments)
    except ValueError:
        if "output_dir" in arguments:
            OutputDir(arguments["output_dir"]).discard_alone("config.yaml")
        raise


def _help(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:{width}}  {command.help}" for name, command in commands.items())
    return _HELP.format(about=specrl.__doc__, commands=lines)


def _one_line(error: Exception) -> str:
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        message = f"{error.strerror}: {error.filename}"
    return " ".join(message.split()) or type(error).__name__
