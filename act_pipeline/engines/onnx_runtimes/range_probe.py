"""Runs the probe of :mod:`act_pipeline.onnx_export.range_probe`, in ONNX Runtime or OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import refusals
from act_pipeline.engines.machine import Machine
from act_pipeline.engines.onnx_runtimes.onnxruntime import INEXACT_OPTIMIZERS, import_onnxruntime
from act_pipeline.engines.onnx_runtimes.openvino import import_openvino, set_batch
from act_pipeline.engines.onnx_runtimes.signal_stack import signal_stack_kept
from act_pipeline.engines.registry import find_support

PROBE_FILENAME = "ranges.onnx"
# OpenVINO takes five times as long to compile a graph with so many outputs in the middle.
_RUNTIMES = ("onnxruntime", "openvino")
_Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def probe_runtime(here: Machine | None = None) -> str | None:
    """Return the runtime that can run a probe on this machine; None: there is none."""
    return next((name for name in _RUNTIMES if find_support(name, "int8", "CPU", here).available), None)


def write_model_probe(model: InferenceModel) -> tuple[Path, tuple[str, ...]]:
    """Write the probe of an INT8 model as ``ranges.onnx``, beside its other ONNX exports.

    Returns:
        The file, and the names of the tensors.

    Raises:
        UserError: it rounds no activation, or cannot be exported.
    """
    from act_pipeline.onnx_export import lowered_onnx
    from act_pipeline.onnx_export.range_probe import write_range_probe

    source = lowered_onnx(model, "cpu").path
    path = source.with_name(PROBE_FILENAME)
    return path, write_range_probe(source, path)


class RangeProbe:
    """A loaded probe.

    Attributes:
        runtime: ``onnxruntime`` or ``openvino``.
    """

    def __init__(self, path: Path, runtime: str, threads: int) -> None:
        """Load the file.

        Args:
            path: the file.
            runtime: what :func:`probe_runtime` returned.
            threads: number of CPU threads.

        Raises:
            UserError: the runtime refuses it.
        """
        self.runtime, self._where = runtime, path
        load = {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime]
        with refusals(f"{runtime} cannot load {path}", also=(Exception,)):
            self._inputs, self._run = load(path, threads)

    def run(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the share of each tensor's elements that are beyond its range, float32 [T].

        Args:
            inputs: those of the model, and others that are left aside; one image.

        Raises:
            UserError: an input is missing, or the runtime cannot run it.
        """
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise UserError(f"{self._where} needs the input {missing[0]}")
        with refusals(f"{self.runtime} cannot run {self._where}", also=(Exception,)):
            return self._run({name: inputs[name] for name in self._inputs})


def _onnxruntime(path: Path, threads: int) -> tuple[list[str], _Run]:
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = runtime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=INEXACT_OPTIMIZERS
    )
    return [value.name for value in session.get_inputs()], lambda inputs: np.asarray(session.run(None, inputs)[0])


def _openvino(path: Path, threads: int) -> tuple[list[str], _Run]:
    core = import_openvino().Core()
    model = core.read_model(str(path))
    names = [value.get_any_name() for value in model.inputs]
    set_batch(model, 1)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    with signal_stack_kept():
        request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        request.infer(dict(inputs))
        return np.array(request.get_output_tensor(0).data)

    return names, run
