"""A real Triton (nvidia-pytriton) with the bridge to this process: KServe over HTTP and gRPC, batches, kills, limits."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fixtures import FakeFloats, FakePool, Front, picture
from test_server import make_service

from act_pipeline.core.errors import UserError
from act_pipeline.server.items import Found, Refused
from act_pipeline.server.kserve import INFER_PATH
from act_pipeline.server.service import Answer, Request
from act_pipeline.server.settings import Batching, Limits
from act_pipeline.server.triton.bridge import Bridge
from act_pipeline.server.triton.process import TritonProcess, free_port
from act_pipeline.server.triton.tensors import model_config

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pytriton", "tritonclient", "grpc")),
    reason="nvidia-pytriton, tritonclient or grpcio is missing; install requirements/serve.txt on Python 3.10 or later",
)
SIZE = (16, 16)
LIMITS = Limits(queue=16, seconds=5.0)


class Answers:
    """Answers each request with a score that its first image states; notes the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.seconds = 0.0
        self.lock = threading.Lock()

    def __call__(self, requests: Sequence[Request]) -> list[Any]:
        with self.lock:
            self.batches.append(sum(len(request.items) for request in requests))
        time.sleep(self.seconds)
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Any:
        if request.id == "crash":
            raise RuntimeError("a bug")
        if request.id == "bad":
            return Refused("this one is wrong")
        scores = [float(item.image[0, 0, 0]) if hasattr(item, "image") else 0.25 for item in request.items]
        return Answer(3, [Found(np.array([[1, score, 0, 0, 4, 4]], np.float32), 1.0) for score in scores])


class Started:
    """Triton, its bridge, and what answers."""

    def __init__(self, folder: Path, answer: Any, batching: Batching, instances: int = 1) -> None:
        self.answer = answer
        self.bridge = Bridge(folder, answer)
        config = model_config("detector", SIZE, batching, LIMITS, instances)
        self.grpc_port = free_port("127.0.0.1")
        self.triton = TritonProcess(folder, config, self.bridge, "127.0.0.1", self.grpc_port, 5.0)

    def close(self) -> None:
        self.triton.close()
        self.bridge.close()


@pytest.fixture(scope="module")
def started() -> Iterator[Started]:
    with tempfile.TemporaryDirectory(prefix="t_") as folder:  # the path of a socket must be short
        made = Started(Path(folder), Answers(), Batching(8, (), 50_000))
        yield made
        made.close()


@pytest.fixture
def answers(started: Started) -> Answers:
    started.answer.batches.clear()
    started.answer.seconds = 0.0
    return started.answer


def client_of(started: Started, protocol: str) -> tuple[Any, Any]:
    module = importlib.import_module(f"tritonclient.{protocol}")
    port = started.triton.http_port if protocol == "http" else started.grpc_port
    return module, module.InferenceServerClient(f"127.0.0.1:{port}")


def infer(started: Started, protocol: str, score: float, **more: Any) -> Any:
    module, client = client_of(started, protocol)
    image = module.InferInput("image", [1, 3, *SIZE], "FP32")
    image.set_data_from_numpy(np.full((1, 3, *SIZE), score, np.float32))
    return client.infer("detector", [image], **more)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_tensors_and_pictures_over_both_protocols(started: Started, answers: Answers, protocol: str) -> None:
    module, client = client_of(started, protocol)
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("detector")
    found = infer(started, protocol, 0.5, request_id="a")
    assert found.as_numpy("scores").tolist() == [[0.5]] and found.as_numpy("labels").tolist() == [[1]]
    assert found.as_numpy("boxes").tolist() == [[[0, 0, 4, 4]]] and found.as_numpy("version").tolist() == [[3]]
    pictures = module.InferInput("picture", [2, 1], "BYTES")
    pictures.set_data_from_numpy(np.array([[picture()], [picture()]], object))
    assert client.infer("detector", [pictures]).as_numpy("scores").tolist() == [[0.25], [0.25]]
    with pytest.raises(module.InferenceServerException if hasattr(module, "InferenceServerException") else Exception):
        wrong = module.InferInput("image", [1, 3, 8, 8], "FP32")
        wrong.set_data_from_numpy(np.zeros((1, 3, 8, 8), np.float32))
        client.infer("detector", [wrong])


