"""Requests that are passed on to Triton, and again if one of its processes ended meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Optional, Protocol

_LOCAL = "127.0.0.1"
_PAUSE_S = 0.1
# No process has answered.
UNAVAILABLE = 503


def _stub_ended(response: Response) -> bool:
    """Return whether the process of one of Triton's model instances has ended; Triton starts another."""
    return response.status == 500 and b"Stub process" in response.body


class KServe(Protocol):
    """What answers requests of KServe; :class:`act_pipeline.server.triton.process.TritonProcess`.

    Attributes:
        http_port: where it listens at the moment.
        metrics_port: where its metrics are.
    """

    http_port: int
    metrics_port: int

    def ready(self) -> bool:
        """Return whether it answers requests now."""


@dataclass(frozen=True)
class Response:
    """A response.

    Attributes:
        status: the HTTP status.
        headers: the headers.
        body: the body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Upstream:
    """One client's connection to Triton; one thread uses it."""

    def __init__(self, triton: KServe, seconds: float, ending: Callable[[], bool] = lambda: False) -> None:
        """Connect with the first request.

        Args:
            triton: where to.
            seconds: the longest that a request may take.
            ending: whether the server ends, so that Triton is not waited for.
        """
        self._triton, self._seconds, self._ending = triton, seconds, ending
        self._connection: Optional[http.client.HTTPConnection] = None
        self._port = 0

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Optional[Mapping[str, str]] = None
    ) -> Response:
        """Return Triton's response; one of status 503 if there is none in time.

        Args:
            method: such as ``POST``.
            path: such as ``/v2/health/ready``.
            body: the body.
            headers: the headers.
        """
        end = time.monotonic() + self._seconds
        while time.monotonic() < end:
            if self._connection is None or self._port != self._triton.http_port:
                self._port = self._triton.http_port
                self._connection = http.client.HTTPConnection(_LOCAL, self._port, timeout=self._seconds)
            try:
                self._connection.request(method, path, body, dict(headers or {}))
                found = self._connection.getresponse()
                response = Response(found.status, dict(found.getheaders()), found.read())
                if not _stub_ended(response) or self._ending():
                    return response
                time.sleep(_PAUSE_S)
            except TimeoutError:
                self.close()
                break
            except (OSError, http.client.HTTPException):
                # It closes idle connections too; a request computes the same however often it is sent.
                self.close()
            while not self._triton.ready():
                if self._ending() or time.monotonic() > end:
                    return _UNAVAILABLE
                time.sleep(_PAUSE_S)
        return _UNAVAILABLE

    def close(self) -> None:
        """Close the connection; the next request makes another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def fetch_metrics(triton: KServe) -> str:
    """Return Triton's own metrics in Prometheus' text format; empty if it does not answer."""
    connection = http.client.HTTPConnection(_LOCAL, triton.metrics_port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/metrics")
        found = connection.getresponse()
        text = found.read().decode("utf-8", "replace")
        return text if found.status == 200 else ""
    return ""


_UNAVAILABLE = Response(
    UNAVAILABLE, {"Content-Type": "application/json"}, b'{"error":"Triton does not answer at the moment; try again"}'
)
