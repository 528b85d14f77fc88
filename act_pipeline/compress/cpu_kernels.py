"""A training program computed on the CPU by Paddle's quicker kernels: the same arithmetic, in a third of the time.

Paddle 2.6.2 trains on the CPU in kernels of its own, of which three take most of the time, and runs as many ops at once
as there are cores, each on one:

- :func:`run_in_onednn` sends convolutions, matmuls and their gradients to oneDNN, which adds in another order;
- ``quantize_linear`` calls the C library's ``rint`` for every element, at 12 to 19 ns each;
  :func:`round_in_vectors` computes the same numbers, bit by bit, in a tenth of the time by kernels that compilers
  vectorize;
- ``moving_average_abs_max_scale`` looks at one element at a time, and a training has hundreds of it;
  :func:`measure_in_vectors` lets it look at the largest and the smallest only, which vectors find;
- ``elementwise_add_grad`` adds up the rows of a bias's gradient at 11 ns an element; :func:`sum_rows_by_matmul` makes a
  product with ones of it;
- :func:`all_cores` runs one op at a time, on all cores: many at once each keep memory of their own.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from act_pipeline.engines.base import available_cpus

_OP_TYPES = ("conv2d", "depthwise_conv2d", "matmul_v2")
_MARKED = {*_OP_TYPES, *(f"{op_type}_grad" for op_type in _OP_TYPES)}
# Added to a float32 of less than 2**22 and taken away again, it leaves the nearest integer, ties to even, as rint does:
# between 2**23 and 2**24 floats are integers.
_ROUNDING = 1.5 * 2**23
# Paddle's `inverse` (phi/kernels/impl/quantize_linear_impl.h) treats smaller scales apart; what they scale is 0.
_LEAST_SCALE = 1e-30
_WAIT_MS = 1
# Elements: below, three more ops cost more than they save.
_LEAST_MEASURED = 4096
_LEAST_ROWS = 64
_NOT_NEGATIVE = {"relu", "sigmoid", "softmax"}


def on_cpu() -> bool:
    """Say whether Paddle computes on the CPU, and has oneDNN."""
    import paddle

    return paddle.get_device() == "cpu" and paddle.base.core.is_compiled_with_mkldnn()


@contextlib.contextmanager
def all_cores(sharing: int = 1) -> Iterator[None]:
    """Let the block's programs run op after op, each on all cores; nothing on a GPU.

    Args:
        sharing: how many processes share the cores that this one may use.
    """
    if not on_cpu():
        yield
        return
    openmp = _openmp()
    # Intel's library: the threads that wait for the next parallel op hold their cores for 200 ms, and the one that makes
    # the next batch ready needs them.
    waiting = [library.dynlib for library in openmp.lib_controllers if hasattr(library.dynlib, "kmp_set_blocktime")]
    before = [library.kmp_get_blocktime() for library in waiting]
    # Paddle sets OMP_NUM_THREADS to 1 when it is imported.
    with op_after_op(), openmp.limit(limits=max(available_cpus() // sharing, 1)):
        try:
            for library in waiting:
                library.kmp_set_blocktime(_WAIT_MS)
            yield
        finally:
            for library, milliseconds in zip(waiting, before):
                library.kmp_set_blocktime(milliseconds)


@functools.lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return the OpenMP libraries of this process, Paddle's among them."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")


@contextlib.contextmanager
def op_after_op() -> Iterator[None]:
    """Let the block's programs, of all threads, run one op at a time each; nothing on a GPU."""
    import paddle

    if not on_cpu():
        yield
        return
    flag = "FLAGS_new_executor_serial_run"
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: True})
    try:
        yield
    finally:
        paddle.set_flags(before)


def run_in_onednn(program: Any) -> int:
    """Mark the ops that oneDNN computes faster, and return how many they are.

    Small ones too: with those in Paddle's own kernels, on all cores, a resumed run did not give the same bits.

    Args:
        program: a `paddle.static.Program`, changed in place; its clones and the passes over it keep the marks.
    """
    marked = [op for op in program.global_block().ops if op.type in _MARKED]
    for op in marked:
        op._set_attr("use_mkldnn", True)
    return len(marked)


