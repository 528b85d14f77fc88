"""An HTTP store through which the processes of a training on CPUs exchange their addresses for Gloo.

It runs in a separate process and uses the standard library only: Paddle 2.6.2 holds Python's global interpreter lock
while it connects Gloo, so a thread of rank 0 could not answer. Run as ``python gloo_store.py HOST``; it prints its port
and ends when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Store(ThreadingHTTPServer):
    """The server, which holds the stored values by path."""

    def __init__(self, host: str) -> None:
        super().__init__((host, 0), _Handler)
        self.values: dict[str, bytes] = {}


class _Handler(BaseHTTPRequestHandler):
    # Buffered writing, since Gloo's client needs each answer in one piece.
    wbufsize = -1
    server: _Store

    def do_GET(self) -> None:
        value = self.server.values.get(self.path)
        self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        self.server.values[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_DELETE(self) -> None:
        self._answer(200)

    def log_message(self, format: str, *args: Any) -> None:
        """Suppress the log of requests."""

    def _answer(self, code: int, content: bytes = b"") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def running(host: str) -> Iterator[int]:
    """Run the store in a process while the ``with`` block runs.

    Args:
        host: an address of this machine to listen on.

    Yields:
        The store's port.
    """
    process = subprocess.Popen([sys.executable, __file__, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    with process:
        yield int(process.stdout.readline())
        process.stdin.close()


if __name__ == "__main__":
    with _Store(sys.argv[1]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(server.server_address[1], flush=True)
        sys.stdin.read()
        server.shutdown()
