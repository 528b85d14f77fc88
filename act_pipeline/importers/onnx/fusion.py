"""Layer normalizations that an exporter wrote in parts become one node again.

Below opset 17 there is no LayerNormalization, so PyTorch writes ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div, and
Mul and Add with the weights. As one op, its scale and shift are trained as in the framework that the model is from, and
its gradient is computed in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Optional

import numpy as np

from act_pipeline.importers.onnx.source import Node

LAYER_NORM = "LayerNormalization"


def fuse_layer_norms(
    nodes: Sequence[Node], constants: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> tuple[Node, ...]:
    """Replace the parts of layer normalizations over the last axes by one node each.

    Args:
        nodes: the nodes of a graph, sorted.
        constants: name -> value of the initializers.
        outputs: the names of the graph's outputs.

    Returns:
        The nodes, sorted. Parts that another node or an output reads stay as they are.
    """
    search = _Search(nodes, constants, outputs)
    removed: set[int] = set()
    replaced: dict[int, Node] = {}
    for node in nodes:
        found = search.parts_and_whole(node)
        if found is not None:
            parts, whole = found
            removed.update(id(part) for part in parts[:-1])
            replaced[id(parts[-1])] = whole
    return tuple(replaced.get(id(node), node) for node in nodes if id(node) not in removed)


class _Search:
    """The search for layer normalizations, which begins at their division."""

    def __init__(self, nodes: Sequence[Node], constants: Mapping[str, np.ndarray], outputs: Sequence[str]) -> None:
        self._constants = {
            **constants,
            **{node.outputs[0]: np.asarray(value) for node, value in _constant_nodes(nodes)},
        }
        self._producers = {name: node for node in nodes for name in node.outputs if name}
        self._readers: dict[str, list[Node]] = {}
        for node in nodes:
            for name in {*node.inputs}:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {*outputs}

    def parts_and_whole(self, division: Node) -> Optional[tuple[list[Node], Node]]:
        """Return the parts of the layer normalization that a division belongs to, sorted, and the node to replace them.

        None: it belongs to none.
        """
        if division.type != "Div":
            return None
        difference, root = (self._producers.get(name) for name in division.inputs)
        if difference is None or difference.type != "Sub" or root is None or root.type != "Sqrt":
            return None
        source = difference.inputs[0]
        mean = self._mean_of(difference.inputs[1], source)
        shifted = self._producers.get(root.inputs[0])
        epsilon, variance = self._with_constant(shifted, "Add")
        squared_mean = self._producers.get(variance)
        square = None if squared_mean is None else self._producers.get(squared_mean.inputs[0])
        if mean is None or shifted is None or squared_mean is None or square is None or epsilon is None:
            return None
        axes = self._last_axes(mean)
        if axes is None or axes != self._last_axes(squared_mean) or not self._is_square(square, difference.outputs[0]):
            return None
        if epsilon.size != 1 or not float(epsilon.reshape(())) > 0:
            return None
        parts = [mean, difference, square, squared_mean, shifted, root, division]
        inputs = [source]
        for kind in ("Mul", "Add"):
            reader = self._only_reader(parts[-1].outputs[0])
            value, other = self._with_constant(reader, kind)
            if reader is None or value is None or value.ndim != len(axes) or other != parts[-1].outputs[0]:
                break
            parts.append(reader)
            inputs.append(next(name for name in reader.inputs if name in self._constants))
        # Without a scale it may be any standardization.
        if len(inputs) == 1 or not self._are_inside(parts):
            return None
        attrs = {"axis": min(axes), "epsilon": float(epsilon.reshape(()))}
        return parts, Node(LAYER_NORM, division.name, tuple(inputs), parts[-1].outputs, attrs)

    def _mean_of(self, name: str, source: str) -> Optional[Node]:
        node = self._producers.get(name)
        return node if node is not None and node.type == "ReduceMean" and node.inputs[0] == source else None

    def _last_axes(self, node: Node) -> Optional[list[int]]:
        """Return the negative axes of a mean that keeps them, if they are the last ones; else None."""
        if node.type != "ReduceMean" or not node.attrs.get("keepdims", 1):
            return None
        axes = node.attrs.get("axes")
        if axes is None and node.has(1):
            axes = self._constants.get(node.inputs[1])
        if axes is None:
            return None
        found = sorted(int(axis) for axis in np.atleast_1d(axes))
        return found if found == list(range(-len(found), 0)) else None

    def _is_square(self, node: Node, base: str) -> bool:
        if node.type == "Mul":
            return node.inputs == (base, base)
        exponent = self._constants.get(node.inputs[1]) if node.type == "Pow" and node.inputs[0] == base else None
        return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2

    def _with_constant(self, node: Optional[Node], kind: str) -> tuple[Optional[np.ndarray], str]:
        """Return the constant and the other operand of an op; None and the empty text if it has no constant."""
        if node is None or node.type != kind:
            return None, ""
        for constant, other in ((1, 0), (0, 1)):
            if node.inputs[constant] in self._constants and node.inputs[other] not in self._constants:
                return self._constants[node.inputs[constant]], node.inputs[other]
        return None, ""

    def _only_reader(self, name: str) -> Optional[Node]:
        readers = self._readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self._outputs else None

    def _are_inside(self, parts: Sequence[Node]) -> bool:
        """Return whether nothing but the parts reads what they write, the last one's output apart."""
        inside = {id(part) for part in parts}
        written = [name for part in parts[:-1] for name in part.outputs]
        return not any(
            name in self._outputs or any(id(reader) not in inside for reader in self._readers.get(name, ()))
            for name in written
        )


def _constant_nodes(nodes: Sequence[Node]) -> Iterator[tuple[Node, np.ndarray]]:
    from onnx import numpy_helper

    for node in nodes:
        if node.type == "Constant" and "value" in node.attrs:
            yield node, numpy_helper.to_array(node.attrs["value"])
