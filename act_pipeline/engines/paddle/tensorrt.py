"""Paddle Inference with TensorRT subgraphs, on a GPU."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.engines.machine import Machine
from act_pipeline.engines.machine import machine as this_machine
from act_pipeline.engines.paddle.dynamic_shape import shapes_path
from act_pipeline.engines.paddle.native import GPU_MEMORY_POOL_MB, Predictor, PredictorEngine
from act_pipeline.families.registry import Decoder
from act_pipeline.graph.model_files import ModelSummary, inspect_model

CACHE_DIRECTORY = "trt_cache"
WORKSPACE_BYTES_PER_IMAGE = 1 << 30
MIN_SUBGRAPH_SIZE = 3
_PRECISION_NAMES = {"fp32": "Float32", "fp16": "Half", "int8": "Int8"}


class PaddleTensorRTEngine(PredictorEngine):
    """A Paddle Inference predictor with TensorRT subgraphs, as an :class:`act_pipeline.engines.interface.Engine`.

    The first load builds the TensorRT engines, which takes minutes. They are cached in ``trt_cache/`` in the model's
    folder and reused as long as model, shapes, precision, GPU and versions are the same.
    """

    name = "paddle_trt"
    device = "GPU"

    def __init__(
        self,
        model: InferenceModel,
        precision: str = "fp32",
        device: str = "GPU",
        threads: int | None = None,
        *,
        batch_size: int = 1,
        dynamic_shape: bool = True,
        calibrate: bool = False,
        summary: ModelSummary | None = None,
        inference: Any = None,
        machine: Machine | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Load the model; build the TensorRT engines unless they are cached.

        Args:
            model: float for ``fp32`` and ``fp16``, with Q/DQ ops for ``int8`` (float with ``calibrate``).
            precision: ``fp32``, ``fp16`` or ``int8``.
            device: ``GPU``.
            threads: recorded only, never passed to Paddle; None: all CPUs that this process may use.
            batch_size: the largest batch.
            dynamic_shape: use the shapes that :mod:`act_pipeline.engines.paddle.dynamic_shape` collected.
            calibrate: let TensorRT calibrate INT8 scales (``use_calib_mode``), for a model without scales.
            summary: summary of ``model``; None: it is read.
            inference: ``paddle.inference`` or a stand-in; None: imported.
            machine: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the shapes were not collected, the files are damaged, or Paddle cannot load the model.
        """
        self.precision, self.artifact = precision, model
        self.threads = threads or available_cpus()
        self._machine = machine or this_machine()
        shapes = shapes_path(model)
        if dynamic_shape and not shapes.exists():
            raise UserError(f"{shapes} is missing; collect it first with deploy/infer_eval.py --collect_shape_only")
        summary = summary or inspect_model(model)
        cache = self._cache_directory(model, batch_size, dynamic_shape, calibrate)
        cache.mkdir(parents=True, exist_ok=True)

        def configure(config: Any, namespace: Any) -> None:
            config.enable_use_gpu(GPU_MEMORY_POOL_MB, 0)
            config.set_optim_cache_dir(str(cache))
            config.enable_tensorrt_engine(
                workspace_size=WORKSPACE_BYTES_PER_IMAGE * batch_size,
                max_batch_size=batch_size,
                min_subgraph_size=MIN_SUBGRAPH_SIZE,
                precision_mode=getattr(namespace.PrecisionType, _PRECISION_NAMES[precision]),
                use_static=True,
                use_calib_mode=calibrate,
            )
            if dynamic_shape:
                config.enable_tuned_tensorrt_dynamic_shape(str(shapes), True)

        remedy = "; --use_trt=False runs it without TensorRT"
        self._predictor = Predictor(model, configure, summary, inference, remedy, batch_size, decoder=decoder)

    def _cache_directory(self, model: InferenceModel, batch_size: int, dynamic_shape: bool, calibrate: bool) -> Any:
        # Paddle 2.6 derives the name of a cached engine from the subgraph's inputs and the precision only: the same
        # graph with other weights, other shapes or on another GPU would load the old engine. So the folder's name
        # depends on everything else.
        shapes = shapes_path(model)
        key = json.dumps(
            [
                model.content_hash(),
                self.precision,
                batch_size,
                calibrate,
                hash_files([shapes]) if dynamic_shape and shapes.exists() else None,
                self._machine.gpus,
                self._machine.paddle,
                self._machine.cuda,
                self._machine.tensorrt_runtime,
            ]
        )
        return model.directory / CACHE_DIRECTORY / hashlib.sha256(key.encode()).hexdigest()[:16]

    def versions(self) -> dict[str, str]:
        """Return the versions of Paddle, CUDA, cuDNN and TensorRT, by name."""
        found = super().versions()
        machine = self._machine
        for name, value in (("cuda", machine.cuda), ("cudnn", machine.cudnn)):
            if value:
                found[name] = value
        if machine.tensorrt_runtime:
            found["tensorrt"] = ".".join(map(str, machine.tensorrt_runtime))
        return found
