"""Paddle Inference without TensorRT: its own CPU and GPU kernels, and oneDNN on the CPU."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.package_versions import versions as package_versions
from act_pipeline.engines.arrays import InputCheck
from act_pipeline.engines.interface import refusals, without_pass_log
from act_pipeline.families.registry import Decoder, decoder_of
from act_pipeline.graph.model_files import ModelSummary, inspect_model, read_program
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.program_desc import argument, sizes_of_tensors

GPU_MEMORY_POOL_MB = 1000
# These passes of Paddle 2.6.2 fuse a `scale` with the matmul before or after it, and forget other readers of the tensor
# between them: they fail ("The node to be removed does not exist", on outputs, to which saving appends an identity
# `scale`), or leave an op without its input, which ends the process (D-FINE).
_SCALE_FUSIONS = ("matmul_v2_scale_fuse_pass", "matmul_scale_fuse_pass")
# This one, for recommender models, ends the process (SIGSEGV) where a `concat` reads parameters only.
_SEQUENCE_FUSION = "seqpool_cvm_concat_fuse_pass"
# OneDNN's kernel of `pad` in Paddle 2.6.2 is written for images: it takes a tensor's first two axes for batch and
# channels next to all paddings, and so fills memory beyond the tensor's end (Swin's windows, GroundingDINO).
_PAD = "pad"
# That of a division swaps its operands, as an addition may, where the divisor has more elements: it computes y / x
# (the position embeddings of GroundingDINO's text).
_DIVISION = "elementwise_div"

Configure = Callable[[Any, Any], None]
_Engine = TypeVar("_Engine", bound="PredictorEngine")


class PredictorEngine:
    """Base class of the engines on Paddle Inference; the derived class creates ``_predictor``."""

    _predictor: Predictor

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        return self._predictor.run(inputs)

    def clone(self: _Engine) -> _Engine:
        """Return another engine that shares the weights, for another thread; close both."""
        other = copy.copy(self)
        other._predictor = self._predictor.clone()
        return other

    def close(self) -> None:
        """Free the predictor and its weights."""
        self._predictor.close()

    def versions(self) -> dict[str, str]:
        """Return the versions of Paddle and the packages used with it, by name."""
        return package_versions()


class PaddleEngine(PredictorEngine):
    """A Paddle Inference predictor as an :class:`act_pipeline.engines.interface.Engine`.

    An INT8 model (Q/DQ ops in the program) is computed as follows:

    - ``paddle`` computes every Q/DQ pair in float arithmetic: slow, and bit for bit the result of the training
      executor.
    - ``paddle_onednn`` runs convolutions with INT8 kernels and drops the other Q/DQ of activations: faster, and without
      the rounding of the matmuls' inputs.

    Paddle 2.6 enables oneDNN by default; ``paddle`` disables it. On a float model the two agree to 4e-6. On an INT8
    model, a different order of the same sums moves single values across a rounding boundary, which changes later
    roundings: scores change by up to 0.03, as they do when a single bias changes by 3e-6.
    """

    def __init__(
        self,
        model: InferenceModel,
        precision: str = "fp32",
        device: str = "CPU",
        threads: int | None = None,
        *,
        batch_size: int | None = None,
        onednn: bool = False,
        summary: ModelSummary | None = None,
        inference: Any = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Load the model.

        Args:
            model: float for ``fp32`` and ``fp16``, with Q/DQ ops for ``int8``.
            precision: ``fp32`` or ``int8``; on a GPU also ``fp16`` (mixed precision, assigned by Paddle).
            device: ``CPU`` or ``GPU``.
            threads: number of CPU threads; None: all CPUs that this process may use.
            batch_size: the largest batch; None: no limit.
            onednn: use oneDNN (CPU only).
            summary: summary of ``model``; None: it is read.
            inference: ``paddle.inference`` or a stand-in; None: imported.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the files are damaged, or Paddle cannot load the model.
        """
        self.name = "paddle_onednn" if onednn else "paddle"
        self.precision, self.device, self.artifact = precision, device, model
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
                        # With no list at all Paddle 2.6.2 fails on RT-DETR, in cpu_quantize_squash_pass
                        # ("requantize" scale mismatch) or later in a concat; with matmuls in the list it takes none.
                        config.enable_mkldnn_int8(set(CONVOLUTIONS))
                else:
                    config.disable_mkldnn()

        remedy = "; --use_mkldnn=False runs it without oneDNN" if onednn else ""
        self._predictor = Predictor(model, configure, summary, inference, remedy, batch_size, decoder=decoder)