def test_concurrent_requests_share_batches_and_a_wrong_one_fails_alone(started: Started, answers: Answers) -> None:
    found: dict[str, Any] = {}

    def work(name: str) -> None:
        try:
            found[name] = infer(started, "grpc" if name > "m" else "http", 0.125, request_id=name).as_numpy("scores")
        except Exception as error:
            found[name] = str(error)

    names = ["bad", *(f"{letter}{number}" for letter in "az" for number in range(7))]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "this one is wrong" in found.pop("bad")
    assert all(np.array_equal(scores, [[0.125]]) for scores in found.values()), found
    assert sum(answers.batches) == 15 and max(answers.batches) > 1 and len(answers.batches) < 10, answers.batches


def test_a_bug_of_ours_is_an_error_and_the_next_request_is_answered(started: Started, answers: Answers) -> None:
    with pytest.raises(Exception, match="internal error: RuntimeError"):
        infer(started, "grpc", 0.5, request_id="crash")
    assert infer(started, "grpc", 0.5).as_numpy("scores").tolist() == [[0.5]]


def test_a_full_queue_refuses_at_once(started: Started, answers: Answers) -> None:
    answers.seconds = 0.3
    results: list[str] = []

    def work() -> None:
        try:
            infer(started, "grpc", 0.5)
            results.append("ok")
        except Exception as error:
            results.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if "queue size" in result]
    assert refused and len(results) == 60 and len(refused) + results.count("ok") == 60, set(results)


def test_no_request_reaches_files_or_memory(started: Started) -> None:
    _, client = client_of(started, "grpc")
    for call in (
        lambda: client.update_log_settings({"log_file": "/tmp/x"}),
        lambda: client.register_system_shared_memory("x", "/x", 8),
        lambda: client.update_trace_settings("detector", {"trace_file": "/tmp/x"}),
        lambda: client.load_model("other"),
    ):
        with pytest.raises(Exception, match="restricted"):
            call()


def test_metrics_count_batches(started: Started, answers: Answers) -> None:
    from act_pipeline.server.http.upstream import fetch_metrics

    infer(started, "http", 0.5)
    assert 'nv_inference_count{model="detector",version="1"}' in fetch_metrics(started.triton)


