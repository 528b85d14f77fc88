"""The requests of the HTTP port."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Optional
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from act_pipeline.core.version import __version__
from act_pipeline.server.http.listener import LimitedServer
from act_pipeline.server.http.upstream import KServe, Upstream, fetch_metrics
from act_pipeline.server.items import Found, Picture
from act_pipeline.server.kserve import HEADER_LENGTH, INFER_PATH, detected, detection, picture_request
from act_pipeline.server.service import Service
from act_pipeline.server.settings import MODEL_NAME

PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self'"
)
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
# KServe for one model; everything else that Triton has (repositories, shared memory, traces) stays inside.
_MODEL = rf"/v2/models/{re.escape(MODEL_NAME)}(/versions/1)?"
_GET = re.compile(rf"/v2(/health/(live|ready))?|{_MODEL}(/(ready|config|stats))?")
_POST = re.compile(rf"{_MODEL}/infer")
_PASSED = ("content-type", "content-length", HEADER_LENGTH.lower())
# Deeper JSON than a request of KServe has could exhaust the stack of a parser.
_MAX_DEPTH = 16
_NO_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\[\]{}"]+', re.DOTALL)
_OPEN, _CLOSE = tuple(b"[{"), tuple(b"]}")
_UNREADABLE = b"failed to parse the request JSON"
_COMPARED_AT_ONCE = 4


class BadRequest(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Backend:
    """What the handlers of all connections share.

    Attributes:
        service: versions and monitor.
        triton: Triton.
        comparing: how many pictures may wait for the float model.
    """

    service: Service
    triton: KServe
    comparing: threading.BoundedSemaphore


def make_backend(service: Service, triton: KServe) -> Backend:
    """Return what the handlers share."""
    return Backend(service, triton, threading.BoundedSemaphore(_COMPARED_AT_ONCE))


class Handler(BaseHTTPRequestHandler):
    """One connection. A subclass has the attribute ``backend``."""

    backend: Backend
    server: LimitedServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"act_pipeline/{__version__}", ""
    # Headers and body of an answer in one packet each would wait for the client's acknowledgement.
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        ending = lambda: self.server.draining  # noqa: E731
        self._upstream = Upstream(self.backend.triton, 3 * self.server.limits.seconds, ending)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def handle_one_request(self) -> None:
        """Read a request within the time for it, and answer it."""
        self.server.deadline(self.connection, self.server.limits.seconds)
        super().handle_one_request()
        if self.server.draining:
            self.close_connection = True

    def do_GET(self) -> None:
        with self.server.answering():
            self._answer({
                "/": self._page,
                "/figures": self._figures,
                "/metrics": self._metrics,
                "/v2/health/ready": self._ready,
            }, _GET, b"")  # fmt: skip

    def do_POST(self) -> None:
        try:
            size = self._body_size()
        except BadRequest as error:
            self.close_connection = True  # what follows is the body, not another request
            self._error(error)
            return
        with self.server.room(size) as fits:
            if not fits:
                self.close_connection = True
                self._error(BadRequest(503, "too many bodies arrive at the moment; try again"))
                return
            body = self.rfile.read(size)
            if len(body) < size:
                self.close_connection = True
                return
            with self.server.answering():
                routes = {"/detect": self._detect, "/compare": self._compare, "/labels": self._labels}
                self._answer(routes, _POST, body)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for a request; the metrics count them."""

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """Answer what the standard library refuses, in JSON as all errors."""
        self.close_connection = True
        # What is no HTTP/1 has no status line in the standard library.
        self.request_version = self.protocol_version
        self._error(BadRequest(code, message or "bad request"))

    def parse_request(self) -> bool:
        """Read the request line and the headers; without a version of HTTP they are refused."""
        if not super().parse_request():
            return False
        if self.request_version == "HTTP/0.9":
            self.send_error(400, "the request line has no version of HTTP")
            return False
        return True

    def _body_size(self) -> int:
        if self.headers.get("Transfer-Encoding") is not None:
            raise BadRequest(411, "Transfer-Encoding is not read, expected Content-Length")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise BadRequest(415, "compressed bodies are not read")
        lengths = self.headers.get_all("Content-Length", [])
        if len(lengths) != 1 or not re.fullmatch("[0-9]{1,12}", lengths[0].strip()):
            raise BadRequest(411, "Content-Length is missing or no number, expected that of the body")
        size, most = int(lengths[0]), self.server.limits.body_bytes
        if size > most:
            raise BadRequest(413, f"the body has {size} bytes, expected at most {most}")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise BadRequest(403, "the request comes from a page of another site")
        return size

    def _answer(self, routes: Mapping[str, Callable[[bytes], None]], passed: re.Pattern[str], body: bytes) -> None:
        self.server.deadline(self.connection, None)  # Triton and the workers have limits of their own
        path = urlsplit(self.path).path
        try:
            if path in routes:
                routes[path](body)
            elif passed.fullmatch(path):
                self._pass_on(path, body)
            else:
                raise BadRequest(404, f"there is no {self.command} {path[:100]}; docs/serving.md lists what there is")
        except BadRequest as error:
            self._error(error)

    def _page(self, _: bytes) -> None:
        self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8", {"Content-Security-Policy": _POLICY})

    def _figures(self, _: bytes) -> None:
        service = self.backend.service
        self._json(200, {**service.monitor.figures(), "server": service.state()})

    def _metrics(self, _: bytes) -> None:
        text = self.backend.service.monitor.prometheus() + fetch_metrics(self.backend.triton)
        self._send(200, text.encode(), _TEXT)

    def _ready(self, _: bytes) -> None:
        ready = not self.server.draining and self.backend.service.ready() and self.backend.triton.ready()
        self._send(200 if ready else 503, b"", "application/json")

    def _detect(self, body: bytes) -> None:
        query = self._query()
        found = self._detected(body, query)
        self._json(200, {"id": query.id, **vars(found)})

    def _compare(self, body: bytes) -> None:
        query, service = self._query(), self.backend.service
        if not self.backend.comparing.acquire(blocking=False):
            raise BadRequest(503, f"{_COMPARED_AT_ONCE} pictures wait for the float model; try again")
        try:
            found = self._detected(body, query)
            outcome = service.floats.run(found.version, Picture(body))
        finally:
            self.backend.comparing.release()
        if isinstance(outcome, Found):
            rows = outcome.bbox[(outcome.bbox[:, 0] >= 0) & (outcome.bbox[:, 1] >= query.threshold)]
            names = self._classes(found.version)
            listed = [detection(row[0], row[1], row[2:], names) for row in rows.tolist()]
            fp32: dict[str, Any] = {"milliseconds": outcome.milliseconds, "detections": listed}
        else:
            fp32 = {"missing": outcome.reason}
        self._json(200, {"id": query.id, "version": found.version, "int8": vars(found), "fp32": fp32})

    def _labels(self, body: bytes) -> None:
        try:
            found = json.loads(body)
            kept = self.backend.service.monitor.post_labels(str(found["id"]), np.array(found["objects"], np.float64))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise BadRequest(
                400, f'the body is no {{"id": ..., "objects": [[class, x1, y1, x2, y2], ...]}}: {_line(error)}'
            ) from None
        if not kept:
            raise BadRequest(404, "the answer to this id is not kept (any more)")
        self._json(200, {"labelled": True})

    def _pass_on(self, path: str, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name.lower() in _PASSED}
        if body:
            _check_depth(body, self.headers.get(HEADER_LENGTH))
        found = self._upstream.request(self.command, path, body, headers)
        known = {name.lower(): value for name, value in found.headers.items()}
        more = {HEADER_LENGTH: known[HEADER_LENGTH.lower()]} if HEADER_LENGTH.lower() in known else {}
        # Triton calls JSON that it cannot read an error of its own.
        status = 400 if found.status == 500 and _UNREADABLE in found.body else found.status
        self._send(status, found.body, known.get("content-type", "application/json"), more)

    def _detected(self, body: bytes, query: _Query) -> Any:
        content, headers = picture_request(body, query.id, query.threshold, query.version)
        found = self._upstream.request("POST", INFER_PATH, content, headers)
        if found.status != 200:
            raise BadRequest(found.status, _reason(found.body))
        made = detected(found.body, ())
        names = self._classes(made.version)
        for one in made.detections:
            one["label"] = detection(one["class"], one["score"], one["box"], names)["label"]
        return made

    def _classes(self, version: int) -> Any:
        model = self.backend.service.model(version)
        return model.classes if model is not None else ()

    def _query(self) -> _Query:
        values = dict(parse_qsl(urlsplit(self.path).query))
        unknown = sorted(set(values) - {"id", "threshold", "version"})
        if unknown:  # with `thresold=0.5` the answer would have every detection
            raise BadRequest(400, f"{unknown[0][:50]!r} is no parameter, expected id, threshold, version")
        try:
            version = int(values["version"]) if "version" in values else None
            threshold = float(values.get("threshold", 0.0))
        except ValueError:
            raise BadRequest(400, "version is a whole number, threshold a number in [0, 1]") from None
        if not 0 <= threshold <= 1:
            raise BadRequest(400, "threshold is a number in [0, 1]")
        return _Query(values.get("id", uuid.uuid4().hex)[:200], threshold, version)

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content, allow_nan=False).encode(), "application/json")

    def _error(self, error: BadRequest) -> None:
        self._json(error.status, {"error": str(error)})

    def _send(self, status: int, body: bytes, kind: str, headers: Optional[Mapping[str, str]] = None) -> None:
        self.server.deadline(self.connection, self.server.limits.seconds)
        self.send_response(status)
        common = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff"}
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection or self.server.draining:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


@dataclass(frozen=True)
class _Query:
    id: str
    threshold: float
    version: Optional[int]


def _check_depth(body: bytes, header_length: Optional[str]) -> None:
    """Check how deep the JSON of a request is nested, which is all of the body without ``header_length``."""
    length = int(header_length) if header_length and re.fullmatch("[0-9]{1,12}", header_length) else len(body)
    marks = np.frombuffer(_NO_BRACKETS.sub(b"", body[:length]), np.uint8)
    depth = np.cumsum(np.isin(marks, _OPEN).astype(np.int32) - np.isin(marks, _CLOSE).astype(np.int32))
    if len(depth) and int(depth.max()) > _MAX_DEPTH:
        raise BadRequest(400, f"the JSON is nested more than {_MAX_DEPTH} deep")


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return "Triton does not answer"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
