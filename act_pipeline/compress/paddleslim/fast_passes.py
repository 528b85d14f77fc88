"""Run Paddle 2.6.2's quantization passes in time that grows linearly with the graph, with the same result.

The passes are Paddle's own (`paddle.static.quantization.quantization_pass`). These steps of theirs take minutes on a
graph of RT-DETR's size, and :func:`fast_passes` replaces them:

- ``IrGraph.link_to`` and ``update_input_link`` assert that their nodes are in the graph, and build the set of all nodes
  for that on every call;
- ``OutScaleForTrainingPass`` builds the set of all variables for every output of every op to check whether a name is
  taken, and also observes the tensors of the teacher and of `detection_loss`, whose scales are never read;
- ``QuantWeightPass`` rounds the weights channel by channel in Python.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from act_pipeline.compress.paddleslim.prefixes import LOSS_PREFIX, TEACHER_PREFIX

_SCALE_OF_ZEROS = 1e-8  # as in Paddle's `quant_tensor`


@contextlib.contextmanager
def fast_passes() -> Iterator[None]:
    """Replace the slow steps of Paddle's quantization passes in the ``with`` block."""
    from paddle.base.framework import IrGraph
    from paddle.static.quantization import quantization_pass

    out_scale, utils = quantization_pass.OutScaleForTrainingPass, quantization_pass.utils
    with contextlib.ExitStack() as stack:
        for target, name, replacement in (
            (IrGraph, "link_to", _link_to),
            (IrGraph, "update_input_link", _update_input_link),
            (IrGraph, "_find_node_by_name", _finder(IrGraph._find_node_by_name)),
            (out_scale, "apply", _observer_of_student(out_scale.apply)),
            (utils, "quant_tensor", _channel_quantizer(utils.quant_tensor)),
            (quantization_pass, "tqdm", _Silent),
        ):
            stack.enter_context(mock.patch.object(target, name, replacement))
        yield


def _link_to(graph: Any, node_in: Any, node_out: Any) -> None:
    node_in.append_output(node_out)
    node_out.append_input(node_in)


def _update_input_link(graph: Any, old_input_node: Any, new_input_node: Any, op_node: Any) -> None:
    old_input_node.remove_output(op_node)
    op_node.remove_input(old_input_node)
    new_input_node.append_output(op_node)
    op_node.append_input(new_input_node)
    op_node.rename_input(old_input_node.name(), new_input_node.name())


class _VarNodes:
    """Replacement of the set of a graph's variable nodes, in which the passes only look up names."""

    def __init__(self, names: set[str]):
        self.names = names


def _finder(find: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``IrGraph._find_node_by_name`` that also takes :class:`_VarNodes`."""

    def find_node_by_name(graph: Any, nodes: Any, node_name: str) -> Any:
        if isinstance(nodes, _VarNodes):
            if node_name not in nodes.names:
                raise AssertionError(f"Cannot find the target node ({node_name}) in the giving set.")
            return None
        return find(graph, nodes, node_name)

    return find_node_by_name


def _observer_of_student(observe: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``OutScaleForTrainingPass.apply`` that looks up names in one set, and observes only the student."""

    def apply(self: Any, graph: Any) -> Any:
        names = {node.name() for node in graph.graph.nodes() if node.is_var()}
        all_op_nodes, create = graph.all_op_nodes, graph.create_persistable_node

        def create_and_note(name: str, *args: Any, **kwargs: Any) -> Any:
            names.add(name)
            return create(name, *args, **kwargs)

        with mock.patch.multiple(
            graph,
            all_op_nodes=lambda: [op for op in all_op_nodes() if not _is_of_training(op)],
            all_var_nodes=lambda: _VarNodes(names),
            create_persistable_node=create_and_note,
        ):
            return observe(self, graph)

    return apply


def _is_of_training(op_node: Any) -> bool:
    outputs = op_node.op().output_arg_names()
    return bool(outputs) and all(name.startswith((TEACHER_PREFIX, LOSS_PREFIX)) for name in outputs)


def _channel_quantizer(quantize: Callable[..., Any]) -> Callable[..., Any]:
    """Return Paddle's ``quant_tensor`` that rounds all channels of a weight at once."""

    def quant_tensor(
        x: np.ndarray, scale: Any, quant_axis: int = 0, weight_bits: int = 8, onnx_format: bool = False
    ) -> np.ndarray:
        if not onnx_format or not isinstance(scale, list) or len(scale) == 1:
            return quantize(x, scale, quant_axis, weight_bits, onnx_format)
        scales = np.array([value or _SCALE_OF_ZEROS for value in scale], x.dtype)
        along = [-1 if axis == bool(quant_axis) else 1 for axis in range(x.ndim)]
        largest = 2 ** (weight_bits - 1) - 1
        return np.clip(np.rint(x / scales.reshape(along) * largest), -largest - 1, largest)

    return quant_tensor


class _Silent:
    """Replacement of the passes' progress bars, which count internal ops."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass
