"""Messages between the processes of one compression: JSON and arrays over a TCP connection.

Waiting for a message needs no timeout. If the process at the other end ends, the kernel closes the connection at once.
If its host fails, the kernel's keep-alive probes detect it within about a minute.
"""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

_HEADER = struct.Struct(">QQ")
# TCP keep-alive: seconds until an idle connection is probed, seconds between probes, probes that may fail.
_PROBES = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4))
_TEXT_LIMIT = 1 << 26


@dataclass(frozen=True)
class Message:
    """A message of another process.

    Attributes:
        kind: what it is about, such as ``ready``.
        fields: its entries, in JSON types.
        arrays: its arrays by name.
    """

    kind: str
    fields: dict[str, Any]
    arrays: dict[str, np.ndarray]


class Link:
    """A connection to another process.

    Attributes:
        closed: set when the connection is closed and :meth:`listen` was called.
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

    def listen(self, heard: Callable[[Message], None], gone: Callable[[], None]) -> None:
        """Start a thread that reads messages.

        Args:
            heard: called with each message, in that thread.
            gone: called once, after the last message, when the connection is closed.
        """

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
        """Send a message; if the other process has ended, it is lost, which :meth:`listen` reports.

        Args:
            kind: the kind of the message.
            arrays: arrays by name, of any shape and any dtype but object.
            fields: further entries, in JSON types.
        """
        blob = io.BytesIO()
        if arrays is not None:
            np.savez(blob, **{f"{index}": value for index, value in enumerate(arrays.values())})
            fields["arrays"] = list(arrays)
        text = json.dumps({**fields, "kind": kind}).encode()
        with self._sending, contextlib.suppress(OSError):
            self._connection.sendall(_HEADER.pack(len(text), blob.tell()) + text)
            self._connection.sendall(blob.getbuffer())

    def receive(self) -> Optional[Message]:
        """Wait for a message.

        Returns:
            The message; None: the connection is closed.

        Raises:
            ValueError: the data is not a message.
        """
        header = self._read(_HEADER.size)
        if header is None:
            return None
        text_size, blob_size = _HEADER.unpack(header)
        if text_size > _TEXT_LIMIT:
            raise ValueError("this is no message")
        text, blob = self._read(text_size), self._read(blob_size)
        if text is None or blob is None:
            return None
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("this is no message")
        names, arrays = fields.pop("arrays", ()), {}
        if blob:
            with np.load(io.BytesIO(blob), allow_pickle=False) as archive:
                arrays = {name: archive[f"{index}"] for index, name in enumerate(names)}
        return Message(str(fields.pop("kind", "")), fields, arrays)

    def close(self) -> None:
        """Close the connection, which the other end detects."""
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
