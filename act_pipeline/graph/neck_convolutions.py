"""1 x 1 convolutions of concatenated maps, computed with fewer multiplications and the same result.

The neck of a detector upsamples a coarse map, concatenates it with a finer one, and 1 x 1 convolutions read both. Such
a convolution is a sum over its inputs, and it commutes with nearest neighbour upsampling, which copies pixels:

    W [up(a); b] = up(W_a a) + W_b b

The first product then has a quarter of the pixels. Where ``b = P x + c`` is a 1 x 1 convolution itself, with no
activation, as the projections of RT-DETR's encoder are, the two become one: ``W_b b = (W_b P) x + W_b c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.graph.name_scopes import module_of, set_module
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_inserter import Inserter
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR
from act_pipeline.graph.pointwise_convolutions import (
    PointwiseConvolution,
    add_pointwise,
    attributes,
    pointwise_convolution,
)
from act_pipeline.graph.static_graph import StaticGraph

_UPSAMPLING = "nearest_interp_v2"


@dataclass(frozen=True)
class _Part:
    """A tensor that is concatenated.

    Attributes:
        name: the tensor.
        channels: its channels.
        upsampling: the op that upsamples it, if nothing else reads the upsampled tensor.
        projection: the 1 x 1 convolution that makes it, if nothing else reads it.
    """

    name: str
    channels: int
    upsampling: Any = None
    projection: Optional[PointwiseConvolution] = None


def split_neck_convolutions(graph: StaticGraph) -> int:
    """Rewrite the 1 x 1 convolutions that read the concatenation of an upsampled map and others.

    Args:
        graph: a float graph with folded BatchNorm, changed in place.

    Returns:
        The number of convolutions that were rewritten.
    """
    block = graph.program.global_block()
    fetched = {target.name for target in graph.fetch_targets}
    index = GraphIndex(block.ops)
    rewritten = 0
    for concat in [op for op in block.ops if op.type == "concat"]:
        output = concat.output("Out")[0]
        if output in fetched or len(block.var(output).shape) != 4 or concat.attr("axis") not in (1, -3):
            continue
        readers = [pointwise_convolution(graph, index, op) for op in index.readers.get(output, ())]
        convolutions = [reader for reader in readers if reader is not None]
        if not convolutions or len(convolutions) < len(readers):
            continue
        outputs = sum(len(conv.weight) for conv in convolutions)
        parts = [_part(graph, index, name, outputs) for name in concat.input("X")]
        raised = [part for part in parts if part.upsampling is not None]
        if not raised or len(raised) == len(parts):
            continue
        for conv in convolutions:
            _rewrite(graph, conv, parts)
        unread = [concat, *(part.upsampling for part in raised)]
        unread += [op for part in parts if part.projection for op in (part.projection.op, part.projection.addition)]
        for op in unread:
            block._remove_op(block.ops.index(op), sync=False)
        index = GraphIndex(block.ops)
        rewritten += len(convolutions)
    if rewritten:
        graph.remove_unused_parameters()
    return rewritten


def _part(graph: StaticGraph, index: GraphIndex, name: str, outputs: int) -> _Part:
    """Describe a concatenated tensor.

    Args:
        graph: the graph.
        index: its ops.
        name: the tensor.
        outputs: output channels of all convolutions that read it.
    """
    channels = int(graph.program.global_block().var(name).shape[1])
    op = index.producer.get(name)
    if op is None or len(index.readers[name]) != 1 or name in {target.name for target in graph.fetch_targets}:
        return _Part(name, channels)
    if _upsamples(graph, op):
        return _Part(name, channels, upsampling=op)
    projection = (
        pointwise_convolution(graph, index, index.producer.get(op.input("X")[0]))
        if op.type == "elementwise_add"
        else None
    )
    if projection is not None:
        inputs = projection.weight.shape[1]
        if inputs * outputs < channels * (inputs + outputs):
            return _Part(name, channels, projection=projection)
    return _Part(name, channels)


def _upsamples(graph: StaticGraph, op: Any) -> bool:
    """Return whether an op copies the pixels of its only input to a larger map, of a size that is known."""
    if op.type != _UPSAMPLING or op.input_arg_names != op.input("X"):
        return False
    block = graph.program.global_block()
    before, after = (block.var(name).shape[2:] for name in (op.input("X")[0], op.output("Out")[0]))
    return all(0 < small < large for small, large in zip(before, after))


def _rewrite(graph: StaticGraph, conv: PointwiseConvolution, parts: Sequence[_Part]) -> None:
    """Let a convolution read the parts that are not upsampled, and add its products with the others."""
    block = graph.program.global_block()
    weights = np.split(conv.weight, np.cumsum([part.channels for part in parts])[:-1], axis=1)
    bias, kept, names = conv.bias, [], []
    raised: list[Any] = []
    for part, weight in zip(parts, weights):
        if part.upsampling is not None:
            raised.append(_upsampled_product(graph, conv, part, weight, len(raised)))
            continue
        name = part.name
        if part.projection is not None:
            bias = bias + weight @ part.projection.bias
            weight, name = weight @ part.projection.weight, part.projection.op.input("Input")[0]
        kept.append(weight)
        names.append(name)
    _set(graph, conv.name, np.concatenate(kept, axis=1)[:, :, None, None])
    _set(graph, conv.addition.input("Y")[0], bias.reshape(block.var(conv.addition.input("Y")[0]).shape))
    like = block.var(conv.addition.output("Out")[0])
    if len(names) > 1:
        shape = [like.shape[0], sum(weight.shape[1] for weight in kept), *like.shape[2:]]
        joined = block.create_var(name=f"{conv.name}.concatenated", shape=shape, dtype=like.dtype)
        inserter = Inserter(block, block.ops.index(conv.op))
        inserter.add("concat", {"X": [block.var(name) for name in names]}, {"Out": joined}, axis=1)
        names = [joined.name]
    conv.op.desc.set_input("Input", names)
    _add_to_output(graph, conv, raised)


def _upsampled_product(
    graph: StaticGraph, conv: PointwiseConvolution, part: _Part, weight: np.ndarray, number: int
) -> Any:
    """Compute the product with an upsampled part before its upsampling.

    The product has a bias of its own, 0, by which the mean error of its INT8 weights is corrected.

    Args:
        graph: the graph, to which ops are added.
        conv: the convolution of all parts.
        part: the upsampled part.
        weight: the convolution's weight for it, [out, in].
        number: its number among the upsampled parts.

    Returns:
        The variable of the upsampled product.
    """
    block = graph.program.global_block()
    source, like = block.var(part.upsampling.input("X")[0]), block.var(conv.addition.output("Out")[0])
    name = f"{conv.name}.upsampled_{number}"
    inserter = Inserter(block, block.ops.index(conv.op))
    made, biased = add_pointwise(graph, inserter, conv.op, source, name, weight, np.zeros(len(weight)))
    if module_of(conv.op):
        set_module(made, module_of(conv.op))
    if conv.op.has_attr(BATCH_NORM_FACTOR):
        made._set_attr(BATCH_NORM_FACTOR, conv.op.attr(BATCH_NORM_FACTOR))
    raised = block.create_var(name=f"{name}.raised", shape=list(like.shape), dtype=like.dtype)
    inserter.add(_UPSAMPLING, {"X": biased}, {"Out": raised}, **attributes(part.upsampling))
    return raised


def _add_to_output(graph: StaticGraph, conv: PointwiseConvolution, terms: Sequence[Any]) -> None:
    """Add terms to a convolution's output, after its bias: runtimes compute all three in the convolution's kernel."""
    block = graph.program.global_block()
    result = block.var(conv.addition.output("Out")[0])
    total = block.create_var(name=f"{conv.name}.without_upsampled", shape=list(result.shape), dtype=result.dtype)
    conv.addition.desc.set_output("Out", [total.name])
    inserter = Inserter(block, block.ops.index(conv.addition) + 1)
    for number, term in enumerate(terms):
        last = number == len(terms) - 1
        name = f"{conv.name}.with_{number + 1}_upsampled"
        after = result if last else block.create_var(name=name, shape=list(result.shape), dtype=result.dtype)
        inserter.add("elementwise_add", {"X": total, "Y": term}, {"Out": after}, axis=-1)
        total = after


def _set(graph: StaticGraph, name: str, value: np.ndarray) -> None:
    graph.program.global_block().var(name).desc.set_shape(list(value.shape))
    graph.set_parameter(name, value.astype(np.float32))