def leave_out_broken(config: Any, model: InferenceModel, summary: ModelSummary) -> None:
    """Leave out the passes that break programs, and oneDNN's kernels that compute wrongly.

    Args:
        config: a ``paddle.inference.Config``, changed in place; its device is set, which resets the passes.
        model: the model that is loaded.
        summary: summary of ``model``, or of the model from which it was rewritten.
    """
    for name in (*_SCALE_FUSIONS, _SEQUENCE_FUSION):
        config.delete_pass(name)
    broken = {_PAD} & set(summary.op_counts)
    if _DIVISION in summary.op_counts and _has_small_dividend(read_program(model.model_path).blocks[0]):
        broken.add(_DIVISION)
    if broken:
        config.set_mkldnn_op(set(inspect_model(model).op_counts) - broken)


def _has_small_dividend(block: Any) -> bool:
    """Return whether a block divides a tensor by one that has more elements."""
    sizes = sizes_of_tensors(block)

    def elements(op: Any, slot: str) -> int:
        return abs(math.prod(sizes.get(argument(op.inputs, slot), ())))  # a dynamic size, -1, counts as 1

    return any(elements(op, "X") < elements(op, "Y") for op in block.ops if op.type == _DIVISION)


class Predictor:
    """A ``paddle.inference`` predictor that checks its inputs and raises one-line errors.

    Attributes:
        summary: summary of the model.
    """

    def __init__(
        self,
        model: InferenceModel,
        configure: Configure,
        summary: ModelSummary | None = None,
        inference: Any = None,
        remedy: str = "",
        batch_size: int | None = None,
        *,
        decoder: Decoder | None = None,
    ) -> None:
        """Check the files and load the model.

        Args:
            model: the model.
            configure: called with the ``Config`` and the ``inference`` namespace; sets the options of an engine.
            summary: summary of ``model``; None: it is read.
            inference: ``paddle.inference`` or a stand-in; None: imported.
            remedy: what the user can do when Paddle cannot load the model, appended to the error.
            batch_size: the largest batch; None: no limit.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the files are damaged or lack the outputs of a detector, or Paddle cannot load the model.
        """
        self.summary = summary or inspect_model(model)
        self._remedy = remedy
        self._where = model.directory
        self._decode = decoder or decoder_of(model, self.summary.output_shapes)
        if inference is None:
            import paddle.inference

            inference = paddle.inference
        config = inference.Config(str(model.model_path), str(model.params_path))
        config.disable_glog_info()
        config.switch_ir_optim(True)
        config.enable_memory_optim()
        with refusals(f"Paddle Inference cannot load {self._where}", remedy), without_pass_log():
            configure(config, inference)
            leave_out_broken(config, model, self.summary)
            self._predictor = inference.create_predictor(config)
        self._take_handles()
        shapes = {name: self.summary.inputs[name] for name in self._inputs}
        self._check = InputCheck(self._where, shapes, batch_size, self.summary.input_dtypes)

    def _take_handles(self) -> None:
        self._inputs = {name: self._predictor.get_input_handle(name) for name in self._predictor.get_input_names()}
        names = self._predictor.get_output_names()
        self._outputs = {name: self._predictor.get_output_handle(name) for name in names}
        self._ran = False

    def clone(self) -> Predictor:
        """Return another predictor that shares the weights and can run in parallel with this one."""
        other = copy.copy(self)
        other._predictor = self._predictor.clone()
        other._take_handles()
        return other

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        for name, array in self._check(inputs).items():
            self._inputs[name].copy_from_cpu(array)
        if self._ran:
            self._predictor.run()
        else:  # Paddle chooses kernels in the first run, so unsupported ops raise there
            with refusals(f"Paddle Inference cannot run {self._where}", self._remedy):
                self._predictor.run()
            self._ran = True
        return self._decode({name: handle.copy_to_cpu() for name, handle in self._outputs.items()}, inputs)

    def close(self) -> None:
        """Free the predictor; Paddle writes collected shapes when its last reference is deleted."""
        self._inputs, self._outputs, self._predictor = {}, {}, None
        gc.collect()
