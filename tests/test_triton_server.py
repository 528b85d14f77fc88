"""A repository in a real Triton: the one that nvidia-pytriton has, whose only backend is Python's.

``TRITON_PYTHON`` names the interpreter of an environment with nvidia-pytriton, tritonclient[grpc], onnxruntime and
opencv-python-headless; without it these tests look for them here, and skip.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.engines import create_engine
from act_pipeline.triton import RepositoryRequest, make_repository

PYTHON = os.environ.get("TRITON_PYTHON", sys.executable)
_FIND = """\
import importlib.util, json, sys, sysconfig
import cv2, onnxruntime, tritonclient.grpc
found = importlib.util.find_spec("pytriton")
print(json.dumps([found.submodule_search_locations[0], sysconfig.get_config_var("LIBDIR"),
                  sysconfig.get_paths()["purelib"], "%d.%d" % sys.version_info[:2]]))
"""
# Stands for the ONNX Runtime backend, which nvidia-pytriton lacks; notes the sizes of its batches.
_DETECTOR = """\
import json, os
import numpy as np, onnxruntime
import triton_python_backend_utils as pb_utils
HERE = os.path.dirname(os.path.abspath(__file__))
class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.inputs, self.outputs = ([value["name"] for value in config[kind]] for kind in ("input", "output"))
        self.session = onnxruntime.InferenceSession(os.path.join(HERE, "model.onnx"))
    def execute(self, requests):
        arrays = [{n: pb_utils.get_input_tensor_by_name(r, n).as_numpy() for n in self.inputs} for r in requests]
        batch = {n: np.concatenate([each[n] for each in arrays]) for n in self.inputs}
        with open(os.path.join(HERE, "batches"), "a") as file:
            file.write("%d\\n" % len(batch["image"]))
        found, at, responses = self.session.run(self.outputs, batch), 0, []
        for each in arrays:
            end = at + len(each["image"])
            tensors = [pb_utils.Tensor(n, np.ascontiguousarray(a[at:end])) for n, a in zip(self.outputs, found)]
            responses.append(pb_utils.InferenceResponse(tensors))
            at = end
        return responses
"""
_CLIENT = """\
import json, sys, threading
import numpy as np, tritonclient.grpc as grpc
port, *files = sys.argv[1:]
client, answers, refused = grpc.InferenceServerClient("localhost:" + port), {}, []
def ask(content):
    array = np.array([[content]], dtype=object)
    picture = grpc.InferInput("picture", array.shape, "BYTES")
    picture.set_data_from_numpy(array)
    answer = client.infer("detect", [picture])
    return [answer.as_numpy(name)[0].tolist() for name in ("labels", "scores", "boxes")]
def work(first):
    for path in files[first::8]:
        answers[path] = ask(open(path, "rb").read())
        try:
            ask(b"no picture")
        except grpc.InferenceServerException as error:
            refused.append(str(error))
threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([answers, refused]))
"""


def find_server() -> list[str]:
    ended = subprocess.run([PYTHON, "-c", _FIND], capture_output=True, text=True, check=False)
    if ended.returncode:
        pytest.skip(f"no Triton: {ended.stderr.strip().splitlines()[-1]}; TRITON_PYTHON names an interpreter with one")
    return json.loads(ended.stdout)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def repository(tmp_path, demo) -> Path:
    request = RepositoryRequest(
        str(demo.compressed.model.directory), str(tmp_path / "repository"), backend="onnxruntime", max_batch=4,
        queue_delay_us=20_000, min_score=0.1,
    )  # fmt: skip
    find_server()
    folder = make_repository(request).path
    detector = folder / "detect_detector"
    (detector / "1" / "model.py").write_text(_DETECTOR)
    config = (detector / "config.pbtxt").read_text().replace('backend: "onnxruntime"', 'backend: "python"')
    (detector / "config.pbtxt").write_text(config.replace('default_model_filename: "model.onnx"\n', ""))
    return folder


@pytest.fixture
def port(repository, tmp_path) -> Iterator[int]:
    pytriton, libraries, packages, python = find_server()
    server = Path(pytriton) / "tritonserver"
    backends = Path(shutil.copytree(server / "backends", tmp_path / "backends"))
    for stub in (server / "python_backend_stubs" / python).iterdir():
        shutil.copy(stub, backends / "python")
    own = [libraries, str(Path(packages) / "nvidia_pytriton.libs"), os.environ.get("LD_LIBRARY_PATH", "")]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(own), "PYTHONPATH": packages}
    environment["PATH"] = f"{Path(PYTHON).parent}:{os.environ['PATH']}"
    grpc = free_port()
    flags = [f"--model-repository={repository}", f"--backend-directory={backends}", f"--grpc-port={grpc}"]
    flags += ["--grpc-address=127.0.0.1", "--allow-http=false", "--allow-metrics=false"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([server / "bin" / "tritonserver", *flags], stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + 120
        while "Started GRPCInferenceService" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        yield grpc
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
def test_a_real_triton_serves_the_repository_of_the_sample(repository, port, demo, tmp_path) -> None:
    batches = repository / "detect_detector" / "1" / "batches"
    assert batches.read_text().split() == ["1", "4"]  # the warm-up
    files = sorted((demo.root / "data" / "images" / "val").iterdir())[:40]
    (tmp_path / "client.py").write_text(_CLIENT)
    ended = subprocess.run(
        [PYTHON, str(tmp_path / "client.py"), str(port), *map(str, files)], capture_output=True, text=True, check=True
    )
    answers, refused = json.loads(ended.stdout)
    assert len(refused) == 40 and all("is no picture that can be read" in text for text in refused)
    sizes = [int(size) for size in batches.read_text().split()][2:]
    assert sum(sizes) == 40 and max(sizes) > 1 and len(sizes) < 30, sizes
    engine = create_engine("openvino", demo.compressed.model, "int8")
    reader, same, boxes = demo.reader(), 0, 0
    for path in files:
        rows = engine.run(reader.preprocess(path))["bbox"]
        sure = rows[rows[:, 1] >= 0.5]
        labels, scores, corners = (np.array(each) for each in answers[str(path)])
        assert len(labels) >= len(sure)
        boxes += len(sure)
        for label, score, *box in sure:  # ONNX Runtime rounds INT8 as OpenVINO does but for the last bit
            near = (labels == label) & (np.abs(corners - box).max(1) < 8) & (np.abs(scores - score) < 0.15)
            same += near.any()
    engine.close()
    assert boxes > 40 and same / boxes > 0.95