def test_a_killed_triton_comes_back_and_leaves_nothing(started: Started, answers: Answers, tmp_path: Path) -> None:
    service: Any = type("Service", (), {"floats": FakeFloats(), "model": staticmethod(lambda _: None)})()
    front = Front(service, started.triton, LIMITS)
    found: list[int] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            found.append(front.request("POST", "/detect", picture())[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    triton = started.triton.pid
    assert triton is not None
    stubs = children(triton)
    os.kill(stubs[0], signal.SIGKILL)  # the process of an instance: Triton starts another
    time.sleep(2.5)
    stubs = children(triton)
    assert stubs
    answers.seconds = 1.0  # it is in a batch when Triton is killed
    time.sleep(1.0)
    before = len(found)
    os.kill(triton, signal.SIGKILL)
    answers.seconds = 0.0
    end = time.monotonic() + 20
    while len(found) < before + 20 and time.monotonic() < end:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join()
    front.close()
    assert set(found) == {200} and len(found) >= before + 20
    assert started.triton.restarts == 1
    assert not [pid for pid in stubs if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]


def test_triton_comes_back_when_all_processes_of_its_model_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_pipeline.server.triton.process._ALONE_CHECKS", 2)
    service: Any = type("Service", (), {"floats": FakeFloats(), "model": staticmethod(lambda _: None)})()
    with tempfile.TemporaryDirectory(prefix="t_") as folder:
        made = Started(Path(folder), Answers(), Batching(1), 2)
        front = Front(service, made.triton, LIMITS)
        assert made.triton.pid is not None
        for stub in children(made.triton.pid):
            os.kill(stub, signal.SIGKILL)
        assert front.request("POST", "/detect", picture())[0] == 200
        assert made.triton.restarts == 1
        front.close()
        made.close()


@pytest.mark.slow
def test_a_pause_of_all_processes_changes_nothing() -> None:
    """As `docker pause` does."""
    with tempfile.TemporaryDirectory(prefix="t_") as folder:
        made = Started(Path(folder), Answers(), Batching(1), 2)
        triton = made.triton.pid
        assert triton is not None
        stubs = children(triton)
        for signum in (signal.SIGSTOP, signal.SIGCONT):
            for pid in (triton, *stubs):
                os.kill(pid, signum)
            time.sleep(10.0 if signum == signal.SIGSTOP else 1.0)
        infer(made, "http", 0.5)
        assert made.triton.restarts == 0 and children(triton) == stubs and "Z" not in map(state_of, stubs)
        made.close()


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except (OSError, ValueError):
            continue
    return found


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.mark.parametrize(
    "body", [b"[" * 3_000_000, b'{"inputs":' * 100_000, b'{"inputs":[{"name":"picture"}]}', b"\x00"]
)
def test_bodies_that_the_http_port_keeps_from_triton(started: Started, answers: Answers, body: bytes) -> None:
    service: Any = type("Service", (), {"floats": FakeFloats(), "model": staticmethod(lambda _: None)})()
    front = Front(service, started.triton, LIMITS)
    restarts = started.triton.restarts
    assert front.request("POST", INFER_PATH, body)[0] == 400
    assert front.request("POST", "/detect", picture())[0] == 200 and started.triton.restarts == restarts
    front.close()


def test_a_port_of_grpc_that_is_in_use_is_one_line(started: Started) -> None:
    with tempfile.TemporaryDirectory(prefix="t_") as folder:
        bridge = Bridge(Path(folder), Answers())
        config = model_config("detector", SIZE, Batching(), LIMITS, 1)
        with pytest.raises(UserError, match="Triton does not start: "):
            TritonProcess(Path(folder), config, bridge, "127.0.0.1", started.grpc_port, 1.0)
        bridge.close()


def test_nothing_is_left_of_a_server_that_is_killed(tmp_path: Path) -> None:
    """Triton and the processes of its instances end with the process that started them."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import tempfile\nfrom pathlib import Path\nfrom test_server_triton import Answers, Batching, Started\n"
        "made = Started(Path(tempfile.mkdtemp(prefix='t_')), Answers(), Batching())\n"
        "import threading\nfrom test_server_triton import infer\nmade.answer.seconds = 60.0\n"
        "threading.Thread(target=infer, args=(made, 'grpc', 0.5), daemon=True).start()\ntime.sleep(1)\n"
        "print(made.triton.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        triton = int(process.stdout.readline())
        stubs = children(triton)
        assert stubs
        process.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(state_of(pid) != "Z" for pid in (triton, *stubs)):
        time.sleep(0.1)
    assert all(state_of(pid) == "Z" for pid in (triton, *stubs))


def test_a_service_behind_triton_routes_by_the_id_of_the_request(tmp_path: Path) -> None:
    service, pool, _ = make_service(tmp_path, 1, 2)
    assert isinstance(pool, FakePool)
    with tempfile.TemporaryDirectory(prefix="t_") as folder:
        made = Started(Path(folder), service.answer, Batching(4, (), 1000), 2)
        names = [f"r{number}" for number in range(20)]
        versions = [int(infer(made, "grpc", 0.5, request_id=name).as_numpy("version")[0, 0]) for name in names]
        assert versions == [service.monitor.route(name) for name in names] and set(versions) == {1, 2}
        asked = infer(made, "http", 0.5, parameters={"version": 2}).as_numpy("version")
        assert asked.tolist() == [[2]]
        made.close()
    assert json.dumps(service.state())
    service.close()
