"""Write programs in a fixed order of ops, since Paddle's passes leave one that differs from run to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from act_pipeline.graph.program_desc import parsed


def in_order(program: Any, outputs: Sequence[str]) -> Any:
    """Return the program with its ops in the order of the float program, and Q/DQ just before their first reader.

    Paddle's passes iterate over sets of nodes, whose order depends on memory addresses. Without this, no two runs
    would write the same file.

    Args:
        program: an inference program. It is returned unchanged if it has several blocks or a variable that is written
            twice.
        outputs: the first output of each op of the float program, in its order.
    """
    import paddle

    desc = parsed(program.desc.serialize_to_string())
    block = desc.blocks[0]
    ops = list(block.ops)
    names = [[name for slot in op.outputs for name in slot.arguments] for op in ops]
    if len(desc.blocks) > 1 or len({name for written in names for name in written}) < sum(map(len, names)):
        return program
    producer = {name: index for index, written in enumerate(names) for name in written}
    rank = {name: position for position, name in enumerate(outputs)}
    known = [index for index, written in enumerate(names) if written and written[0] in rank]
    ordered: dict[int, None] = {}

    def place(index: int) -> None:
        # Recursive. Since ops are visited in the float program's order, the depth is at most a chain of Q/DQ.
        if index not in ordered:
            for slot in ops[index].inputs:
                for name in slot.arguments:
                    if name in producer and producer[name] != index:
                        place(producer[name])
            ordered[index] = None

    for index in sorted(known, key=lambda index: rank[names[index][0]]):
        place(index)
    for index in range(len(ops)):
        place(index)
    del block.ops[:]
    block.ops.extend(ops[index] for index in ordered)
    return paddle.static.Program.parse_from_string(desc.SerializeToString())
