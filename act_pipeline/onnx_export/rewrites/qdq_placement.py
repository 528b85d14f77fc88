"""Placement of Q/DQ pairs as early as the arithmetic allows.

Rounding a tensor with one scale commutes with ops that only move its elements. Rounded first, the tensor is moved as
bytes, and a runtime can fuse the rounding into the convolution or matmul before it. TensorRT and ONNX Runtime do this
on their own. OpenVINO moves a DequantizeLinear down past such ops, but never a QuantizeLinear up.
"""

from __future__ import annotations

from dataclasses import replace

from act_pipeline.onnx_export.program import Op, Source

_MOVING = (
    "transpose2",
    "reshape2",
    "flatten_contiguous_range",
    "squeeze2",
    "unsqueeze2",
    "nearest_interp_v2",
    "concat",
)


def round_early(source: Source) -> None:
    """Move Q/DQ pairs up past ops that only move elements and whose result no op reads unrounded.

    These ops then read rounded tensors, and ``source.rounded`` contains the names of their results.

    Args:
        source: the program, changed in place.
    """
    producers = {name: op for op in source.ops for names in op.outputs.values() for name in names}
    readers: dict[str, set[int]] = {name: {0} for name in source.outputs}
    for op in source.ops:
        for name in (name for names in op.inputs.values() for name in names):
            readers.setdefault(name, set()).add(id(op))
    scales: dict[str, set[object]] = {}
    for tensor in source.quantized.values():
        scales.setdefault(tensor.source, set()).add(tensor.range_key)

    climbing = [tensor for tensor in source.quantized.values() if tensor.weight is None]
    while climbing:
        tensor = climbing.pop()
        name = tensor.source
        mover = producers.get(name)
        if mover is None or not _only_moves(mover):
            continue
        if name in source.rounded or readers.get(name) or len(scales[name]) > 1:
            continue
        if tensor.shifted and not source.constants.keys().isdisjoint(mover.inputs["X"]):
            continue
        source.rounded.add(name)
        early = []
        for moved in mover.inputs["X"]:
            readers[moved].discard(id(mover))
            scales.setdefault(moved, set()).add(tensor.range_key)
            rounded = replace(tensor, source=moved)
            early.append(f"{moved}@{float(tensor.scale)!r}from{tensor.lowest!r}")
            source.quantized[early[-1]] = rounded
            source.shapes[early[-1]], source.dtypes[early[-1]] = source.shapes[moved], source.dtypes[moved]
            climbing.append(rounded)
        mover.inputs["X"] = early


def _only_moves(op: Op) -> bool:
    # The maximum commutes with rounding, the average does not.
    maximum = op.type == "pool2d" and op.attrs["pooling_type"] == "max"
    return maximum or op.type in _MOVING
