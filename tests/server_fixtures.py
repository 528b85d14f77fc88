"""A detector of one op in a real engine, a service without processes, and clients that speak HTTP by hand."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import OnnxModel
from act_pipeline.engines import Machine
from act_pipeline.server.http.handler import Handler, make_backend
from act_pipeline.server.http.listener import LimitedServer
from act_pipeline.server.items import Found, Item, Outcome, Picture, Prepared, Refused
from act_pipeline.server.model import ServedModel
from act_pipeline.server.settings import Limits
from act_pipeline.serving import RangeShares

SIDE = 32
STEPS = [
    {"type": "Resize", "target_size": [SIDE, SIDE], "keep_ratio": False, "interp": 2},
    {"type": "NormalizeImage", "mean": [0, 0, 0], "std": [1, 1, 1], "norm_type": "none"},
    {"type": "Permute"},
]
HERE = Machine(cpu="a CPU", cores=2, avx512_vnni=False, packages={"openvino": "1", "onnx": "1"})


def tiny_detector(path: Path, batch: int | None = None) -> OnnxModel:
    """Write an ONNX file that finds one object in each picture, whose score is the mean of the picture.

    Args:
        path: the file.
        batch: its batch; None: any.
    """
    import onnx
    from onnx import TensorProto, helper

    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    half = helper.make_tensor("box", TensorProto.FLOAT, [1, 5], [0.0, 1.0, 2.0, 9.0, 10.0])
    order = helper.make_tensor("order", TensorProto.INT64, [6], [0, 5, 1, 2, 3, 4])
    zero = helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])
    last = helper.make_tensor("last", TensorProto.INT64, [1], [1])
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["score"]),
        helper.make_node("Mul", ["score", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "box"], ["rest"]),
        helper.make_node("Concat", ["rest", "score"], ["row"], axis=1),
        helper.make_node("Gather", ["row", "order"], ["bbox"], axis=1),
        helper.make_node("Add", ["nothing_1", "one"], ["count"]),
        helper.make_node("Cast", ["count"], ["bbox_num"], to=TensorProto.INT32),
    ]
    nodes.insert(6, helper.make_node("ReduceSum", ["nothing", "last"], ["nothing_1"], keepdims=0))
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    size: Any = "N" if batch is None else batch
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [size, 3, SIDE, SIDE])],
        [
            helper.make_tensor_value_info("bbox", TensorProto.FLOAT, [size, 6]),
            helper.make_tensor_value_info("bbox_num", TensorProto.INT32, [size]),
        ],
        [axes, half, order, zero, last, one],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, str(path))
    return OnnxModel(path)


def served(path: Path, batch: int | None = None) -> ServedModel:
    """Return the tiny detector for a worker."""
    return ServedModel(
        tiny_detector(path, batch), "openvino", "fp32", "CPU", "a test", HERE, (SIDE, SIDE), STEPS, ("thing",),
        fixed_batch=batch,
    )  # fmt: skip


def picture(value: int = 128, size: tuple[int, int] = (40, 60), kind: str = "PNG") -> bytes:
    """Return a picture of one grey, height x width pixels."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, kind)
    return file.getvalue()


class FakePool:
    """Models without processes: a version finds one object whose score is its number / 10, or what is given."""

    def __init__(self, *versions: int) -> None:
        self.models = {version: HERE_MODEL for version in versions}
        self.broken: set[int] = set()
        self.runs: list[tuple[int, int]] = []
        self.restarts, self.pids, self.seconds = 0, [1], 0.0
        self.score: float | None = None
        self.box = [1, 2, 9, 10]

    def ready(self, number: int) -> bool:
        return number in self.models

    def load(self, number: int, model: Any) -> None:
        self.models[number] = model

    def unload(self, number: int) -> None:
        self.models.pop(number, None)

    def run(self, number: int, items: Sequence[Item]) -> list[Outcome]:
        self.runs.append((number, len(items)))
        time.sleep(self.seconds)
        if number in self.broken:
            return [Refused("it does not run", by_client=False)] * len(items)
        return [self._one(number, item) for item in items]

    def close(self) -> None:
        self.models.clear()

    def _one(self, number: int, item: Item) -> Outcome:
        if isinstance(item, Picture) and not item.data.startswith((b"\x89PNG", b"\xff\xd8")):
            return Refused(f"{len(item.data)} bytes are no picture")
        return Found(np.array([[0, self.score or number / 10, *self.box]], np.float32), 1.5)


