"""A process that resumes a paused server if the process that paused it is killed.

This file also runs as a script, `python -I -S watchdog.py`, with the standard library alone. It reads one line of JSON,
{"url": …, "headers": {…}, "timeout_s": …}, prints 'ready' and waits for a second line. If its input ends without one,
its parent was killed: it ends the weight update that may be open, and lets the server go on.
"""

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def resume_on_crash(url: str, headers: Mapping[str, str], timeout_s: float) -> Iterator[Callable[[], None]]:
    """Run the watchdog process; call the yielded function once the server goes on.

    Without that call, at the end of this process or after an error, the watchdog resumes the server at `url`. It sends
    these headers, and each of its calls may take `timeout_s` seconds.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a signal to our process group does not end it
        text=True,
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None and stdout is not None

    def send(line: str) -> None:
        stdin.write(line + "\n")
        stdin.flush()

    with process:
        send(json.dumps({"url": url, "headers": dict(headers), "timeout_s": timeout_s}))
        stdout.readline()  # 'ready'
        yield lambda: send("done")


def resume(url: str, headers: Mapping[str, str], timeout_s: float) -> None:
    """End a weight update that may be open, and let the server go on; a server that has gone is no error."""
    parts = urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    for path in ("/end_weight_update", "/continue_generation"):
        with (
            suppress(OSError, http.client.HTTPException),
            closing(connect(parts.hostname or "", parts.port, timeout=timeout_s)) as connection,
        ):
            connection.request("POST", parts.path.rstrip("/") + path, b"{}", dict(headers))
            connection.getresponse().read()


if __name__ == "__main__":
    server = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    if not sys.stdin.readline():
        resume(**server)
