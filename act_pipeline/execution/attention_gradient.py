"""Deformable attention by gathering rows (`graph.deformable_attention`) in training programs, with its gradient.

``paddle.static.gradients`` derives the gradient of the attention on its own, which replaces the corresponding ops of
the training program. PaddleSlim's observers of removed tensors are connected to tensors with the same largest absolute
value, which does not depend on the order of the elements.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.graph.attention_search import Attention, Search, Shape
from act_pipeline.graph.deformable_attention import corners, serialized, tracing
from act_pipeline.graph.program_desc import argument, parsed, splice, variables
from act_pipeline.graph.unread_ops import remove_unread

_OBSERVER = "moving_average_abs_max_scale"


@dataclass(frozen=True)
class _Gradients:
    """Names of the variables that hold the gradients of the loss with respect to an attention's tensors."""

    output: str
    values: str
    grids: str
    weights: str


def train_by_rows(program: Any) -> Any:
    """Replace the deformable attentions of a training program, forward and backward, with gathering rows.

    Args:
        program: a `paddle.static.Program` with forward and backward pass and PaddleSlim's observers; not changed.

    Returns:
        A new program with the same learning rate schedule; ``program`` itself if :class:`Search` finds no attention, or
        the ops of the gradients do not match.
    """
    import paddle

    desc = parsed(program.desc.serialize_to_string())
    block = desc.blocks[0]
    search, backward, number = Search(block), _Backward(block), 0
    for attention in search.attentions():
        gradients = backward.gradients(search, attention)
        if gradients is not None:
            _replace(block, attention, gradients, f"attention_by_rows_{number}/")
            number += 1
    if not number:
        return program
    rewritten = paddle.static.Program.parse_from_string(desc.SerializeToString())
    if getattr(program, "lr_scheduler", None) is not None:
        rewritten.lr_scheduler = program.lr_scheduler
    return rewritten


class _Backward:
    """Index of the ops of a backward pass that may belong to attentions."""

    def __init__(self, block: Any) -> None:
        self._turned: dict[str, tuple[str, str]] = {}  # XShape -> gradients with respect to output and input
        self._sliced: dict[str, list[str]] = {}
        self._joined: dict[tuple[str, ...], list[str]] = {}
        self._added: dict[tuple[str, ...], list[str]] = {}
        for op in block.ops:
            if op.type == "transpose2_grad":
                self._turned[argument(op.inputs, "XShape")] = (
                    argument(op.inputs, "Out@GRAD"),
                    argument(op.outputs, "X@GRAD"),
                )
            elif op.type == "slice_grad":
                self._sliced.setdefault(argument(op.inputs, "Input"), []).append(argument(op.outputs, "Input@GRAD"))
            elif op.type == "concat":
                self._joined.setdefault(tuple(variables(op.inputs)), []).append(argument(op.outputs, "Out"))
            elif op.type == "sum":
                self._added.setdefault(tuple(sorted(variables(op.inputs))), []).append(argument(op.outputs, "Out"))

    def gradients(self, search: Search, attention: Attention) -> Optional[_Gradients]:
        """Return an attention's gradients, found by variables shared with the forward pass; None: no match."""
        turning = [search.writer(name, "transpose2") for name in (attention.output, *attention.turned)]
        turned = [self._turned.get(argument(op.outputs, "XShape")) for op in turning]
        found = [pair for pair in turned if pair is not None]
        if len(found) < len(turning):
            return None
        (last, _), (_, weights), *levels = found
        of_grids = sorted(self._sliced.get(attention.grids, []))
        values = self._joined.get(tuple(gradient for _, gradient in levels), [])
        grids = self._added.get(tuple(of_grids), [])
        if len(values) != 1 or len(grids) != 1 or len(of_grids) != len(levels):
            return None
        return _Gradients(output=last, values=values[0], grids=grids[0], weights=weights)


def _replace(block: Any, attention: Attention, gradients: _Gradients, prefix: str) -> None:
    raw, forward = _program_with_gradient(attention.shape)
    made = parsed(raw).blocks[0]
    ops = list(made.ops)
    tensors = ("values", "grids", "weights", "output")
    names = {name: getattr(attention, name) for name in tensors}
    names.update({f"{name}_gradient": getattr(gradients, name) for name in tensors})
    same = {**attention.moved, **{old: names.get(new, prefix + new) for old, new in attention.made.items()}}
    unread: set[str] = set()

    def remove(writing: str) -> int:
        at = next(index for index, op in enumerate(block.ops) if writing in variables(op.outputs))
        unread.update(variables(block.ops[at].inputs))
        del block.ops[at]
        return at

    at = splice(block, remove(attention.output), ops[:forward], made.vars, names, prefix)
    _move_observers(block, at, same)
    for name in (gradients.values, gradients.grids, gradients.weights):
        remove(name)
    begin = next(index for index, op in enumerate(block.ops) if gradients.output in variables(op.outputs)) + 1
    splice(block, begin, ops[forward:], (), names, prefix)
    remove_unread(block, unread)


def _move_observers(block: Any, at: int, same: Mapping[str, str]) -> None:
    """Connect observers to other tensors, and move them before the op at index ``at``, where these are computed."""
    moved = []
    for index in reversed(range(len(block.ops))):
        op = block.ops[index]
        if op.type == _OBSERVER and argument(op.inputs, "X") in same:
            moved.append(op)
            del block.ops[index]
            at -= index < at
    for op in moved:
        slot = next(slot for slot in op.inputs if slot.parameter == "X")
        slot.arguments[:] = [same[slot.arguments[0]]]
        block.ops.insert(at, op)


@functools.lru_cache(maxsize=16)
def _program_with_gradient(shape: Shape) -> tuple[bytes, int]:
    """Return an attention and its gradient as one serialized program, and the number of ops of the forward pass.

    It reads `values`, `grids`, `weights` and `output_gradient`, and writes `output`, `values_gradient`,
    `grids_gradient`, `weights_gradient` and the tensors for observers, see `Attention.made`.
    """
    import paddle

    with tracing(shape) as (program, tensors):
        values, grids, weights = tensors
        for tensor in tensors:
            tensor.stop_gradient = False
        count = len(shape.levels) * shape.points
        shares, found = corners(values, grids, shape)
        sampled = paddle.bmm(paddle.reshape(shares, [-1, 1, 4]), paddle.reshape(found, [-1, 4, shape.channels]))
        sampled = paddle.reshape(sampled, [-1, count, shape.channels])
        output = paddle.bmm(paddle.reshape(weights, [-1, 1, count]), sampled)
        output = paddle.reshape(output, [-1, shape.queries, shape.heads * shape.channels])
        written = {"output": output, "sampled": sampled}
        written["product"] = sampled * paddle.reshape(weights, [-1, count, 1])
        for level in range(len(shape.levels)):
            ends = [level * shape.points], [(level + 1) * shape.points]
            written[f"sampled_{level}"] = paddle.slice(sampled, [1], *ends)
        block = program.global_block()
        forward = len(block.ops)
        gradient = block.create_var(name="output_gradient", shape=output.shape, dtype="float32")
        gradients = paddle.static.gradients([output], tensors, [gradient])
        written.update({f"{tensor.name}_gradient": found for tensor, found in zip(tensors, gradients)})
        for name, variable in written.items():
            block._rename_var(variable.name, name)
    return serialized(program), forward