class FakeFloats:
    """Float models: the same objects with other scores."""

    def __init__(self, *versions: int) -> None:
        self.versions = versions
        self.score: float | None = None

    def has(self, version: int) -> bool:
        return version in self.versions

    def run(self, version: int, item: Item) -> Outcome:
        if version not in self.versions:
            return Refused(f"version {version} has no float model here", by_client=False)
        return Found(np.array([[0, self.score or version / 10 + 0.01, 1, 2, 9, 10]], np.float32), 4.5)

    def ranges(self, version: int, item: Item) -> RangeShares | str:
        if version not in self.versions:
            return "a test"
        return RangeShares(("x", "y"), np.array([0.25, 0.5]), "onnxruntime")

    def close(self) -> None:
        """Nothing is to be closed."""


HERE_MODEL = ServedModel(
    OnnxModel(Path("x.onnx")), "openvino", "int8", "CPU", "a test", HERE, (SIDE, SIDE), STEPS, ("thing",)
)


class FakeTriton:
    """An HTTP server in the place of Triton, which passes pictures to a service."""

    def __init__(self, service: Any) -> None:
        outer = self
        self.fail: list[Any] = []  # statuses to answer with, or "close"
        self.seen: list[tuple[str, int]] = []
        self.metrics_port = 1

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._send(200, b"{}")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, len(body)))
                if outer.fail:
                    what = outer.fail.pop(0)
                    if what == "close":
                        self.close_connection = True
                        return
                    self._send(*what)
                    return
                self._send(*outer.answer(service, self.headers, body))

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self._server.daemon_threads = True
        self.http_port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, service: Any, headers: Any, body: bytes) -> tuple[int, bytes]:
        from act_pipeline.server.service import Request

        try:
            length = int(headers.get("Inference-Header-Content-Length", len(body)))
            content = json.loads(body[:length])
            assert content["inputs"][0]["name"] == "picture"
        except Exception:
            return 400, b'{"error":"no request of KServe"}'
        version = content.get("parameters", {}).get("version")
        (found,) = service.answer([Request(content.get("id", "x"), [Picture(body[length + 4 :])], version)])
        if isinstance(found, Refused):
            return (400 if found.by_client else 503), json.dumps({"error": found.reason}).encode()
        row = found.found[0].bbox[0].tolist()
        outputs = {
            "boxes": row[2:],
            "scores": [row[1]],
            "labels": [row[0]],
            "version": [found.version],
            "milliseconds": [1.5],
        }
        return 200, json.dumps({"outputs": [{"name": name, "data": data} for name, data in outputs.items()]}).encode()

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Front:
    """The HTTP port in front of a service and something in the place of Triton."""

    def __init__(self, service: Any, triton: Any, limits: Limits, handler: type[Handler] = Handler) -> None:
        bound = type("Bound", (handler,), {"backend": make_backend(service, triton)})
        self.http = LimitedServer(("127.0.0.1", 0), bound, limits)
        self.http.begin()
        self.port = self.http.server_port

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body of a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, headers or {})
        found = connection.getresponse()
        content = found.read()
        connection.close()
        return found.status, content

    def raw(self, data: bytes, seconds: float = 10.0) -> bytes:
        """Send bytes, and return what comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as client:
            client.sendall(data)
            found = b""
            while True:
                try:
                    part = client.recv(65536)
                except (ConnectionError, socket.timeout):
                    return found
                if not part:
                    return found
                found += part

    def close(self) -> None:
        self.http.drain(1.0)


def prepared(value: float = 0.5) -> Prepared:
    """Return an image as the tiny detector takes it."""
    return Prepared(np.full((3, SIDE, SIDE), value, np.float32))
