"""Removal of ops whose outputs are no longer read, in both forms of a program."""

from __future__ import annotations

import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.graph.program_desc import parsed, variables
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.graph.unread_ops import remove_unread


def program():
    """Return a program: image -> relu -> exp -> sqrt, relu -> abs -> the output, and image -> tanh."""
    import paddle

    main = paddle.static.Program()
    with static_mode(), paddle.static.program_guard(main), paddle.utils.unique_name.guard():
        block = main.global_block()
        block.create_var(name="feed", persistable=True, type=paddle.base.core.VarDesc.VarType.FEED_MINIBATCH)
        for name in ("image", "relu", "exp", "sqrt", "abs", "tanh"):
            block.create_var(name=name, shape=[4], dtype="float32")
        block.append_op(type="feed", inputs={"X": ["feed"]}, outputs={"Out": ["image"]}, attrs={"col": 0})
        for kind, read in (("relu", "image"), ("exp", "relu"), ("sqrt", "exp"), ("abs", "relu"), ("tanh", "image")):
            block.append_op(type=kind, inputs={"X": [read]}, outputs={"Out": [kind]})
    return main


def static_block():
    block = program().global_block()
    return block, lambda: [op.output_arg_names[0] for op in block.ops]


def protobuf_block():
    block = parsed(program().desc.serialize_to_string()).blocks[0]
    return block, lambda: [next(variables(op.outputs)) for op in block.ops]


@pytest.mark.parametrize("make", [static_block, protobuf_block])
@pytest.mark.parametrize(
    ("names", "keep", "left"),
    [
        (["sqrt"], [], ["image", "relu", "abs", "tanh"]),  # exp is read by nothing else, relu is
        (["sqrt", "abs"], [], ["image", "tanh"]),
        (["sqrt", "abs", "tanh"], [], ["image"]),  # the input of the program stays
        (["sqrt"], ["exp"], ["image", "relu", "exp", "abs", "tanh"]),
        (["exp"], [], ["image", "relu", "exp", "sqrt", "abs", "tanh"]),  # it is read
        ([], [], ["image", "relu", "exp", "sqrt", "abs", "tanh"]),
    ],
)
def test_what_nothing_reads_is_removed_with_what_only_that_reads(make, names, keep, left) -> None:
    block, outputs = make()
    before = len(block.ops)
    assert remove_unread(block, names, keep) == before - len(left)
    assert outputs() == left
