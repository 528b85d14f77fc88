"""INT8 models in Paddle Inference with every Q/DQ computed, by oneDNN: the arithmetic of the engine ``paddle``, faster.

Paddle's own CPU kernels spend most of an INT8 model's time in float convolutions without oneDNN and in rounding one
element at a time. Here the program is rewritten so that its arithmetic stays the same, except for the order in which
floats are added:

- Weights are dequantized once, when the model is loaded, to exactly the output of ``dequantize_linear``.
- ``quantize_linear`` and ``dequantize_linear`` of an activation become oneDNN's ``quantize`` and ``dequantize``
  (``x * 127 / scale``, rounded to the nearest with ties to even, saturated to -128..127; and back).
- On a CPU with 8-bit dot products (AVX512-VNNI), a convolution of rounded activations by rounded weights, or such a
  matmul with a bias, accumulates integer products exactly, outputs float and then adds its bias:
  ``sum(q_x * q_w) * s_x * s_w / 127**2``. On other CPUs products are accumulated in float, because oneDNN's INT8
  kernels halve the weights there.
- Deformable attention gathers rows (:mod:`act_pipeline.graph.deformable_attention`).
- Everything else runs in oneDNN's float kernels.
"""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.engines.machine import Machine
from act_pipeline.engines.machine import machine as this_machine
from act_pipeline.engines.paddle.native import Predictor, PredictorEngine
from act_pipeline.families.registry import Decoder, decoder_of
from act_pipeline.graph.deformable_attention import attend_by_rows
from act_pipeline.graph.model_files import ModelSummary, inspect_model
from act_pipeline.graph.onednn_broadcasts import spread_for_onednn
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.graph.parameters_file import read_parameters, write_parameters
from act_pipeline.graph.program_desc import argument, flag, keep, parsed, variables, whole

_LARGEST = 127
# Paddle's kernels treat smaller scales specially.
_LEAST_SCALE = 1e-30
_FLOAT32 = 5  # VarType.FP32
_ROUNDING_OPS = ("quantize_linear", "dequantize_linear")
# It puts the addition of a residual into a convolution, which oneDNN's INT8 ones refuse when they give floats.
_RESIDUAL_PASS = "conv_elementwise_add_mkldnn_fuse_pass"


