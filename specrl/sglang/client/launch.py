"""An SGLang server: launched here and ended with all its processes, or already running."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from specrl.core.clock import WallClock
from specrl.sglang.client.http import (
    MORE_MEMORY,
    Client,
    ServerFailed,
    ServerGone,
    ServerOutOfMemory,
    ServerSilent,
    is_out_of_memory,
)
from specrl.sglang.plugin.hooks import CHECKED

_POLL_S = 0.2
_END_S = 15.0  # for a server to end by itself
_LOG_LINES = 12  # in an error
PLANS, ROUNDS, TRACES = "plans", "rounds", "traces"  # names of the sockets in their folder
VARIABLES = {PLANS: "SPECRL_POLICY", ROUNDS: "SPECRL_ROUNDS", TRACES: "SPECRL_TRACES"}  # that take their addresses


class Server:
    """A server.

    Args:
        url: 'http://host:port'.
        api_key: its API key; None: it needs none.
        timeout_s: seconds that a call, or a round, may take.
        sockets: folder with the sockets of its plugin; None: it has none that we can reach.
        log: file with its output; None: it was not launched here.

    Attributes:
        draft_version: version of the draft weights that serve; 0 before any were loaded.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        sockets: Path | None = None,
        log: Path | None = None,
    ) -> None:
        self.client, self.timeout_s = Client(url, api_key=api_key, timeout_s=timeout_s), timeout_s
        self.sockets, self.log, self.draft_version = sockets, log, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._end = lambda: None

    @classmethod
    def launch(
        cls,
        flags: Sequence[str],
        log: Path,
        folder: Path,
        *,
        sockets: Sequence[str] = (),
        lockstep_s: float = 120.0,
        python: str | Path | None = None,
        timeout_s: float = 60.0,
    ) -> Server:
        """Start a server on this machine; call `wait` until it serves.

        Args:
            flags: flags of sglang.launch_server, without host, port and API key; paths are absolute.
            log: file for its output.
            folder: its working directory, which is created, with the sockets of its plugin.
            sockets: names of these sockets.
            lockstep_s: seconds that a round waits for a permit at most.
            python: Python of an environment with SGLang and this package; None: this one.
            timeout_s: as for `Server`.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        key = secrets.token_hex(16)  # others on this machine must not use it
        folder.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SPECRL_")}
        environment |= {VARIABLES[name]: f"unix:{folder / name}" for name in sockets}
        command = [str(python or sys.executable), "-m", "sglang.launch_server", *flags]
        command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", key]
        server = cls(f"http://127.0.0.1:{port}", api_key=key, timeout_s=timeout_s, sockets=folder, log=log.resolve())
        with log.open("wb") as out:
            server._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**environment, "SPECRL_LOCKSTEP": f"{lockstep_s:g}"},
                start_new_session=True,
                cwd=folder,  # in ours, Python would import our files in place of installed packages
            )
        watch = subprocess.Popen(
            [sys.executable, "-c", _WATCH, str(server._process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        server._end = weakref.finalize(server, _end, server._process, watch)
        return server

    @property
    def running(self) -> bool:
        """Whether its process runs; True if it was not launched here."""
        return self._process is None or self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Id of its first process, which leads the process group; None if it was not launched here."""
        return None if self._process is None else self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Wait until it answers; raise a ServerError with the end of its log if it ends, or does not in time."""
        clock = WallClock()
        limit = clock.now() + timeout_s
        while True:
            self.check()
            try:
                self.client.get("/model_info", timeout_s=max(min(5.0, limit - clock.now()), 0.1))
                return
            except (ServerGone, ServerSilent):
                if clock.now() > limit:
                    raise ServerSilent(
                        f"the server must answer within {timeout_s:g} s, but did not; allow it longer, or see its log: "
                        f"{self._log_lines()}"
                    ) from None
            Event().wait(_POLL_S)

    def check(self) -> None:
        """Raise a ServerError if its process has ended."""
        if not self.running:
            assert self._process is not None
            log, status = self._log_lines(), self._process.returncode
            if is_out_of_memory(log):
                raise ServerOutOfMemory(f"the server ran out of memory; {MORE_MEMORY}; its log: {log}")
            raise ServerGone(f"the server must run, but ended with status {status}; start it again; its log: {log}")

    @cached_property
    def info(self) -> dict[str, Any]:
        """Its version and arguments, from /server_info."""
        info = self.client.get("/server_info")
        if not isinstance(info, dict):
            raise ServerFailed(f"{self.client.url}/server_info must answer an object, but got {info!r:.80}")
        return info

    @property
    def version(self) -> str:
        """Version of SGLang."""
        return str(self.info.get("version", "unknown"))

    def has_socket(self, name: str) -> bool:
        """Whether the plugin's socket of this name exists."""
        return self.sockets is not None and (self.sockets / name).is_socket()

    def socket(self, name: str) -> str:
        """Return the address of the plugin's socket of this name; raise a ServerFailed if it does not exist."""
        if self.sockets is None or not self.has_socket(name):
            raise ServerFailed(
                f"the server's plugin must listen on its socket {name!r}, but does not; is specrl installed beside "
                f"SGLang, with {VARIABLES[name]} set? its log: {self._log_lines('SPECRL PLUGIN')}"
            )
        return f"ipc://{(self.sockets / name).absolute()}"

    def close(self) -> None:
        """End it with all its processes, if it was launched here; idempotent."""
        self._end()

    def _log_lines(self, containing: str = "") -> str:
        """Return the last lines of its log that contain a text."""
        if self.log is None or not self.log.exists():
            return "no log"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        chosen = [line.strip() for line in lines if line and containing in line]
        return f"{self.log}: {' | '.join(chosen[-_LOG_LINES:])}"


def check_version(python: str | Path | None = None) -> str | None:
    """Return a note if SGLang's version was not checked, but has the functions that the plugin hooks.

    Raises:
        ValueError: the environment of `python` has no SGLang, or one with other functions.
    """
    executable = str(python or sys.executable)
    try:
        done = subprocess.run([executable, "-c", _CHECK], capture_output=True, text=True, timeout=300.0, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python= must be a Python that runs, but {executable!r} does not: {error}") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"{executable} must have SGLang and specrl, but has not ({reason}); install them there, SGLang "
            f"as version {CHECKED[0]}, or choose another one with python="
        )
    return done.stdout.strip() or None


_CHECK = """
from specrl.sglang.plugin.hooks import ALL_TARGETS, check_targets, version_note
note = version_note()
if note is not None:
    check_targets(ALL_TARGETS)
    print(note)
"""
_WATCH = """
import os, signal, sys
sys.stdin.buffer.read()  # ends when the process that launched the server ends
try:
    os.killpg(int(sys.argv[1]), signal.SIGKILL)
except ProcessLookupError:
    pass
"""


def _end(process: subprocess.Popen[bytes], watch: subprocess.Popen[bytes]) -> None:
    watch.kill()
    watch.wait()
    if watch.stdin is not None:
        watch.stdin.close()
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with suppress(ProcessLookupError):  # its own processes
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
