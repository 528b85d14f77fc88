"""The HTTP port: what a browser and clients of KServe get, and clients that hang, send half, or send garbage."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fixtures import FakeTriton, Front, picture
from test_server import make_service

from act_pipeline.cli.main import main
from act_pipeline.core.errors import run_command
from act_pipeline.server.http.handler import BadRequest, _check_depth
from act_pipeline.server.http.listener import LimitedServer
from act_pipeline.server.http.upstream import Upstream
from act_pipeline.server.settings import Limits

LIMITS = Limits(body_bytes=100_000, picture_bytes=50_000, seconds=1.0, connections=8)
PATH = "/v2/models/detector/infer"
LINE = b"POST /detect HTTP/1.1\r\nHost: x\r\n"


class Running:
    """A front, its service, its pool and its Triton."""

    def __init__(self, folder: Path) -> None:
        self.service, self.pool, self.repository = make_service(folder, 1, 2)
        self.triton = FakeTriton(self.service)
        self.front = Front(self.service, self.triton, LIMITS)

    def close(self) -> None:
        self.front.close()
        self.triton.close()
        self.service.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("http"))
    yield made
    made.close()


@pytest.fixture
def front(running: Running) -> Front:
    running.triton.fail.clear()
    running.pool.seconds = 0.0
    return running.front


def detect(front: Front, query: str = "") -> tuple[int, Any]:
    status, body = front.request("POST", f"/detect{query}", picture())
    return status, json.loads(body)


def test_a_picture_gets_boxes_and_its_labels_a_map(running: Running, front: Front) -> None:
    status, found = detect(front, "?id=r1&threshold=0.1")
    assert status == 200 and found["id"] == "r1" and found["version"] in (1, 2)
    (one,) = found["detections"]
    assert (
        one["label"] == "thing" and one["box"] == [1, 2, 9, 10] and one["score"] == pytest.approx(found["version"] / 10)
    )
    body = json.dumps({"id": "r1", "objects": [[0, 1, 2, 9, 10]]}).encode()
    assert front.request("POST", "/labels", body)[0] == 200
    running.service.monitor.check()  # the mAP is computed with the rules, not in a request
    figures = json.loads(front.request("GET", "/figures")[1])
    assert figures["versions"][str(found["version"])]["window"]["map"] == pytest.approx(1.0)
    assert figures["server"]["loaded"]["1"]["engine"] == "openvino"
    assert front.request("POST", "/labels", body)[0] == 404
    for wrong in (b"", b"{}", b'{"id": 1, "objects": "x"}', b'{"id": 1, "objects": [[1, 2]]}', b"[" * 50_000):
        assert front.request("POST", "/labels", wrong)[0] == 400


def test_both_models_side_by_side(front: Front) -> None:
    seen = {}
    for number in range(30):
        found = json.loads(front.request("POST", f"/compare?id=c{number}", picture())[1])
        seen[found["version"]] = found
    assert seen[1]["fp32"]["detections"][0]["score"] == pytest.approx(0.11) and seen[1]["fp32"]["milliseconds"] == 4.5
    assert seen[1]["int8"]["detections"][0]["score"] == pytest.approx(0.1)
    assert "no float model" in seen[2]["fp32"]["missing"]


def test_the_page_loads_nothing_from_elsewhere(front: Front) -> None:
    status, body = front.request("GET", "/")
    text = body.decode()
    assert status == 200 and "<canvas" in text
    for foreign in ("http://", "https://", "//cdn", "src=", "@import", "url("):
        assert foreign not in text


def test_metrics_and_health(running: Running, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    assert b"act_pipeline_requests_total" in front.request("GET", "/metrics")[1]
    assert front.request("GET", "/v2/health/ready")[0] == 200 and front.request("GET", "/v2/health/live")[0] == 200
    monkeypatch.setattr(running.service, "ready", lambda: False)
    assert front.request("GET", "/v2/health/ready")[0] == 503


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/detect", b"garbage", {}, 400),
        ("POST", "/detect?threshold=2", b"x", {}, 400),
        ("POST", "/detect?thresold=0.5", picture(), {}, 400),
        ("POST", "/detect?version=x", b"x", {}, 400),
        ("POST", "/detect?version=9", picture(), {}, 400),
        ("POST", PATH, b"[" * 1000, {}, 400),
        ("POST", PATH, b"x" * 100_001, {}, 413),
        ("POST", "/detect", b"x", {"Transfer-Encoding": "chunked"}, 411),
        ("POST", PATH, b"x", {"Content-Encoding": "gzip"}, 415),
        ("POST", "/labels", b"{}", {"Origin": "http://evil.example"}, 403),
        ("GET", "/../../etc/passwd", None, {}, 404),
        ("GET", "/v2/models/detector/versions/2", None, {}, 404),
        ("POST", "/v2/repository/index", b"{}", {}, 404),
        ("POST", "/v2/systemsharedmemory/region/x/register", b"{}", {}, 404),
        ("POST", "/v2/logging", b'{"log_file": "/tmp/x"}', {}, 404),
        ("DELETE", "/", None, {}, 501),
    ],
)  # fmt: skip
def test_what_is_refused(
    front: Front, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int
) -> None:
    found, content = front.request(method, path, body, headers)
    assert found == status and "\n" not in json.loads(content)["error"]
    assert detect(front)[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\xfe garbage\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET /\r\n\r\n",
        LINE + b"\r\n",
        LINE + b"Content-Length: -1\r\n\r\n",
        LINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        LINE + b"Content-Length: 99999999999999\r\n\r\n",
        LINE + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
        LINE + b"".join(b"H%d: x\r\n" % number for number in range(200)) + b"\r\n",
        b"GET / " + b"x" * 70_000,
    ],
)
def test_garbage_gets_an_error_and_hurts_no_other(front: Front, data: bytes) -> None:
    assert front.raw(data).startswith((b"HTTP/1.1 4", b"HTTP/1.1 505"))
    assert detect(front)[0] == 200


def test_clients_that_hang_are_cut_and_hold_up_nobody(front: Front) -> None:
    half = LINE + b"Content-Length: 1000\r\n\r\nhalf"
    clients = [socket.create_connection(("127.0.0.1", front.port)) for _ in range(6)]
    for place, client in enumerate(clients):
        client.sendall([b"", LINE, half][place % 3])
    began = time.monotonic()
    assert detect(front)[0] == 200 and time.monotonic() - began < 0.9
    for client in clients:
        client.settimeout(5)
        while client.recv(4096):
            """An error may come before the end."""
        client.close()
    assert time.monotonic() - began < 4.5


def test_a_byte_at_a_time_is_cut_too(front: Front) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", front.port)) as client, pytest.raises(OSError):
        while time.monotonic() - began < 10:
            client.sendall(b"G")
            time.sleep(0.1)
            client.setblocking(False)
            try:
                if client.recv(10) == b"":
                    raise ConnectionError
            except BlockingIOError:
                pass
            client.setblocking(True)
    assert time.monotonic() - began < 4


def test_too_many_connections_are_told(front: Front) -> None:
    clients = [socket.create_connection(("127.0.0.1", front.port)) for _ in range(LIMITS.connections)]
    time.sleep(0.2)
    assert b" 503 " in front.raw(b"")[:40]
    for client in clients:
        client.close()
    end = time.monotonic() + 5
    while detect_or_none(front) != 200 and time.monotonic() < end:
        time.sleep(0.05)
    assert detect(front)[0] == 200


def detect_or_none(front: Front) -> int | None:
    try:
        return detect(front)[0]
    except (OSError, ValueError):
        return None


def test_bodies_of_all_clients_have_a_limit(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler

    server = LimitedServer(("127.0.0.1", 0), BaseHTTPRequestHandler, LIMITS)
    half = LIMITS.buffered_bytes // 2
    with server.room(half) as one, server.room(half) as other, server.room(1) as third:
        assert one and other and not third
    with server.room(1) as again:
        assert again
    server.server_close()


@pytest.mark.parametrize(
    "failure", ["close", (500, b'{"error":"Stub process \'detector_0_0\' is not healthy."}')], ids=["ended", "stub"]
)
def test_a_request_is_sent_again_when_triton_ended_meanwhile(running: Running, front: Front, failure: Any) -> None:
    running.triton.fail[:] = [failure, failure]
    seen = len(running.triton.seen)
    assert detect(front)[0] == 200 and len(running.triton.seen) == seen + 3


def test_without_triton_the_answer_comes_in_time(front: Front) -> None:
    class Gone:
        http_port = metrics_port = 1

        def ready(self) -> bool:
            return False

    began = time.monotonic()
    assert Upstream(Gone(), 0.5).request("GET", "/v2").status == 503
    assert 0.4 < time.monotonic() - began < 3


def test_the_end_waits_for_the_requests_that_have_arrived(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.pool.seconds = 0.8
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(detect(running.front)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert running.front.http.drain(10) and time.monotonic() - began > 0.3
    for thread in threads:
        thread.join()
    assert found == [200] * 4
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.front.port), 1)
    running.triton.close()
    running.service.close()


def test_nested_json_is_counted_as_a_parser_sees_it() -> None:
    deep = b'{"inputs":' * 20
    for body in (deep, b'{"a":"]]]]]]]]]]]]]]]]]]]]]]]","b":' + b"[" * 20, b'["]",' * 20, b'["\\"]",' * 20):
        with pytest.raises(BadRequest):
            _check_depth(body, None)
    for body in (b'{"a":"' + b"[" * 99 + b'"}', b"[],[]," * 99, b'{"a":[{"b":[[1]]}]}', b""):
        _check_depth(body, None)
    _check_depth(b"{}" + deep, "2")


@given(
    body=st.binary(max_size=300)
    | st.recursive(
        st.none() | st.text() | st.floats() | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda found: json.dumps(found).encode())
    | st.binary(max_size=100).map(lambda tail: picture()[:50] + tail),
    path=st.sampled_from(["/detect", "/compare", "/labels", PATH, PATH + "?x", "/v2/models/detector/versions/1/infer"]),
    length=st.none()
    | st.integers(-1, 400).map(str)
    | st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=5),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_body_gets_an_answer_of_one_line(front: Front, body: bytes, path: str, length: str | None) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    status, content = front.request("POST", path, body, headers)
    assert status in (200, 400, 404), (status, content)
    if status != 200:
        assert "\n" not in json.loads(content)["error"]


def serve(*flags: str) -> tuple[int, list[str]]:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run_command(main, ["serve", *flags])
    return code, said.getvalue().splitlines()


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_pipeline.server.run.find_triton", lambda: None)


def test_what_the_user_can_mend_is_one_line(
    running: Running, front: Front, with_triton: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(running.repository.folder)
    (tmp_path / "empty").mkdir()
    cases = [
        (["--repository", str(tmp_path / "none")], "is no repository"),
        (["--repository", str(tmp_path / "empty")], "is no repository"),
        (
            ["--repository", folder, "--port", str(front.port)],
            f"--port={front.port} on 127.0.0.1 cannot be listened on",
        ),
        (["--repository", folder, "--port", "0", "--grpc_port", str(front.port)], "--grpc_port="),
        (["--repository", folder, "--host", "203.0.113.1"], "cannot be listened on"),
        (["--repository", folder, "--port", "70000"], "expected a port"),
        (["--repository", folder, "--port", "0"], "--grpc_port must be given"),
        (["--repository", folder, "--preferred_batch_size", "16"], "--preferred_batch_size has 16"),
        (["--repository", folder, "--preferred_batch_size", "a"], "expected batch sizes"),
        (["--repository", folder, "--rules", str(tmp_path / "no.yml")], "no.yml"),
    ]
    for flags, words in cases:
        code, lines = serve(*flags)
        assert code == 2 and len(lines) == 1 and words in lines[0] and lines[0].startswith("error: "), (flags, lines)


def test_a_live_version_that_does_not_exist_is_one_line(tmp_path: Path, with_triton: None) -> None:
    from serving_fixtures import make_model

    from act_pipeline.serving import Repository, promote

    repository = Repository.open(tmp_path / "repository", create=True)
    code, lines = serve("--repository", str(repository.folder), "--port", "0", "--grpc_port", "0")
    assert code == 2 and "has no version that is live" in lines[-1] and len(lines) == 2
    promote(repository, make_model(tmp_path / "model"))
    (repository.folder / "versions" / "1").rename(repository.folder / "versions" / "7")
    code, lines = serve("--repository", str(repository.folder), "--port", "0", "--grpc_port", "0")
    assert code == 2 and lines[-1].endswith("has no version 1; there are: 7") and len(lines) == 2


def test_a_missing_triton_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "pytriton" else find(name, *more)
    )
    code, lines = serve("--repository", str(tmp_path))
    assert code == 2 and lines == [
        'error: Triton is missing (package nvidia-pytriton); install it: pip install "act_pipeline[serve]", or -r '
        "requirements/serve.txt"
    ]


def test_answers_have_no_nan(front: Front, running: Running) -> None:
    """JSON has none, and a browser would refuse all the figures."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    json.loads(front.request("GET", "/figures")[1], parse_constant=refuse)
    assert np.isfinite(detect(front)[1]["milliseconds"])