class Int8ReferenceEngine(PredictorEngine):
    """An INT8 model with every Q/DQ computed, as an :class:`act_pipeline.engines.interface.Engine`; CPU only.

    A faster equivalent of the engine ``paddle``. Single scores differ where a sum falls on the other side of a rounding
    boundary, and the mAP changes accordingly.
    """

    def __init__(
        self,
        model: InferenceModel,
        precision: str = "int8",
        device: str = "CPU",
        threads: int | None = None,
        *,
        batch_size: int | None = None,
        summary: ModelSummary | None = None,
        inference: Any = None,
        machine: Machine | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Rewrite the model to a temporary folder and load it.

        Args:
            model: a model with Q/DQ ops.
            precision: ``int8``.
            device: ``CPU``.
            threads: number of CPU threads; None: all CPUs that this process may use.
            batch_size: the largest batch; None: no limit.
            summary: summary of ``model``; None: it is read.
            inference: ``paddle.inference`` or a stand-in; None: imported.
            machine: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: the files are damaged, or Paddle cannot load them.
        """
        self.name = "int8_reference"
        self.precision, self.device = precision, device
        self.threads = available_cpus() if threads is None else threads
        self.artifact = model

        def configure(config: Any, _: Any) -> None:
            use_onednn(config, self.threads)

        integers = bool((machine or this_machine()).avx512_vnni)
        with tempfile.TemporaryDirectory(prefix="act_pipeline_simulated_") as folder:
            summary = summary or inspect_model(model)
            rewritten = with_onednn_rounding(model, Path(folder), integers, summary)
            # The summary of the original model is valid: inputs and outputs are the same.
            self._predictor = Predictor(
                rewritten,
                configure,
                summary,
                inference,
                "; --engine=paddle runs it",
                batch_size,
                decoder=decoder or decoder_of(model, summary.output_shapes),
            )


def use_onednn(config: Any, threads: int) -> None:
    """Configure Paddle Inference for a model that :func:`with_onednn_rounding` wrote.

    Args:
        config: a ``paddle.inference.Config``, changed in place.
        threads: number of CPU threads.
    """
    config.set_cpu_math_library_num_threads(threads)
    config.enable_mkldnn()
    config.delete_pass(_RESIDUAL_PASS)


def with_onednn_rounding(
    model: InferenceModel, directory: Path, integers: bool, summary: ModelSummary | None = None
) -> InferenceModel:
    """Write an INT8 model with dequantized weights, whose activations are rounded by oneDNN's ops.

    The two files are edited as protobuf, without building a Paddle graph, because this happens at every evaluation.
    Activations that are rounded per channel or to other than 8 bits keep Paddle's ops; ACT creates none in RT-DETR.

    Args:
        model: a model with Q/DQ ops, written by `act_pipeline.compress` or PaddleSlim's ACT (``onnx_format: true``).
        directory: an existing folder to write to.
        integers: let convolutions, and matmuls with a bias, read the integers of their input and convert their weights
            back to integers, where both are rounded to 8 bits and the weight has one scale, or one for each output
            channel.
        summary: summary of ``model``; None: it is read.

    Returns:
        The model in ``directory``.

    Raises:
        UserError: the files are damaged.
    """
    summary = summary or inspect_model(model)
    program = parsed(model.model_path.read_bytes())
    parameters = read_parameters(model, summary.parameters)
    block = program.blocks[0]
    described = {variable.name: variable for variable in block.vars}
    factors = _whole_pairs(block.ops, parameters)
    biases = _biases(block.ops, parameters)
    rounded: dict[str, str] = {}  # activation -> its integers
    weights: dict[str, _Weight] = {}
    added: set[str] = set()  # outputs of additions that are fused into `fc`
    for op in block.ops:
        source, result = argument(op.inputs, "X"), argument(op.outputs, "Y")
        if op.type == "dequantize_linear" and source in parameters and whole(op, "bit_length") == 8:
            scale, axis = parameters[argument(op.inputs, "Scale")].reshape(-1), whole(op, "quant_axis")
            parameters[result] = _dequantized(parameters[source], scale, axis)
            _make_parameter(described[result], parameters[result])
            if float(scale.min()) > _LEAST_SCALE:
                weights[result] = _Weight(axis if scale.size > 1 else None, _LARGEST / scale.astype(np.float32))
        elif op.type == "quantize_linear" and result in factors:
            _become_onednn(op, factors[result])
        elif op.type == "dequantize_linear" and source in factors:
            _become_onednn(op, factors[source])
            rounded[result] = source
        elif integers and op.type in CONVOLUTIONS:
            activation, weight = argument(op.inputs, "Input"), weights.get(argument(op.inputs, "Filter"))
            if activation in rounded and weight is not None and weight.axis in (None, 0):
                _read_integers(op, rounded[activation], factors[rounded[activation]], weight.factors)
        elif integers and op.type == "matmul_v2" and argument(op.outputs, "Out") in biases:
            name, adding = argument(op.inputs, "Y"), biases[argument(op.outputs, "Out")]
            if source in rounded and name in weights and _is_fully_connected(op, adding, parameters, weights[name]):
                if flag(op, "trans_y"):
                    parameters[name] = np.ascontiguousarray(parameters[name].T)
                    _make_parameter(described[name], parameters[name])
                _become_fully_connected(op, adding, len(described[source].type.lod_tensor.tensor.dims))
                _read_integers(op, rounded[source], factors[rounded[source]], weights[name].factors)
                added.add(argument(adding.outputs, "Out"))
    keep(block.ops, lambda op: op.type != "dequantize_linear" or argument(op.outputs, "Y") not in parameters)
    keep(block.ops, lambda op: op.type != "elementwise_add" or argument(op.outputs, "Out") not in added)
    attend_by_rows(program)
    spread_for_onednn(program)
    read = {name for op in block.ops for name in variables(op.inputs)}
    keep(block.ops, lambda op: op.type != "dequantize" or argument(op.outputs, "Output") in read)
    used = {name for op in block.ops for slots in (op.inputs, op.outputs) for name in variables(slots)}
    keep(block.vars, lambda variable: variable.name in used)
    rewritten = InferenceModel(directory)
    rewritten.model_path.write_bytes(program.SerializeToString())
    saved = {variable.name for variable in block.vars if variable.persistable} & set(parameters)
    write_parameters(rewritten, {name: parameters[name] for name in sorted(saved)})
    return rewritten


@dataclass(frozen=True)
class _Weight:
    """The axis of a weight's scales, None for a single scale; and 127 / scale, of shape [channels] or [1]."""

    axis: int | None
    factors: np.ndarray


def _whole_pairs(ops: Any, parameters: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return integer tensor -> 127 / scale, for tensors that only ``dequantize_linear`` of the same scale reads."""

    def factor(op: Any) -> float | None:
        scale = parameters.get(argument(op.inputs, "Scale"))
        if scale is None or scale.size != 1 or whole(op, "bit_length") != 8:
            return None
        if not float(scale.reshape(-1)[0]) > _LEAST_SCALE:
            return None
        return _LARGEST / float(scale.reshape(-1)[0])

    found: dict[str, float] = {}
    for op in ops:
        value = factor(op) if op.type == "quantize_linear" else None
        if value is not None:
            found[argument(op.outputs, "Y")] = value
    for op in ops:
        for name in [name for name in variables(op.inputs) if name in found]:
            if op.type != "dequantize_linear" or factor(op) != found[name]:
                del found[name]
    return found


def _is_slot(name: str, slot: Any) -> bool:
    return slot.parameter == name


def _become_onednn(op: Any, factor: float) -> None:
    from paddle.base.proto import framework_pb2

    quantizes = op.type == "quantize_linear"
    op.type = "quantize" if quantizes else "dequantize"
    for slots, old, new in ((op.inputs, "X", "Input"), (op.outputs, "Y", "Output")):
        keep(slots, functools.partial(_is_slot, old))
        slots[0].parameter = new
    del op.attrs[:]
    op.attrs.add(name="Scale", type=framework_pb2.FLOAT, f=factor)
    op.attrs.add(name="use_mkldnn", type=framework_pb2.BOOLEAN, b=True)
    op.attrs.add(name="mkldnn_data_type", type=framework_pb2.STRING, s="float32")
    if quantizes:
        op.attrs.add(name="is_negative_input", type=framework_pb2.BOOLEAN, b=True)
        op.attrs.add(name="output_format", type=framework_pb2.STRING, s="NCHW")


def _biases(ops: Any, parameters: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return matmul output -> the op that adds a parameter to it, for matmuls whose weight has one reader."""
    reads = Counter(name for op in ops for name in variables(op.inputs))
    products = {
        argument(op.outputs, "Out")
        for op in ops
        if op.type == "matmul_v2" and not flag(op, "trans_x") and reads[argument(op.inputs, "Y")] == 1
    }
    found = {}
    for op in ops:
        product = argument(op.inputs, "X")
        if op.type == "elementwise_add" and product in products and reads[product] == 1:
            if argument(op.inputs, "Y") in parameters:
                found[product] = op
    return found


def _is_fully_connected(op: Any, adding: Any, parameters: Mapping[str, np.ndarray], weight: _Weight) -> bool:
    """Return whether the weight is a matrix with one scale, or one for each output, and the bias has one per output."""
    matrix, bias = parameters[argument(op.inputs, "Y")], parameters[argument(adding.inputs, "Y")]
    columns = 0 if flag(op, "trans_y") else 1
    return (
        matrix.ndim == 2
        and bias.shape == (matrix.shape[columns],)
        and weight.axis in (None, columns)
        and whole(adding, "axis") == -1
    )


def _become_fully_connected(op: Any, adding: Any, rank: int) -> None:
    """Convert a matmul and the addition of its bias to ``fc``; the weight is [inputs, outputs]."""
    from paddle.base.proto import framework_pb2

    op.type = "fc"
    keep(op.inputs, lambda slot: slot.parameter in ("X", "Y"))
    for slot in op.inputs:
        slot.parameter = {"X": "Input", "Y": "W"}[slot.parameter]
    op.inputs.add(parameter="Bias", arguments=[argument(adding.inputs, "Y")])
    next(slot for slot in op.outputs if slot.parameter == "Out").arguments[:] = [argument(adding.outputs, "Out")]
    del op.attrs[:]
    op.attrs.add(name="in_num_col_dims", type=framework_pb2.INT, i=rank - 1)
    op.attrs.add(name="activation_type", type=framework_pb2.STRING, s="")
    op.attrs.add(name="padding_weights", type=framework_pb2.BOOLEAN, b=False)


def _read_integers(op: Any, source: str, factor: float, weight_factors: np.ndarray) -> None:
    """Let a convolution or ``fc`` read integers; oneDNN converts its float weights to integers by the given factors."""
    from paddle.base.proto import framework_pb2

    next(slot for slot in op.inputs if slot.parameter == "Input").arguments[:] = [source]
    settings = ("Scale_in", "Scale_out", "Scale_weights", "force_fp32_output", "use_mkldnn", "mkldnn_data_type")
    keep(op.attrs, lambda attribute: attribute.name not in settings)
    op.attrs.add(name="Scale_in", type=framework_pb2.FLOAT, f=factor)
    op.attrs.add(name="Scale_out", type=framework_pb2.FLOAT, f=1.0)
    op.attrs.add(name="Scale_weights", type=framework_pb2.FLOATS, floats=weight_factors.tolist())
    op.attrs.add(name="force_fp32_output", type=framework_pb2.BOOLEAN, b=True)
    op.attrs.add(name="use_mkldnn", type=framework_pb2.BOOLEAN, b=True)
    op.attrs.add(name="mkldnn_data_type", type=framework_pb2.STRING, s="int8")


def _dequantized(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """Return the output of ``dequantize_linear`` for a weight, bit for bit: ``weight * scale / 127`` in float32."""
    scale = scale.astype(np.float32).reshape(-1)
    if scale.size > 1:
        scale = scale.reshape([-1 if dimension == axis else 1 for dimension in range(weight.ndim)])
    return weight.astype(np.float32) * scale / np.float32(_LARGEST)


def _make_parameter(variable: Any, value: np.ndarray) -> None:
    variable.persistable = True
    variable.type.lod_tensor.tensor.data_type = _FLOAT32
    del variable.type.lod_tensor.tensor.dims[:]
    variable.type.lod_tensor.tensor.dims.extend(value.shape)
