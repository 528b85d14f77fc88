"""Rules that take and put values at indices, and choose the largest."""

from __future__ import annotations

from typing import Any

import numpy as np

from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule, axis_of, dtype_of, open_axis
from act_pipeline.importers.onnx.source import Node


def _gather(build: Build, node: Node) -> Any:
    import paddle

    table, name = node.inputs[:2]
    before = build.shape(table)
    axis = axis_of(int(node.attrs.get("axis", 0)), len(before))
    value = build.value(table)
    chosen = build.shape(name)
    after = [*before[:axis], *chosen, *before[axis + 1 :]]
    if build.is_constant(name):
        if open_axis(value) == axis:
            raise CannotImport("it takes images out of the open batch")
        indices = _from_front(build.constants[name], before[axis])
        if indices.size == 0:
            raise CannotImport("its indices are empty")
        first, last = int(indices.reshape(-1)[0]), int(indices.reshape(-1)[-1])
        if np.array_equal(indices.reshape(-1), np.arange(first, last + 1)):  # also one index
            value = paddle.slice(value, [axis], [first], [last + 1])
        else:
            value = paddle.gather(value, paddle.assign(indices.reshape(-1).astype(np.int64)), axis=axis)
        flat = [*before[:axis], indices.size, *before[axis + 1 :]]
        return value if indices.ndim == 1 else build.reshape(value, flat, after)
    index = build.value(name)
    if open_axis(index) is not None and open_axis(value) is not None:
        raise CannotImport("its table and its indices both have the open batch")
    if len(chosen) != 1:
        index = build.reshape(index, chosen, [int(np.prod(chosen))])
    result = paddle.gather(value, index, axis=axis)
    if len(chosen) == 1:
        return result
    return build.reshape(result, [*before[:axis], int(np.prod(chosen)), *before[axis + 1 :]], after)


def _from_front(indices: np.ndarray, size: int) -> np.ndarray:
    """Return constant indices counted from the front.

    Raises:
        CannotImport: one is outside.
    """
    if indices.size and not (-size <= indices.min() and indices.max() < size):
        raise CannotImport(f"its indices run from {indices.min()} to {indices.max()}, expected below {size}")
    return np.where(indices < 0, indices + size, indices)


def _indices(build: Build, name: str, size: int) -> Any:
    """Return indices as a variable, constant ones counted from the front."""
    if not build.is_constant(name):
        return build.value(name)
    return build.add_constant(f"{name}.indices", _from_front(build.constants[name], size))


def _gather_elements(build: Build, node: Node) -> Any:
    import paddle

    before = build.shape(node.inputs[0])
    axis = axis_of(int(node.attrs.get("axis", 0)), len(before))
    value, index = build.value(node.inputs[0]), _indices(build, node.inputs[1], before[axis])
    value, index = build.with_batch_of(value, index), build.with_batch_of(index, value)
    return paddle.take_along_axis(value, index, axis, broadcast=False)


def _gather_nd(build: Build, node: Node) -> Any:
    import paddle

    if node.attrs.get("batch_dims", 0):
        raise CannotImport(f"its batch_dims is {node.attrs['batch_dims']}, expected 0")
    value, index = build.value(node.inputs[0]), build.value(node.inputs[1])
    if value.shape[0] == index.shape[0] == -1 and _numbers_images(build, node.inputs[1]):
        index = _with_image_numbers(index)
    return paddle.gather_nd(value, index)


def _numbers_images(build: Build, name: str) -> bool:
    """Return whether indices, [1, ..., D], have the image's number as their first column.

    It was made from the size of the batch, and became zeros when the graph was simplified at a batch of 1.
    """
    node, rank = build.producers.get(name), len(build.shape(name))
    if node is None or node.type != "Concat" or axis_of(int(node.attrs["axis"]), rank) != rank - 1:
        return False
    column = build.constants.get(node.inputs[0])
    return column is not None and column.shape[0] == 1 == column.shape[-1] and not column.any()


def _with_image_numbers(index: Any) -> Any:
    """Return indices, [N, ..., D] with zeros in the first column, with each row's image there."""
    import paddle

    last = len(index.shape) - 1
    with quiet_upstream():  # arange warns of an attribute that it sets itself
        numbers = paddle.arange(0, paddle.slice(paddle.shape(index), [0], [0], [1]), 1, dtype=dtype_of(index))
    numbers = paddle.reshape(numbers, [-1] + [1] * last)
    first = paddle.add(paddle.slice(index, [last], [0], [1]), numbers)
    return paddle.concat([first, paddle.slice(index, [last], [1], [index.shape[last]])], last)


def _scatter_nd(build: Build, node: Node) -> Any:
    import paddle

    kind = node.attrs.get("reduction", "none")
    value, index, updates = (build.value(name) for name in node.inputs)
    if kind == "add":
        return paddle.scatter_nd_add(value, index, updates)
    if kind != "none":
        raise CannotImport(f"its reduction is {kind!r}, expected none or add")
    if open_axis(value) is not None or open_axis(index) is not None:
        raise CannotImport("it writes into the open batch")
    if dtype_of(value) != "float32":
        raise CannotImport(f"it writes {dtype_of(value)}, expected float32")
    shape = list(build.shape(node.inputs[0]))
    written = paddle.scatter_nd(index, paddle.ones_like(updates), shape)
    put = paddle.scatter_nd(index, updates, shape)
    return paddle.where(paddle.greater_than(written, paddle.zeros_like(written)), put, value)


def _scatter_elements(build: Build, node: Node) -> Any:
    import paddle

    kind = {"none": "assign", "add": "add", "mul": "multiply"}.get(node.attrs.get("reduction", "none"))
    if kind is None:
        raise CannotImport(f"its reduction is {node.attrs['reduction']!r}, expected none, add or mul")
    before = build.shape(node.inputs[0])
    axis = axis_of(int(node.attrs.get("axis", 0)), len(before))
    index, updates = _indices(build, node.inputs[1], before[axis]), build.value(node.inputs[2])
    return paddle.put_along_axis(build.value(node.inputs[0]), index, updates, axis, reduce=kind, broadcast=False)


def _top_k(build: Build, node: Node) -> Any:
    import paddle

    count = build.ints(node, 1, "k")
    axis = axis_of(int(node.attrs.get("axis", -1)), build.rank(node.inputs[0]))
    size = build.shape(node.inputs[0])[axis]
    if count is None or not 0 < count[0] <= size:
        raise CannotImport(f"its k is {count}, expected 1 to {size}")
    return paddle.topk(
        build.value(node.inputs[0]),
        count[0],
        axis=axis,
        largest=bool(node.attrs.get("largest", 1)),
        sorted=bool(node.attrs.get("sorted", 1)),
    )


def _triangle(build: Build, node: Node) -> Any:
    import paddle

    shift = int(build.constant(node.inputs[1], "k").reshape(()).item()) if node.has(1) else 0
    part = paddle.triu if node.attrs.get("upper", 1) else paddle.tril
    return part(build.value(node.inputs[0]), shift)


RULES: dict[str, Rule] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "TopK": _top_k,
    "Trilu": _triangle,
}
