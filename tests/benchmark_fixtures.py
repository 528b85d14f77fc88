"""Engines that sleep for a known time; a separate module, because the processes of the benchmark import it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import EngineSupport
from act_pipeline.engines.machine import Machine

MACHINE = Machine(cpu="Test CPU", cores=2, avx512_vnni=True, paddle="2.6.2", paddle_onednn=True)
SLEEP_MS = {
    ("paddle", "fp32"): 24.0,
    ("paddle_onednn", "fp32"): 12.0,
    ("paddle_onednn", "int8"): 6.0,
    ("openvino", "fp32"): 8.0,
    ("openvino", "int8"): 4.0,
}
# Larger than the memory that the bare process may have freed after its own peak.
BALLAST_BYTES = {("openvino", "int8"): 155_000_000}
LOG_VARIABLE = "BENCHMARK_TEST_LOG"
FAIL_VARIABLE = "BENCHMARK_TEST_FAIL"
OBJECT = (0.25, 0.25, 0.75, 0.625)


def sleeping_support(here=None) -> list[EngineSupport]:
    """Return `support` of a machine that has these engines, and no ONNX Runtime."""
    rows = [EngineSupport(engine, precision, "CPU", True, "sleeps") for engine, precision in SLEEP_MS]
    rows.append(EngineSupport("onnxruntime", "fp32", "CPU", False, "onnxruntime is not installed", "install it"))
    rows.append(EngineSupport("tensorrt", "fp16", "GPU", False, "no NVIDIA GPU", "check `nvidia-smi`"))
    return rows


def sleeping_engine(name, model, precision, device, threads, batch_size=1, machine=None, summary=None, requests=1):
    """Replace `create_engine`: the engine detects every image's object after a delay; with 0 requests it takes 3."""
    engine = SleepingEngine(name, model, precision, device, threads, summary)
    engine.requests = requests or 3
    return engine


class SleepingEngine:
    """An engine that logs its runs to a file, and fails at a requested point: load, run, exit or score."""

    def __init__(self, name, model, precision, device, threads, summary) -> None:
        self.name, self.precision, self.device, self.threads = name, precision, device, threads
        self.artifact, self.settings = model, {"kernels": "none"}
        self.last_device_ms = SLEEP_MS[name, precision] / 2 if name == "openvino" else None
        self._label = f"{name} {precision}"
        self._fail = dict(part.split(":") for part in os.environ.get(FAIL_VARIABLE, "").split(",") if part).get(
            self._label.replace(" ", "_")
        )
        if self._fail == "load":
            raise UserError(f"{self._label} does not\nlike this model")
        self._ballast = np.ones(BALLAST_BYTES.get((name, precision), 0), np.uint8)
        self._runs = 0

    def run(self, inputs):
        start = time.perf_counter()
        self._runs += 1
        if self._fail == "run" and self._runs > 6:
            raise ZeroDivisionError("no more")
        if self._fail == "exit" and self._runs > 6:
            os.kill(os.getpid(), 9)
        original = inputs["im_shape"] / inputs["scale_factor"]
        found = [[0, 0.9, OBJECT[0] * w, OBJECT[1] * h, OBJECT[2] * w, OBJECT[3] * h] for h, w in original]
        if self._fail == "score":
            found[0][0] = 99
        print(f"{self._label} says something on stdout")
        time.sleep(max(0, SLEEP_MS[self.name, self.precision] / 1000 - (time.perf_counter() - start)))
        log = os.environ.get(LOG_VARIABLE)
        if log:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{self._label} {start} {time.perf_counter()}\n")
        return {"bbox": np.float32(found), "bbox_num": np.ones(len(found), np.int32)}

    def versions(self):
        return {"sleep": "1.0"}

    def close(self):
        pass


def fake_model(directory: Path, count: int) -> Path:
    """Write a folder that can be opened as a model but has no real content."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.pdmodel").write_bytes(b"p" * count)
    (directory / "model.pdiparams").write_bytes(b"w" * count)
    return directory


def fake_summary(model) -> SimpleNamespace:
    """Return a summary such as `inspect_model` would return."""
    batch = 2 if "fixed" in model.directory.name else -1
    return SimpleNamespace(
        quantized="int8" in model.directory.name, input_size=(32, 32), inputs={"image": (batch, 3, 32, 32)}
    )
