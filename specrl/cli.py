"""The command line: `specrl <command>`.

A command is a function with typed keyword parameters; its signature and docstring make its options and its help,
and its line in `COMMANDS` makes it known. Only the module of the command that runs is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import specrl
from specrl.io.options import build_parser, did_you_mean, read_options


class Command(NamedTuple):
    """Where a command's function is, and what it does in a line."""

    target: str  # 'module:function'
    help: str


COMMANDS = {
    "quickstart": Command(
        "specrl.commands.quickstart:quickstart", "from a random draft to a measured speedup, in minutes"
    ),
    "train": Command("specrl.commands.train:train", "learn a draft, and a plan per batch size, on live traffic"),
    "record": Command("specrl.commands.record:record", "serve traffic, and keep what a draft can be learnt from"),
    "export": Command("specrl.commands.export:export", "what a run learned, as a directory that serves"),
    "import": Command("specrl.commands.import_draft:import_draft", "a published EAGLE3 draft, to start learning from"),
    "doctor": Command("specrl.commands.doctor:doctor", "what this machine can do, and what would slow it down"),
    "bench": Command("specrl.commands.bench:bench", "speculative against plain decoding, by plan and batch size"),
    "compare": Command("specrl.commands.compare:compare", "two drafts or runs, measured in turns, or two benchmarks"),
    "evaluate": Command("specrl.commands.evaluate:evaluate", "choosers of plans against each other, simulated or live"),
    "validate": Command("specrl.commands.validate:validate", "does a record of an evaluation hold?"),
    "presets": Command("specrl.commands.presets:presets", "drafts that others published, and where each figure stands"),
    "profile": Command("specrl.commands.profile:profile", "record this machine's rounds, for simulation"),
    "study": Command("specrl.commands.study:study", "hyperparameters searched with Optuna, by what trials measure"),
    "report": Command("specrl.commands.report:report", "runs side by side on one HTML page, for any browser"),
    "watch": Command("specrl.commands.watch:watch", "a run in the terminal, while it goes on"),
    "rl": Command("specrl.commands.rl:rl", "a policy that chooses plans, by PPO and others, simulated or live"),
}

_HELP = """\
usage: specrl <command> [--help] [options]

{about}

commands:
{commands}

Every command explains itself with --help, reads --config file.yaml (options given beside it win), shows what it
would run with --print_config, and writes its results, with its configuration, to --output_dir.

example:
  specrl quickstart
"""


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Run a command line and return the exit status: 0, 2 for wrong input, 130 when interrupted.

    Wrong input is one line on standard error; SPECRL_DEBUG=1 in the environment shows the traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    known = {name: command for name, command in commands.items() if _exists(command)}
    first = words[0] if words else "--help"
    prog = f"specrl {first}" if first in known else "specrl"
    try:
        if first in known:
            run(prog, known[first], words[1:])
        elif first in ("-h", "--help"):
            print(_help(known), end="")
        elif first == "--version":
            print(f"specrl {specrl.__version__}")
        else:
            meant = did_you_mean(first, [*known, "--help", "--version"]) or "; see 'specrl --help'"
            raise ValueError(f"a command must be one of {', '.join(known)}, but got {first!r}{meant}")
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if os.environ.get("SPECRL_DEBUG") == "1":
            raise
        print(f"{prog}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run(prog: str, command: Command, words: Sequence[str]) -> None:
    """Read the options of a command and call its function.

    A function with a parameter `output_dir` gets runs/<command>-<time> where none is named, with the resolved
    configuration in config.yaml.

    Raises:
        ValueError: the options do not fit.
    """
    from specrl.io.output import OutputDir
    from specrl.measure.malloc import keep_large_blocks

    keep_large_blocks()
    module, _, name = command.target.partition(":")
    function = getattr(importlib.import_module(module), name)
    started = datetime.now().strftime("%Y%m%d-%H%M%S")
    fresh = Path("runs", f"{prog.split()[-1]}-{started}-{os.getpid()}")
    options, text = read_options(build_parser(prog, function), function, words, output_dir=fresh)
    if "output_dir" in options:
        OutputDir(options["output_dir"]).write_text("config.yaml", text)
    try:
        function(**options)
    except ValueError:
        if "output_dir" in options:
            OutputDir(options["output_dir"]).discard_alone("config.yaml")
        raise


def _exists(command: Command) -> bool:
    return importlib.util.find_spec(command.target.partition(":")[0]) is not None


def _help(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:{width}}  {command.help}" for name, command in commands.items())
    return _HELP.format(about=specrl.__doc__, commands=lines)


def _one_line(error: Exception) -> str:
    named = isinstance(error, OSError) and error.strerror and error.filename
    message = f"{error.strerror}: {error.filename}" if named else str(error)  # type: ignore[attr-defined]
    return " ".join(message.split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