def round_in_vectors(program: Any) -> int:
    """Replace each ``quantize_linear`` by ops that compute the same, the scale too where it takes that.

    What it writes, and the scales, states and accumulators that it keeps, stay the same variables with the same bits.

    Args:
        program: after PaddleSlim's ``quant_aware`` in ONNX format, or what became of it; changed in place.

    Returns:
        how many were replaced.
    """
    block = program.global_block()
    found = [op for op in block.ops if op.type == "quantize_linear"]
    for op in found:
        _Rounding(block, op).replace()
    program._sync_with_cpp()
    return len(found)


def measure_in_vectors(program: Any) -> int:
    """Let each ``moving_average_abs_max_scale`` of a large tensor read two numbers: its largest and its smallest.

    One of them has the tensor's largest absolute value, so that scales, states and accumulators keep the same bits. A
    tensor with several observers is measured once, and one that is not negative has its largest number only.

    Args:
        program: a training program, after :func:`round_in_vectors`; changed in place.

    Returns:
        how many observers read such numbers.
    """
    block = program.global_block()
    found = [op for op in block.ops if op.type == "moving_average_abs_max_scale" and _is_large(block.var(op.input("X")[0]))]
    writers: dict[str, list[str]] = {}
    for op in block.ops:
        for name in op.output_arg_names:
            writers.setdefault(name, []).append(op.type)
    ends: dict[str, Any] = {}
    for op in found:
        name = op.input("X")[0]
        writing = writers.get(name, [""])  # by nobody: it is fed
        if name not in ends or len(writing) > 1:
            kinds = ("max",) if {*writing} <= _NOT_NEGATIVE else ("max", "min")
            ends[name] = _insert_ends(block, op, block.var(name), kinds)
        op._rename_input(name, ends[name].name)
    program._sync_with_cpp()
    return len(found)


def _insert_ends(block: Any, op: Any, measured: Any, kinds: Sequence[str]) -> Any:
    """Insert before an op what finds the ends of a tensor, and return the variable that has them."""
    at, ones, name = block.ops.index(op), [1] * len(measured.shape), op.output("OutScale")[0]
    found = [block.create_var(name=f"{name}@{kind}", shape=ones, dtype=measured.dtype) for kind in kinds]
    for kind, variable in zip(kinds, found):
        attributes = {"dim": list(range(len(ones))), "keep_dim": True, "reduce_all": True}
        _insert(block, at, f"reduce_{kind}", {"X": [measured]}, {"Out": [variable]}, attributes)
    if len(found) == 1:
        return found[0]
    both = block.create_var(name=f"{name}@ends", shape=[2, *ones[1:]], dtype=measured.dtype)
    _insert(block, at + 2, "concat", {"X": found}, {"Out": [both]}, {"axis": 0})
    return both


def sum_rows_by_matmul(program: Any) -> int:
    """Let the gradient of a bias that was added to rows, [N, rows, C] + [C], be a product of ones and the gradient's rows.

    Floats are added in another order. Call it before :func:`run_in_onednn`, which computes the product in an order of its
    own that is the same each time.

    Args:
        program: a training program, changed in place.

    Returns:
        how many biases are such.
    """
    block = program.global_block()
    found = [op for op in block.ops if op.type == "elementwise_add_grad" and _adds_bias_to_rows(block, op)]
    for op in found:
        at, gradient, bias = block.ops.index(op), block.var(op.input("Out@GRAD")[0]), block.var(op.output("Y@GRAD")[0])
        _, rows, channels = gradient.shape
        ones = block.create_var(name=f"{bias.name}@ones", shape=[1, 1, rows], dtype=bias.dtype, stop_gradient=True)
        sums = block.create_var(name=f"{bias.name}@sums", shape=[-1, 1, channels], dtype=bias.dtype, stop_gradient=True)
        of_ones = {"shape": [1, 1, rows], "value": 1.0, "dtype": int(bias.dtype)}
        _insert(block, at, "fill_constant", {}, {"Out": [ones]}, of_ones)
        plain = {"trans_x": False, "trans_y": False}
        _insert(block, at + 1, "matmul_v2", {"X": [ones], "Y": [gradient]}, {"Out": [sums]}, plain)
        along = {"dim": [0, 1], "keep_dim": False, "reduce_all": False}
        _insert(block, at + 2, "reduce_sum", {"X": [sums]}, {"Out": [bias]}, along)
        for name in op.output("X@GRAD"):
            _insert(block, at + 3, "assign", {"X": [gradient]}, {"Out": [block.var(name)]}, {})
        block._remove_op(block.ops.index(op), sync=False)
    program._sync_with_cpp()
    return len(found)


