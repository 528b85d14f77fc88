"""Messages between the processes of one compression: JSON and arrays over a TCP connection.

A connection says at once that the process at its other end is gone, since the kernel closes it, however long nothing
was said before; of a host that has vanished, the kernel's own probes say it within about a minute. So whoever waits
for a message needs no timeout.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, Optional

import numpy as np

_HEADER = struct.Struct(">QQ")
# Seconds until a silent connection is probed, between two probes, and how many may fail.
_PROBES = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4))
_TEXT_LIMIT = 1 << 26


class Link:
    """A connection to another process, read by a thread.

    Attributes:
        closed: set when the other end is gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.settimeout(None)
        self.closed = threading.Event()
        self._connection = connection
        self._sending = threading.Lock()

    def listen(self, heard: Callable[[dict[str, Any]], None], gone: Callable[[], None]) -> None:
        """Start the thread: ``heard`` is called with each message, ``gone`` when there will be no more."""

        def read() -> None:
            with contextlib.suppress(OSError, ValueError):
                while True:
                    message = self.receive()
                    if message is None:
                        break
                    heard(message)
            self.closed.set()
            gone()

        threading.Thread(target=read, name="ranks", daemon=True).start()

    def send(self, kind: str, arrays: Optional[Mapping[str, np.ndarray]] = None, **fields: Any) -> None:
        """Send a message; one to a process that is gone is lost, and :meth:`listen` says so.

        Args:
            kind: what it is about.
            arrays: of any shapes and types but objects.
            fields: of types that JSON has.
        """
        blob = io.BytesIO()
        if arrays is not None:
            np.savez(blob, **{f"{index}": value for index, value in enumerate(arrays.values())})
            fields["arrays"] = list(arrays)
        text = json.dumps({**fields, "kind": kind}).encode()
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(_HEADER.pack(len(text), blob.tell()) + text)
            self._connection.sendall(blob.getbuffer())

    def receive(self) -> Optional[dict[str, Any]]:
        """Wait for a message, and return it with its ``arrays`` by name; None: the other end is gone."""
        header = self._read(_HEADER.size)
        if header is None:
            return None
        text_size, blob_size = _HEADER.unpack(header)
        if text_size > _TEXT_LIMIT:
            raise ValueError("this is no message")
        text, blob = self._read(text_size), self._read(blob_size)
        if text is None or blob is None:
            return None
        message = json.loads(text)
        if blob:
            with np.load(io.BytesIO(blob), allow_pickle=False) as archive:
                message["arrays"] = {name: archive[f"{index}"] for index, name in enumerate(message["arrays"])}
        return message

    def close(self) -> None:
        """Close the connection; the other end hears of it."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, size: int) -> Optional[bytearray]:
        data = bytearray(size)
        view = memoryview(data)
        while view.nbytes:
            count = self._connection.recv_into(view)
            if not count:
                return None
            view = view[count:]
        return data
