"""Rounding to INT8 and back in training programs, by vectorized kernels.

Paddle 2.6.2's ``quantize_linear`` calls the C library's ``rint`` for every element, at 12 to 19 ns each, and its
``dequantize_linear`` copies the tensor before it multiplies. Here the same integers are computed by additions: adding
``1.5 * 2**23`` to a float32 between -2**22 and 2**22 and subtracting it again leaves the nearest integer, ties to even
as in ``rint``, because float32 values between 2**23 and 2**24 are integers.
"""

from __future__ import annotations

from typing import Any

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter

_ROUNDING = 1.5 * 2**23
# Paddle's `inverse` (phi/kernels/impl/quantize_linear_impl.h) treats smaller scales specially; values at them are 0.
_LEAST_SCALE = 1e-30


def round_in_vectors(program: Any) -> int:
    """Replace each pair of ``quantize_linear`` and ``dequantize_linear`` whose integers no other op reads.

    Scales, states and accumulators stay the same variables with the same bits. The integers, which are no longer stored
    in a variable, are the same. The output is the integer times ``scale / 127``, where Paddle's kernel multiplies by
    ``scale`` and divides by 127, so the last bit can differ.

    Args:
        program: a program of PaddleSlim's ``quant_aware`` in ONNX format, or one derived from it; changed in place.

    Returns:
        Number of pairs replaced.
    """
    block = program.global_block()
    index = GraphIndex(block.ops)
    pairs = []
    for op in [op for op in index.ops if op.type == "quantize_linear"]:
        reading = index.readers.get(op.output("Y")[0], [])
        if [other.type for other in reading] == ["dequantize_linear"]:
            pair = _Pair(block, op, reading[0])
            if reading[0].input("Scale") == [pair.scale.name]:
                pairs.append(pair)
    if pairs:
        least = block.create_var(name="rounding@least_scale", shape=[1], dtype=pairs[0].scale.dtype, stop_gradient=True)
        constant = {"shape": [1], "value": _LEAST_SCALE, "str_value": str(_LEAST_SCALE), "dtype": int(least.dtype)}
        Inserter(block, 0).add("fill_constant", {}, {"Out": least}, **constant)
    for pair in pairs:
        pair.replace(least)
    program._sync_with_cpp()
    return len(pairs)


class _Pair:
    """A ``quantize_linear`` with the ``dequantize_linear`` that reads it, and their replacement."""

    def __init__(self, block: Any, quantize: Any, dequantize: Any) -> None:
        self._block, self._quantize, self._dequantize = block, quantize, dequantize
        self._axis = quantize.attr("quant_axis")
        self._input, self._output = block.var(quantize.input("X")[0]), block.var(dequantize.output("Y")[0])
        self._takes_scale = quantize.has_attr("is_test") and not quantize.attr("is_test")
        self.scale = block.var((quantize.output("OutScale") if self._takes_scale else quantize.input("Scale"))[0])
        self._largest = 2 ** (quantize.attr("bit_length") - 1) - 1

    def replace(self, least_scale: Any) -> None:
        self._new_ops = Inserter(self._block, self._block.ops.index(self._quantize))
        if self._takes_scale and self._axis < 0:
            self._moving_average()
        elif self._takes_scale:
            self._largest_by_channel()
        # 127 * (1 / scale), in this order, as in Paddle's kernel. If the scale is NaN, so are the step and all outputs;
        # fmax removes NaN from the bounds of `clip`, which would raise.
        bounded, factor, step = (self._new(name, self.scale.shape) for name in ("bounded", "factor", "step"))
        self._add("elementwise_fmax", {"X": self.scale, "Y": least_scale}, {"Out": bounded}, axis=-1)
        self._add("reciprocal", {"X": bounded}, {"Out": factor})
        self._multiply(factor, self._largest, factor)
        self._multiply(self.scale, 1 / self._largest, step)
        if self._axis < 0:
            self._round_tensor(bounded, factor, step)
        else:
            self._round_channels(factor, step)
        for op in (self._quantize, self._dequantize):
            self._block._remove_op(self._block.ops.index(op), sync=False)

    def _moving_average(self) -> None:
        op, var = self._quantize, self._block.var
        kept = {slot: var(op.input(slot)[0]) for slot in ("InState", "InAccum")}
        written = {slot: var(op.output(slot)[0]) for slot in ("OutState", "OutAccum", "OutScale")}
        rate = op.attr("moving_rate")
        self._add("moving_average_abs_max_scale", {"X": self._input, **kept}, written, moving_rate=rate, is_test=False)

    def _largest_by_channel(self) -> None:
        sizes = self._new("sizes", self._input.shape)
        self._add("abs", {"X": self._input}, {"Out": sizes})
        others = [axis for axis in range(len(self._input.shape)) if axis != self._axis]
        self._add("reduce_max", {"X": sizes}, {"Out": self.scale}, dim=others, keep_dim=False, reduce_all=False)

    def _round_tensor(self, bounded: Any, factor: Any, step: Any) -> None:
        """Round with one scale in three passes over memory, whose bandwidth determines the time."""
        least = self._new("least", self.scale.shape)
        self._multiply(bounded, -(self._largest + 1) / self._largest, least)
        ends = {"min": 0.0, "max": 0.0}  # required attributes, which the input tensors override
        self._add("clip", {"X": self._input, "Min": least, "Max": bounded}, {"Out": self._output}, **ends)
        for by, bias, bias_after_scale in ((factor, _ROUNDING, True), (step, -_ROUNDING, False)):
            inputs, attributes = {"X": self._output, "ScaleTensor": by}, {"bias": bias}
            self._add("scale", inputs, {"Out": self._output}, bias_after_scale=bias_after_scale, **attributes)

    def _round_channels(self, factor: Any, step: Any) -> None:
        self._add("elementwise_mul", {"X": self._input, "Y": factor}, {"Out": self._output}, axis=self._axis)
        if not self._takes_scale:  # otherwise the scale is the largest absolute value, and nothing is clipped
            bounds = {"min": -self._largest - 1.0, "max": float(self._largest)}
            self._add("clip", {"X": self._output}, {"Out": self._output}, **bounds)
        for bias in (_ROUNDING, -_ROUNDING):
            self._add("scale", {"X": self._output}, {"Out": self._output}, bias=bias, bias_after_scale=True)
        self._add("elementwise_mul", {"X": self._output, "Y": step}, {"Out": self._output}, axis=self._axis)

    def _multiply(self, source: Any, number: float, result: Any) -> None:
        self._add("scale", {"X": source}, {"Out": result}, scale=float(number))

    def _new(self, suffix: str, shape: Any) -> Any:
        name = f"{self._output.name}@{suffix}"
        return self._block.create_var(name=name, shape=shape, dtype=self._input.dtype, stop_gradient=True)

    def _add(self, op_type: str, inputs: dict[str, Any], outputs: dict[str, Any], **attributes: Any) -> None:
        self._new_ops.add(op_type, inputs, outputs, **attributes)