@pytest.mark.slow
def test_ten_thousand_garbage_requests_hurt_no_other(running: Running) -> None:
    front = Front(running.service, running.triton, Limits(seconds=1.0, connections=64))
    garbage = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET / HTTP/1.1\r\n",
        LINE + b"Content-Length: 5000\r\n\r\nhalf",
        LINE + b"Content-Length: 4\r\n\r\nabcd",
        b"POST " + PATH.encode() + b" HTTP/1.1\r\nContent-Length: 9\r\n\r\n[[[[[[[[[",
        b"",
    ]
    stop = threading.Event()
    sent: list[int] = []

    def attack(number: int) -> None:
        for place in range(2500):
            try:
                with socket.create_connection(("127.0.0.1", front.port), 5) as client:
                    client.sendall(garbage[(place + number) % len(garbage)])
                sent.append(place)
            except OSError:
                continue

    taken: list[float] = []
    found: list[int | None] = []

    def work() -> None:
        while not stop.is_set():
            began = time.monotonic()
            found.append(detect_or_none(front))
            taken.append(time.monotonic() - began)

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(4)]
    good = threading.Thread(target=work)
    for thread in (*attackers, good):
        thread.start()
    for thread in attackers:
        thread.join()
    stop.set()
    good.join()
    assert len(sent) > 9_900
    assert set(found) == {200} and max(taken) < 2.0
    assert len(threading.enumerate()) < 40
    front.close()
