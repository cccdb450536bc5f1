"""A process that stands by while a server is paused, for the case that the one who paused it is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from specrl.sglang.client import watchdog_process as guard


@contextmanager
def standing_by(url: str, headers: Mapping[str, str], timeout_s: float) -> Iterator[Callable[[], None]]:
    """While it lasts, `guard.py` runs as a process; what this gives says that the server goes on already.

    Left without that, by this process's end or an error, the other one lets the server go on.

    Args:
        url: of the server.
        headers: of the calls that let it go on.
        timeout_s: for each of them.
    """
    told = {"url": url, "headers": dict(headers), "timeout_s": timeout_s}
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # what kills our group leaves it be
        text=True,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def tell(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()

    with process:
        tell(json.dumps(told))
        stdout.readline()  # 'ready'
        yield lambda: tell("done")
