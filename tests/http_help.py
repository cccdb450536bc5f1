"""HTTP servers for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]
Serve = Callable[[Answer], str]


def read_json(handler: BaseHTTPRequestHandler) -> Any:
    """The body of a request; {} if it is empty or incomplete."""
    length = int(handler.headers.get("Content-Length") or 0)
    body = handler.rfile.read(length)
    return json.loads(body) if body and len(body) == length else {}


def answer_json(handler: BaseHTTPRequestHandler, value: object, status: int = 200) -> None:
    """Answer a request with JSON."""
    body = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def answering() -> Iterator[Serve]:
    """Yields a function that starts a server, whose requests are answered by another function, and returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with suppress(OSError):  # the client has gone
                    answer(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.block_on_close = False  # a connection that is kept must not delay the end
        servers.append(server)
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
