"""OpenVINO on the CPU, with INT8 kernels for convolutions and matmuls."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import Artifact, OnnxModel, described_by, location
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.openvino_telemetry import without_openvino_telemetry
from act_pipeline.core.package_versions import versions as package_versions
from act_pipeline.engines.arrays import InputCheck
from act_pipeline.engines.interface import AUTO_REQUESTS, refusals
from act_pipeline.engines.onnx_runtimes.onnx_files import (
    OnnxSummary,
    decoder_of_file,
    onnx_artifact,
    require_qdq_format,
)
from act_pipeline.engines.onnx_runtimes.signal_stack import signal_stack_kept
from act_pipeline.families.registry import Decoder

FLOAT_PRECISIONS = ("auto", "f32", "bf16")
# Key of infer_cfg.yml: the precision of what is not INT8 (written by `act_pipeline.search`).
FLOAT_PRECISION_KEY = "float_precision"
_PACKAGE = 'pip install "act_pipeline[openvino]", or -r requirements/openvino.txt'


class OpenVINOEngine:
    """A model compiled by OpenVINO's CPU plugin, as an :class:`act_pipeline.engines.interface.Engine`.

    Each batch size is compiled on first use, as a fixed size, which runs about 8% faster than a dynamic one. The size
    is set on the inputs (:func:`set_batch`) and not by ``Model.reshape``, which runs passes after which half of the
    convolutions no longer compute in INT8 (OpenVINO 2026.4). Q/DQ pairs are replaced with FakeQuantize, see
    :mod:`act_pipeline.engines.onnx_runtimes.openvino_quantization`.

    For some INT8 graphs written by other tools, compilation fails with a fixed batch and succeeds with a dynamic one
    (2026.4: ``MatMulTransformation``). These are compiled once, with a dynamic batch.

    For one request at a time all threads compute the same batch. For several, OpenVINO is given its hint
    ``THROUGHPUT`` and the number of requests, and divides the threads into streams, each of which computes another
    batch.

    Attributes:
        float_precision: ``f32`` or ``bf16``, the precision of what is not INT8.
        requests: from how many threads ``run`` may be called at the same time.
        streams: how many batches OpenVINO computes at the same time.
    """

    name = "openvino"

    def __init__(
        self,
        model: Artifact,
        precision: str = "fp32",
        device: str = "CPU",
        threads: int | None = None,
        *,
        batch_size: int = 1,
        requests: int = 1,
        float_precision: str = "auto",
        summary: OnnxSummary | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Export the model to ONNX if it is a folder, and compile it for ``batch_size``.

        Args:
            model: float for ``fp32`` and ``bf16``, with Q/DQ for ``int8``; a folder, or an ONNX file written with
                ``--target cpu``.
            precision: ``fp32``, ``bf16`` or ``int8``.
            device: ``CPU``.
            threads: number of CPU threads; None: all CPUs that this process may use.
            batch_size: the largest batch.
            requests: from how many threads ``run`` may be called at the same time; 0 (``AUTO_REQUESTS``): OpenVINO's
                ``OPTIMAL_NUMBER_OF_INFER_REQUESTS`` for the hint ``THROUGHPUT``.
            float_precision: for ``int8``, the precision of what is not INT8: ``f32``, ``bf16``, or ``auto``: as
                ``float_precision`` of the model's ``infer_cfg.yml`` says, if this CPU computes in bf16; otherwise f32.
                With bf16, R18 is 4% faster, but coordinates are rounded to 8 bits: the sample loses 0.004 mAP (480
                images), and the mean IoU with Paddle's boxes is 0.975 instead of 0.988.
            summary: for an artifact that is not ONNX (OpenVINO's ``.xml``) and is loaded unchanged: its summary.
            decoder: turns its outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the package is missing, the file is damaged or in the Q/DQ format of another runtime, or OpenVINO
                cannot load or compile it.
        """
        self.precision, self.device = precision, device
        self.threads = threads or available_cpus()
        openvino = import_openvino()
        core = openvino.Core()
        self.float_precision = _float_precision(precision, float_precision, model, core)
        if summary is None or not isinstance(model, OnnxModel):
            artifact, summary = onnx_artifact(model)
        else:
            artifact = model
        self.artifact: Artifact = artifact
        require_qdq_format(artifact, summary, "cpu", "on which OpenVINO loses 0.05 mAP")
        self._where = location(model)
        self._check = InputCheck(self._where, summary.inputs, batch_size, summary.input_dtypes)
        self._decode = decoder_of_file(model, summary, decoder)
        self._outputs = summary.outputs
        self._openvino, self._core = openvino, core
        self._batched = {name for name, shape in summary.inputs.items() if shape and shape[0] == -1}
        self._pools: dict[int, SimpleQueue[Any]] = {}
        self._open_pool: SimpleQueue[Any] | None = None
        self._lock = threading.Lock()
        self._batch = "fixed"
        self._throughput = requests != 1
        self.requests, self.streams = requests, 1
        with refusals(f"OpenVINO cannot load {self._where}"):
            self._model = core.read_model(str(artifact.path))
        if summary.rounded_to is not None and summary.per_tensor:
            from act_pipeline.engines.onnx_runtimes.openvino_quantization import replace_qdq_with_fake_quantize

            replace_qdq_with_fake_quantize(self._model)
        self._pool(batch_size if self._batched else 1)

    @property
    def settings(self) -> dict[str, str]:
        """Settings other than precision and device that affect results, for the records."""
        settings = {"float_precision": self.float_precision, "batch": self._batch}
        if self._throughput:
            settings.update(hint="THROUGHPUT", requests=str(self.requests), streams=str(self.streams))
        return settings

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        checked = self._check(inputs)
        pool = self._pool(next((len(checked[name]) for name in sorted(self._batched)), 1))
        request = pool.get()
        try:
            with refusals(f"OpenVINO cannot run {self._where}"):
                request.infer(checked, share_inputs=True)
            arrays = {name: request.get_output_tensor(index).data.copy() for index, name in enumerate(self._outputs)}
        finally:
            pool.put(request)
        return self._decode(arrays, inputs)

    def close(self) -> None:
        """Free the compiled models."""
        self._pools, self._open_pool, self._model, self._core = {}, None, None, None

    def versions(self) -> dict[str, str]:
        """Return the versions of OpenVINO and of the packages that exported the model, by name."""
        return {**package_versions(), "openvino": self._openvino.__version__}

    def _pool(self, batch: int) -> SimpleQueue[Any]:
        """Return the free inference requests for a batch size; compile the model for it on first use."""
        with self._lock:
            if self._open_pool is not None:
                return self._open_pool
            if batch not in self._pools:
                try:
                    self._pools[batch] = self._compile(self._with_batch(batch))
                except RuntimeError:
                    with refusals(f"OpenVINO cannot compile {self._where}"):
                        self._open_pool, self._batch = self._compile(self._model), "open"
                    return self._open_pool
            return self._pools[batch]

    def _with_batch(self, batch: int) -> Any:
        model = self._model.clone()
        set_batch(model, batch, self._batched)
        return model

    def _compile(self, model: Any) -> SimpleQueue[Any]:
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.float_precision,
            # OpenVINO pins the threads of every model to the first cores: engines in parallel would share these.
            "ENABLE_CPU_PINNING": self.threads >= available_cpus(),
        }
        if not self._throughput:
            settings["NUM_STREAMS"] = 1
        else:
            settings["PERFORMANCE_HINT"] = "THROUGHPUT"
            if self.requests != AUTO_REQUESTS:
                settings["PERFORMANCE_HINT_NUM_REQUESTS"] = self.requests
        with signal_stack_kept():
            compiled = self._core.compile_model(model, "CPU", settings)
        if self.requests == AUTO_REQUESTS:
            self.requests = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.streams = compiled.get_property("NUM_STREAMS")
        free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self.requests):
            free.put(compiled.create_infer_request())
        return free


