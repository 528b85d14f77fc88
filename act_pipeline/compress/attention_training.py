"""Deformable attention by rows in a training: `engines.deformable_attention`, its gradient, and what observers look at.

Paddle derives the gradient (``paddle.static.gradients``) of the attention alone; that takes the place of the ops by
which the training program had it. PaddleSlim's observers of the tensors that are no more look at others of the same
largest absolute value: a tensor has it in any order of its elements.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.engines.deformable_attention import (
    Attention,
    Search,
    Shape,
    corners,
    remove_unread,
    serialized,
    tracing,
)
from act_pipeline.engines.program_desc import argument, parsed, splice, variables

_OBSERVER = "moving_average_abs_max_scale"


@dataclass(frozen=True)
class _Gradients:
    """The variables of a training that hold the loss's gradients by an attention's tensors."""

    output: str
    values: str
    grids: str
    weights: str


def train_by_rows(program: Any) -> Any:
    """Return a training program with its deformable attentions by rows.

    Args:
        program: a `paddle.static.Program` of a training with PaddleSlim's observers; the result has its learning rate.

    Returns:
        another program; the same one, if there is no attention that :class:`Search` knows, or its gradient is computed
        in another way.
    """
    import paddle

    desc = parsed(program.desc.serialize_to_string())
    block = desc.blocks[0]
    search, number = Search(block), 0
    for attention in search.attentions():
        gradients = _gradients(block, search, attention)
        if gradients is not None:
            _replace(block, attention, gradients, f"attention_by_rows_{number}/")
            number += 1
    if not number:
        return program
    rewritten = paddle.static.Program.parse_from_string(desc.SerializeToString())
    if getattr(program, "lr_scheduler", None) is not None:
        rewritten.lr_scheduler = program.lr_scheduler
    return rewritten


def _gradients(block: Any, search: Search, attention: Attention) -> Optional[_Gradients]:
    """Find the gradient's ops by what they share with those of the attention; None: they are others."""
    by_shape = {argument(op.inputs, "XShape"): op for op in block.ops if op.type == "transpose2_grad"}
    turning = (search.writer(name, "transpose2") for name in (attention.output, *attention.turned))
    last, weights, *levels = (by_shape.get(argument(op.outputs, "XShape")) for op in turning)
    if last is None or weights is None or None in levels:
        return None
    of_levels = [argument(op.outputs, "X@GRAD") for op in levels]
    slicing = [op for op in block.ops if op.type == "slice_grad" and argument(op.inputs, "Input") == attention.grids]
    of_grids = sorted(argument(op.outputs, "Input@GRAD") for op in slicing)
    values = [op for op in block.ops if op.type == "concat" and list(variables(op.inputs)) == of_levels]
    grids = [op for op in block.ops if op.type == "sum" and sorted(variables(op.inputs)) == of_grids]
    if len(values) != 1 or len(grids) != 1 or len(of_grids) != len(levels):
        return None
    return _Gradients(
        output=argument(last.inputs, "Out@GRAD"),
        values=argument(values[0].outputs, "Out"),
        grids=argument(grids[0].outputs, "Out"),
        weights=argument(weights.outputs, "X@GRAD"),
    )


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
    """Let the observers of some tensors look at others, which are there before the op at an index."""
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
    """Return an attention and its gradient as one program, and how many ops the attention is.

    It reads `values`, `grids`, `weights` and `output_gradient`, and writes `output`, `values_gradient`,
    `grids_gradient`, `weights_gradient`, and what observers look at: see `Attention.made`.
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
