"""An SGLang server: launched here and ended with all its processes, or found running."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from specrl.core.clock import WallClock
from specrl.sglang.client.errors import (
    MORE_MEMORY,
    ServerFailed,
    ServerGone,
    ServerOutOfMemory,
    ServerSilent,
    is_out_of_memory,
)
from specrl.sglang.client.http import Client
from specrl.sglang.plugin.hooks import CHECKED

_LOOK_S = 0.2
_END_S = 15.0
_LINES = 12  # of the log, in an error
PLANS, ROUNDS, TRACES = "plans", "rounds", "traces"  # sockets, by their names in a folder


class Server:
    """A server that runs somewhere.

    Args:
        url: 'http://host:port'.
        api_key: that it wants; None: none.
        timeout_s: of a call to it.
        sockets: the folder with the sockets of its plugin; None: it has none that we can reach.
        log: what it prints; None: it is not ours.
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
        self.client = Client(url, api_key=api_key, timeout_s=timeout_s)
        self.sockets, self.log = sockets, log
        self._process: subprocess.Popen[bytes] | None = None
        self._end = lambda: None
        self._info: dict[str, Any] | None = None

    @classmethod
    def launch(
        cls,
        flags: Sequence[str],
        folder: Path,
        *,
        log: Path | None = None,
        python: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 60.0,
    ) -> Server:
        """Begin to start one on this machine; `wait` until it serves.

        Args:
            flags: of sglang.launch_server, without host, port and API key; paths are absolute.
            folder: private to it: its plugin's sockets, where `environment` asks for them.
            log: a file for what it prints; None: server.log in `folder`.
            python: of an environment with SGLang and this package; None: this one.
            environment: set for it beside what is set here.
            timeout_s: of a call to it.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        key = secrets.token_hex(16)  # others on this machine are not to steer it
        log = (log or folder / "server.log").resolve()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPECRL_")}
        command = [str(python or sys.executable), "-m", "sglang.launch_server", *flags]
        command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", key]
        server = cls(f"http://127.0.0.1:{port}", api_key=key, timeout_s=timeout_s, sockets=folder, log=log)
        with log.open("wb") as out:
            server._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**inherited, **(environment or {})},
                start_new_session=True,
                cwd=folder,  # not ours: what lies about there would come before what is installed
            )
        watch = subprocess.Popen(
            [sys.executable, "-c", _WATCH, str(server._process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        server._end = weakref.finalize(server, _end, server._process, watch)
        return server

    @property
    def running(self) -> bool:
        """Whether its process is there; of a server that is not ours, True."""
        return self._process is None or self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Of its first process, which leads the group; None where it is not ours."""
        return None if self._process is None else self._process.pid

    def wait(self, timeout_s: float) -> None:
        """Until it answers.

        Raises:
            ServerError: it ended, or did not answer in time; with the end of its log.
        """
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
                        f"{self._tail()}"
                    ) from None
            Event().wait(_LOOK_S)

    def check(self) -> None:
        """Raise a ServerError where its process has ended."""
        if not self.running:
            assert self._process is not None
            tail, code = self._tail(), self._process.returncode
            if is_out_of_memory(tail):
                raise ServerOutOfMemory(f"the server ended for want of memory; {MORE_MEMORY}; its log: {tail}")
            raise ServerGone(f"the server must run, but ended with status {code}; start it again; its log: {tail}")

    @property
    def info(self) -> dict[str, Any]:
        """What /server_info says: its version and arguments."""
        if self._info is None:
            said = self.client.get("/server_info")
            if not isinstance(said, dict):
                raise ServerFailed(
                    f"{self.client.url} must describe itself at /server_info, but does not; is it SGLang?"
                )
            self._info = said
        return self._info

    @property
    def version(self) -> str:
        """Of SGLang."""
        return str(self.info.get("version", "unknown"))

    def socket(self, name: str) -> Path | None:
        """The plugin's socket of this name, if it is there."""
        if self.sockets is None:
            return None
        path = self.sockets / name
        return path if path.is_socket() else None

    def said(self, words: str) -> str:
        """Lines of its log that hold these words."""
        if self.log is None or not self.log.exists():
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join(line.strip() for line in lines if words in line)

    def close(self) -> None:
        """End it with all its processes, if it is ours; idempotent."""
        self._end()

    def _tail(self) -> str:
        if self.log is None or not self.log.exists():
            return "(none)"
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{self.log}: " + " | ".join(line.strip() for line in lines[-_LINES:] if line.strip())


def check_version(python: str | Path | None = None) -> str | None:
    """A note where SGLang's version was not checked, but its seams look as they should; None where it was.

    Args:
        python: of an environment with SGLang and this package; None: this one.

    Raises:
        ValueError: there is no SGLang, or one that is not as it should be.
    """
    executable = str(python or sys.executable)
    ask = "from importlib.metadata import version; import specrl.sglang.plugin.entry; print(version('sglang'))"
    said = _run(executable, ask, 60.0)
    if said.returncode:
        raise ValueError(
            f"{executable} must have SGLang and specrl, but has not ({_last(said.stderr)}); install them there, or "
            "name another with python="
        )
    found = said.stdout.strip()
    if found in CHECKED:
        return None
    said = _run(executable, "from specrl.sglang.plugin.hooks import EVERY, check_seams; check_seams(EVERY)", 300.0)
    if said.returncode:
        raise ValueError(
            f"SGLang {found} must be as {', '.join(CHECKED)} is, but {_last(said.stderr)}; install that one"
        )
    return f"SGLang {found} is not among the checked versions ({', '.join(CHECKED)}); its seams look as they should"


def _run(executable: str, code: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"python= must be a Python that runs, but {executable!r} does not: {error}") from error


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["nothing was said"])[-1]


_WATCH = """
import os, signal, sys
sys.stdin.buffer.read()  # ends with whoever launched the server, however that was
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
    with suppress(ProcessLookupError):  # whatever it left of its own
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