def _adds_bias_to_rows(block: Any, op: Any) -> bool:
    added, bias = (block.var(op.input(slot)[0]) for slot in ("X", "Y"))
    return (
        len(added.shape) == 3
        and len(bias.shape) == 1
        and op.attr("axis") in (-1, 2)
        and bool(op.output("Y@GRAD"))
        and added.shape[1] >= _LEAST_ROWS
        and added.shape[2] == bias.shape[0]
    )


def _is_large(variable: Any) -> bool:
    return len(variable.shape) > 0 and math.prod(max(size, 1) for size in variable.shape) >= _LEAST_MEASURED


def _insert(block: Any, at: int, op_type: str, inputs: Any, outputs: Any, attributes: Any) -> None:
    block._insert_op_without_sync(at, type=op_type, inputs=inputs, outputs=outputs, attrs=attributes)


class _Rounding:
    """One ``quantize_linear`` and what takes its place in the block."""

    def __init__(self, block: Any, op: Any) -> None:
        self._block, self._op, self._at = block, op, block.ops.index(op)
        self._axis = op.attr("quant_axis")
        self._input, self._output = block.var(op.input("X")[0]), block.var(op.output("Y")[0])
        self._takes_scale = op.has_attr("is_test") and not op.attr("is_test")
        self._scale = block.var((op.output("OutScale") if self._takes_scale else op.input("Scale"))[0])
        self._largest = 2 ** (op.attr("bit_length") - 1) - 1

    def replace(self) -> None:
        if self._takes_scale and self._axis < 0:
            self._moving_average()
        elif self._takes_scale:
            self._largest_by_channel()
        factor = self._factor()
        self._add("elementwise_mul", {"X": self._input, "Y": factor}, {"Out": self._output}, axis=self._axis)
        for bias in (_ROUNDING, -_ROUNDING):
            self._in_place("scale", scale=1.0, bias=bias, bias_after_scale=True)
        self._in_place("clip", min=-self._largest - 1.0, max=float(self._largest))
        self._block._remove_op(self._at, sync=False)

    def _moving_average(self) -> None:
        op, var = self._op, self._block.var
        kept = {slot: var(op.input(slot)[0]) for slot in ("InState", "InAccum")}
        written = {slot: var(op.output(slot)[0]) for slot in ("OutState", "OutAccum", "OutScale")}
        rate = op.attr("moving_rate")
        self._add("moving_average_abs_max_scale", {"X": self._input, **kept}, written, moving_rate=rate, is_test=False)

    def _largest_by_channel(self) -> None:
        sizes = self._new("sizes", self._input.shape)
        self._add("abs", {"X": self._input}, {"Out": sizes})
        others = [axis for axis in range(len(self._input.shape)) if axis != self._axis]
        self._add("reduce_max", {"X": sizes}, {"Out": self._scale}, dim=others, keep_dim=False, reduce_all=False)

    def _factor(self) -> Any:
        """Add what computes ``127 * (1 / scale)``, in that order, as Paddle's kernel does."""
        factor = self._new("factor", self._scale.shape)
        bounds = {"min": _LEAST_SCALE, "max": float(np.finfo(np.float32).max)}
        self._add("clip", {"X": self._scale}, {"Out": factor}, **bounds)
        self._add("reciprocal", {"X": factor}, {"Out": factor})
        self._add("scale", {"X": factor}, {"Out": factor}, scale=float(self._largest), bias=0.0, bias_after_scale=True)
        return factor

    def _new(self, suffix: str, shape: Any) -> Any:
        name = f"{self._output.name}@{suffix}"
        return self._block.create_var(name=name, shape=shape, dtype=self._input.dtype, stop_gradient=True)

    def _in_place(self, op_type: str, **attributes: Any) -> None:
        self._add(op_type, {"X": self._output}, {"Out": self._output}, **attributes)

    def _add(self, op_type: str, inputs: Any, outputs: Any, **attributes: Any) -> None:
        inputs, outputs = ({slot: [one] for slot, one in slots.items()} for slots in (inputs, outputs))
        _insert(self._block, self._at, op_type, inputs, outputs, attributes)
        self._at += 1