def set_batch(model: Any, batch: int, names: Collection[str] | None = None) -> None:
    """Set the batch size of the inputs of an ``openvino.Model`` and infer all shapes from it.

    ``Model.reshape`` would run passes after which half of the convolutions no longer compute in INT8 (OpenVINO 2026.4).

    Args:
        model: the model, changed in place.
        batch: the batch size; -1: dynamic.
        names: names of the inputs to change; None: all.
    """
    for parameter in model.get_parameters():
        if names is None or parameter.output(0).get_names() & set(names):
            shape = parameter.get_partial_shape()
            shape[0] = batch
            parameter.set_partial_shape(shape)
    model.validate_nodes_and_infer_types()


def import_openvino() -> Any:
    """Return the module ``openvino``, imported with its telemetry disabled.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        with without_openvino_telemetry():
            import openvino
    except ImportError as error:
        raise UserError(f"openvino cannot be imported ({error}); install it: {_PACKAGE}") from None
    return openvino


def computes_in_bf16(core: Any = None) -> bool:
    """Return whether OpenVINO's CPU plugin has bf16 kernels here.

    Args:
        core: an ``openvino.Core``; None: a new one.
    """
    core = core or import_openvino().Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _stated_precision(model: Artifact) -> str:
    """Return the precision that the description of a model states for what is not INT8; f32 if it states none."""
    described = described_by(model)
    known = FLOAT_PRECISIONS[1:]
    stated = known[0] if described is None else described.infer_cfg().get(FLOAT_PRECISION_KEY, known[0])
    if described is not None and stated not in known:
        raise UserError(
            f"{described.infer_cfg_path}: {FLOAT_PRECISION_KEY} is {stated!r}, expected {' or '.join(known)}"
        )
    return str(stated)


def _float_precision(precision: str, asked: str, model: Artifact, core: Any) -> str:
    """Return the precision of what is not INT8, ``f32`` or ``bf16``."""
    if asked not in FLOAT_PRECISIONS:
        raise UserError(f"float_precision is {asked!r}, expected one of {', '.join(FLOAT_PRECISIONS)}")
    fixed = {"fp32": "f32", "bf16": "bf16"}.get(precision)
    if fixed is not None:
        if asked not in ("auto", fixed):
            raise UserError(f"float_precision is {asked!r}, which contradicts the precision {precision}; leave it out")
        return fixed
    if asked != "auto":
        return asked
    return "bf16" if states_bf16(model, core) else "f32"


def states_bf16(model: Artifact, core: Any = None) -> bool:
    """Return whether a model's description asks for bf16 for what is not INT8, and this CPU computes in it.

    Args:
        model: the model.
        core: ``openvino.Core``; None: a new one.

    Raises:
        UserError: the description asks for another precision than bf16 and f32.
    """
    return _stated_precision(model) == "bf16" and computes_in_bf16(core)
