"""An HTTP server whose clients cannot hold up each other: bounded connections, bodies and times."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.server.settings import Limits

_TICK_S = 0.25
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


class LimitedServer(socketserver.ThreadingMixIn, HTTPServer):
    """A thread for each connection, at most ``limits.connections``.

    A connection is closed when its request has not arrived, or its answer has not been taken, within
    ``limits.seconds``, however slowly it goes on.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], limits: Limits) -> None:
        """Bind the address; :meth:`begin` listens.

        Raises:
            UserError: the port is in use, or the address is none of this machine.
        """
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler, bind_and_activate=False)
        self.limits = limits
        self.draining = False
        self._lock = threading.Condition()
        self._deadlines: dict[Any, Optional[float]] = {}
        self._buffered = self._answering = 0
        try:
            self.server_bind()
        except (OSError, OverflowError) as error:
            self.server_close()
            raise UserError(
                f"--port={address[1]} on {address[0]} cannot be listened on ({error}); give another one"
            ) from None

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def begin(self) -> None:
        """Listen, and answer in threads."""
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(_TICK_S,), name="http", daemon=True).start()
        threading.Thread(target=self._watch, name="http-deadlines", daemon=True).start()

    def drain(self, seconds: float) -> bool:
        """Take no further connections, and wait for the running requests.

        Args:
            seconds: the longest wait.

        Returns:
            whether all requests are answered.
        """
        self.draining = True
        self.shutdown()
        self.server_close()
        with self._lock:
            return self._lock.wait_for(lambda: self._answering == 0, seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection, or refuse it."""
        with self._lock:
            full = len(self._deadlines) >= self.limits.connections
            if not full:
                self._deadlines[request] = time.monotonic() + self.limits.seconds
        if full:
            with contextlib.suppress(OSError):
                request.settimeout(0.5)
                request.sendall(_FULL)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has gone."""

    def deadline(self, connection: Any, seconds: Optional[float]) -> None:
        """Set when a connection is closed.

        Args:
            connection: its socket.
            seconds: from now; None: it is left open.
        """
        with self._lock:
            if connection in self._deadlines:
                self._deadlines[connection] = None if seconds is None else time.monotonic() + seconds

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count a request that has arrived, until it is answered."""
        with self._lock:
            self._answering += 1
        try:
            yield
        finally:
            with self._lock:
                self._answering -= 1
                self._lock.notify_all()

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[bool]:
        """Take memory for a body; yields False where the bodies of others leave no room."""
        with self._lock:
            fits = self._buffered + size <= self.limits.buffered_bytes
            self._buffered += size if fits else 0
        try:
            yield fits
        finally:
            with self._lock:
                self._buffered -= size if fits else 0

    def _watch(self) -> None:
        while not self.draining or self._deadlines:
            time.sleep(_TICK_S)
            now = time.monotonic()
            with self._lock:
                late = [request for request, end in self._deadlines.items() if end is not None and end < now]
            for request in late:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread sees the end, and closes it
