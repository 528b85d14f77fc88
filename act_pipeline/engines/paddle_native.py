"""Paddle Inference without TensorRT: its own CPU and GPU kernels, and oneDNN on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from act_pipeline.engines.base import available_cpus, runtime_error_line, without_pass_log
from act_pipeline.engines.model_files import ModelSummary, inspect_model
from act_pipeline.errors import UserError
from act_pipeline.model import InferenceModel
from act_pipeline.records import versions as package_versions

GPU_MEMORY_POOL_MB = 1000
# What oneDNN may run in INT8. With no list at all Paddle 2.6.2 fails on RT-DETR, in cpu_quantize_squash_pass
# ("requantize" scale mismatch) or later in a concat; with matmuls in the list it takes none of them.
ONEDNN_INT8_OPS = ("conv2d", "depthwise_conv2d")

Configure = Callable[[Any, Any], None]


class PaddleEngine:
    """A Paddle Inference predictor as an :class:`act_pipeline.engines.base.Engine`.

    How each choice computes an INT8 model (Q/DQ ops in the program):

    - ``paddle`` runs every Q/DQ as it stands, in float arithmetic: what the model was made to compute, slowly.
    - ``paddle_onednn`` runs convolutions with INT8 kernels and drops the other activation Q/DQ: faster, and without
      the rounding of the matmuls.

    Paddle's graph optimizations (``switch_ir_optim``) are on. They change an INT8 model's detections no more than a
    shift of the input by 1e-6 does (roundings that fall on the other side), and a float model's not at all.
    """

    def __init__(
        self,
        model: InferenceModel,
        precision: str = "fp32",
        device: str = "CPU",
        threads: int | None = None,
        onednn: bool = False,
        summary: ModelSummary | None = None,
        inference: Any = None,
    ) -> None:
        """Load the model.

        Args:
            model: float for ``fp32`` and ``fp16``, with Q/DQ ops for ``int8``.
            precision: ``fp32`` or ``int8``; on a GPU also ``fp16`` (mixed, chosen by Paddle).
            device: ``CPU`` or ``GPU``.
            threads: CPU threads; None: all that this process may use.
            onednn: use oneDNN (CPU only).
            summary: of ``model``, if it is at hand.
            inference: ``paddle.inference``, or a stand-in with its names.

        Raises:
            UserError: the files are damaged, or Paddle refuses the model.
        """
        self.name = "paddle_onednn" if onednn else "paddle"
        self.precision, self.device = precision, device
        self.threads = threads or available_cpus()

        def configure(config: Any, namespace: Any) -> None:
            if device == "GPU":
                kind = namespace.PrecisionType.Half if precision == "fp16" else namespace.PrecisionType.Float32
                config.enable_use_gpu(GPU_MEMORY_POOL_MB, 0, kind)
            else:
                config.disable_gpu()
                config.set_cpu_math_library_num_threads(self.threads)
                if onednn:
                    config.enable_mkldnn()
                    if precision == "int8":
                        config.enable_mkldnn_int8(set(ONEDNN_INT8_OPS))

        remedy = "; --use_mkldnn=False runs it without oneDNN" if onednn else ""
        self._predictor = Predictor(model, configure, summary, inference, remedy)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.base.Engine.run`."""
        return self._predictor.run(inputs)

    def close(self) -> None:
        """Free the predictor and its weights."""
        self._predictor.close()

    def versions(self) -> dict[str, str]:
        """Return the versions of Paddle and its companions."""
        return package_versions()


