"""Lets a server go on when whoever paused it has died: a script of its own, with the standard library alone.

    python guard.py < one line of JSON: {"url": ..., "headers": {...}, "timeout_s": ...}

It says 'ready', and waits for a second line. Where its input ends without one, its parent was killed with the server
paused: it closes the weight update, and has the server go on.
"""

import http.client
import json
import sys
from urllib.parse import urlsplit


def connect(url: str, timeout_s: float) -> http.client.HTTPConnection:
    """A connection to a server, not opened yet."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=timeout_s)


def release(url: str, headers: dict[str, str], timeout_s: float) -> None:
    """Close a weight update that may be open, and have the server go on; nothing is said where it is gone."""
    for path in ("/end_weight_update", "/continue_generation"):
        connection = connect(url, timeout_s)
        try:
            connection.request("POST", urlsplit(url).path.rstrip("/") + path, b"{}", headers)
            connection.getresponse().read()
        except OSError:
            pass
        finally:
            connection.close()


if __name__ == "__main__":
    asked = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    if not sys.stdin.readline():
        release(asked["url"], asked["headers"], asked["timeout_s"])
