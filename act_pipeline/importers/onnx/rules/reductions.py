"""Rules that combine the values along axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from act_pipeline.importers.onnx.rules.rule import Build, CannotImport, Rule, axis_of
from act_pipeline.importers.onnx.source import Node


def _axes(build: Build, node: Node) -> list[int] | None:
    """Return the axes, sorted; None if there is nothing to reduce."""
    rank = build.rank(node.inputs[0])
    given = build.ints(node, 1, "axes")
    if not given:
        if node.attrs.get("noop_with_empty_axes", 0):
            return None
        return list(range(rank))
    return sorted(axis_of(axis, rank) for axis in given)


def _reduction(function: str) -> Rule:
    def rule(build: Build, node: Node) -> Any:
        import paddle

        axes, value = _axes(build, node), build.value(node.inputs[0])
        keep = bool(node.attrs.get("keepdims", 1))
        if node.type in ("ReduceL1", "ReduceLogSum"):
            value = paddle.abs(value) if node.type == "ReduceL1" else value
        elif node.type in ("ReduceL2", "ReduceSumSquare"):
            value = paddle.square(value)
        if axes is not None and axes:
            value = _reduced(paddle, function, value, axes, keep)
        if node.type == "ReduceL2":
            return paddle.sqrt(value)
        return paddle.log(value) if node.type == "ReduceLogSum" else value

    return rule


def _reduced(paddle: Any, function: str, value: Any, axes: Sequence[int], keep: bool) -> Any:
    if function == "prod":  # takes one axis
        for axis in reversed(axes):
            value = paddle.prod(value, axis=axis, keepdim=keep)
        return value
    return getattr(paddle, function)(value, axis=list(axes), keepdim=keep)


def _arg(function: str) -> Rule:
    def rule(build: Build, node: Node) -> Any:
        import paddle

        if node.attrs.get("select_last_index", 0):
            raise CannotImport("its select_last_index is 1, expected 0")
        axis = axis_of(int(node.attrs.get("axis", 0)), build.rank(node.inputs[0]))
        keep = bool(node.attrs.get("keepdims", 1))
        return getattr(paddle, function)(build.value(node.inputs[0]), axis=axis, keepdim=keep)

    return rule


def _cumulative_sum(build: Build, node: Node) -> Any:
    import paddle

    axis = axis_of(int(build.constant(node.inputs[1], "axis").reshape(()).item()), build.rank(node.inputs[0]))
    value = build.value(node.inputs[0])
    backwards = bool(node.attrs.get("reverse", 0))
    if backwards:
        value = paddle.flip(value, [axis])
    summed = paddle.cumsum(value, axis)
    if node.attrs.get("exclusive", 0):
        summed = paddle.subtract(summed, value)
    return paddle.flip(summed, [axis]) if backwards else summed


RULES: dict[str, Rule] = {
    "ReduceSum": _reduction("sum"),
    "ReduceMean": _reduction("mean"),
    "ReduceMax": _reduction("max"),
    "ReduceMin": _reduction("min"),
    "ReduceProd": _reduction("prod"),
    "ReduceL1": _reduction("sum"),
    "ReduceL2": _reduction("sum"),
    "ReduceSumSquare": _reduction("sum"),
    "ReduceLogSum": _reduction("sum"),
    "ReduceLogSumExp": _reduction("logsumexp"),
    "ArgMax": _arg("argmax"),
    "ArgMin": _arg("argmin"),
    "CumSum": _cumulative_sum,
}