class Predictor:
    """``paddle.inference``'s predictor, with its inputs checked and its refusals in one line."""

    def __init__(
        self,
        model: InferenceModel,
        configure: Configure,
        summary: ModelSummary | None = None,
        inference: Any = None,
        remedy: str = "",
    ) -> None:
        """Check the files, configure, load.

        Args:
            model: the model.
            configure: gets the ``Config`` and the namespace it is from; sets what is particular to an engine.
            summary: of ``model``, if it is at hand.
            inference: ``paddle.inference``, or a stand-in with its names.
            remedy: what the user can do when Paddle refuses the model, appended to the error.
        """
        self.summary = summary or inspect_model(model)
        self._remedy = remedy
        self._where = model.directory
        if len(self.summary.outputs) < 2:
            raise UserError(
                f"{model.model_path} has the outputs {list(self.summary.outputs)}, expected bbox [K, 6] and "
                "bbox_num [N]; export the model again with its post-process (tools/export_model.py does)"
            )
        if inference is None:
            from paddle import inference
        config = inference.Config(str(model.model_path), str(model.params_path))
        config.disable_glog_info()
        config.switch_ir_optim(True)
        config.enable_memory_optim()
        with self._refusals("load"), without_pass_log():
            configure(config, inference)
            self._predictor = inference.create_predictor(config)
        self._inputs = {name: self._predictor.get_input_handle(name) for name in self._predictor.get_input_names()}
        self._outputs = [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()[:2]]
        self._ran = False

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copy in, run, copy out. See :meth:`act_pipeline.engines.base.Engine.run`."""
        for name, handle in self._inputs.items():
            handle.copy_from_cpu(self._checked(name, inputs))
        if self._ran:
            self._predictor.run()
        else:  # kernels are chosen in the first run: refusals come then
            with self._refusals("run"):
                self._predictor.run()
            self._ran = True
        bbox, bbox_num = (handle.copy_to_cpu() for handle in self._outputs)
        bbox = np.asarray(bbox, np.float32)
        if bbox.ndim != 2 or bbox.shape[1] != 6:
            if bbox.size:
                raise UserError(
                    f"the first output of {self._where} is {list(bbox.shape)}, expected bbox [K, 6] (class, score, "
                    "x1, y1, x2, y2); export the model again with its post-process (tools/export_model.py does)"
                )
            bbox = bbox.reshape(0, 6)
        return {"bbox": bbox, "bbox_num": np.asarray(bbox_num, np.int32).reshape(-1)}

    def close(self) -> None:
        """Drop the predictor; Paddle writes what it collected and frees its memory when the last reference goes."""
        self._inputs, self._outputs, self._predictor = {}, [], None
        gc.collect()

    def _checked(self, name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in inputs:
            raise UserError(
                f"{self._where} takes an input {name!r}, which is none of {sorted(inputs)}; expected an RT-DETR "
                "with the inputs image, im_shape and scale_factor"
            )
        array = np.ascontiguousarray(inputs[name], np.float32)
        expected = self.summary.inputs.get(name, array.shape)
        fits = len(expected) == array.ndim and all(want in (-1, got) for want, got in zip(expected, array.shape))
        if not fits:
            hint = ""
            if name == "image" and self.summary.input_size:
                height, width = self.summary.input_size
                size = height if height == width else f"{height},{width}"
                hint = f"; set --img_shape={size} or the reader's target_size so"
            raise UserError(
                f"{self._where} takes {name} {_dimensions(expected)}, the reader gives {_dimensions(array.shape)}{hint}"
            )
        return array

    def _refusals(self, action: str) -> _Refusals:
        return _Refusals(f"Paddle Inference cannot {action} {self._where}", self._remedy)


class _Refusals:
    """Turn Paddle's C++ exceptions into a UserError; errors of ours pass."""

    def __init__(self, what: str, remedy: str) -> None:
        self._what, self._remedy = what, remedy

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        # pybind11 makes RuntimeError, ValueError, NotImplementedError, MemoryError ... of Paddle's error codes; all of
        # them carry "(SomeCode) sentence" or come from libraries underneath.
        if isinstance(
            error, (RuntimeError, ValueError, OSError, MemoryError, NotImplementedError, IndexError, SystemError)
        ):
            raise UserError(f"{self._what}: {runtime_error_line(error)}{self._remedy}") from error


def _dimensions(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
