"""An SGLang server of an exported directory, on a CPU, and what it answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.export.bundle import Bundle, Provenance
from specrl.export.serving_flags import plan_serving
from specrl.models.draft import Draft
from specrl.models.embedded import embedded_directory
from specrl.sglang.plugin.policy import LearnedPolicy

ON_A_CPU = """
--device cpu --dtype float32 --attention-backend intel_amx --mem-fraction-static 0.5 --max-total-tokens 4096
--max-running-requests 8 --context-length 1024 --disable-cuda-graph --disable-radix-cache --skip-server-warmup
""".split()
_STARTS_WITHIN_S = 600


@dataclass(frozen=True)
class Server:
    """A running server; `log` is what it printed."""

    url: str
    log: Path

    def post(self, path: str, body: object, timeout_s: float = 120.0) -> Any:
        """The answer to a POST."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())

    def generate(self, prompt: Sequence[int], new: int, custom: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Greedy output of one request: output_ids and meta_info."""
        sampling: dict[str, object] = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
        if custom is not None:
            sampling["custom_params"] = dict(custom)
        answer = self.post("/generate", {"input_ids": list(prompt), "sampling_params": sampling})
        assert isinstance(answer, dict)
        return answer

    def generate_together(self, prompts: Sequence[Sequence[int]], new: int) -> list[dict[str, Any]]:
        """The same of many at once."""
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, new), prompts))

    def log_lines(self, *words: str) -> list[str]:
        """Lines of the log that contain all of these words."""
        return [line for line in self.log.read_text().splitlines() if all(word in line for word in words)]


def export(draft: Draft, table: dict[int, Plan], directory: Path) -> Path:
    policy = LearnedPolicy(table, tuple(dict.fromkeys(table.values())))
    source, path = Provenance("embedded", 0.0), str(embedded_directory())
    Bundle(draft, policy, plan_serving(table), source, path).write(directory)
    return directory


@contextmanager
def serve(bundle: Path, *flags: str, log: Path, **environment: str) -> Iterator[Server]:
    """Start `bundle`/launch.sh on a free port, wait until it answers, and end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(bundle / "launch.sh"), *ON_A_CPU, "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": sys.executable, **environment},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # whatever it left of its own
            os.killpg(process.pid, signal.SIGKILL)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    clock = WallClock()
    began = clock.now()
    while clock.now() - began < _STARTS_WITHIN_S:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(server.url + "/model_info", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError("the server did not start:\n" + "\n".join(server.log.read_text().splitlines()[-40:]))
