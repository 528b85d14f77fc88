"""Which activations of the ``cpu`` target are rounded with a zero point of their own, without a cost at inference.

With the zero point 128 an activation has 127 steps on either side of 0. A tensor after ReLU, sigmoid or softmax needs
no negative side, and one after SiLU or GELU only a short one: from their least value to their threshold they have
twice as many steps. What a runtime pays for that depends on the zero point and on the readers:

- The zero point 0 costs nothing.
- Another zero point makes OpenVINO's convolutions slower, a fifth for all of YOLOv8n. A convolution without padding
  needs none: it reads ``x + c``, which is not negative, and ``c`` times the sum of its weights is subtracted from its
  bias. With padding the border would be wrong, because its zeros would have to be ``c``.
- A matmul by a constant takes any zero point.

Where a tensor has another reader, it keeps the zero point 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from act_pipeline.graph.int8_rounding import unsigned_range
from act_pipeline.graph.op_types import CONVOLUTIONS
from act_pipeline.onnx_export.program import PRODUCTS, Op, QuantizedTensor, Source


def choose_zero_points(source: Source) -> None:
    """Decide the zero points of activations by their readers.

    Args:
        source: the program, changed in place: ``lowest`` of its quantized tensors is None where the zero point is 128,
            and ``shifted`` is set where the readers make up for it in their biases.
    """
    readers: dict[object, list[tuple[Op, str]]] = {}
    for op in source.ops:
        for slot, names in op.inputs.items():
            for name in names:
                tensor = source.quantized.get(name)
                if tensor is not None:
                    readers.setdefault((tensor.source, tensor.range_key), []).append((op, slot))
    for name, tensor in source.quantized.items():
        if tensor.lowest is None:
            continue
        reading = readers.get((tensor.source, tensor.range_key), [])
        if tensor.source in source.constants:  # it is stored as int8
            source.quantized[name] = replace(tensor, lowest=None)
            continue
        if unsigned_range(tensor.threshold, tensor.lowest)[1] == 0 or _all_take(source, reading, _is_product):
            continue
        if _all_take(source, reading, _has_no_padding):
            source.quantized[name] = replace(tensor, shifted=True)
        else:
            source.quantized[name] = replace(tensor, lowest=None)


def _all_take(source: Source, reading: list[tuple[Op, str]], takes: Callable[[Source, Op, str], bool]) -> bool:
    return bool(reading) and all(takes(source, op, slot) for op, slot in reading)


def _is_product(source: Source, op: Op, slot: str) -> bool:
    return op.type in PRODUCTS and slot == "X" and _weight(source, op, "Y") is not None


def _has_no_padding(source: Source, op: Op, slot: str) -> bool:
    if op.type not in CONVOLUTIONS or slot != "Input" or _weight(source, op, "Filter") is None:
        return False
    if op.attrs.get("padding_algorithm") == "SAME":
        return set(source.shapes[op.input("Filter")][2:]) == {1} and set(op.attrs["strides"]) == {1}
    return op.attrs.get("padding_algorithm") == "VALID" or not any(op.attrs["paddings"])


def _weight(source: Source, op: Op, slot: str) -> QuantizedTensor | None:
    tensor = source.quantized.get(op.input(slot))
    return tensor if tensor is not None and tensor.weight is not None else None
