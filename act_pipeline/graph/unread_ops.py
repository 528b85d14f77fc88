"""Remove ops whose outputs are no longer read, after a rewrite has connected their readers to other tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from act_pipeline.graph.program_desc import variables


class _Names(NamedTuple):
    type: str
    read: Collection[str]
    written: Collection[str]


def remove_unread(block: Any, names: Iterable[str], keep: Collection[str] = ()) -> int:
    """Remove ops whose outputs are no longer read, and then those that only these read.

    Args:
        block: a block of a ``framework_pb2.ProgramDesc`` or of a ``paddle.static.Program``, changed in place; each op
            stands after the ops whose outputs it reads. For a ``Program``, call ``_sync_with_cpp()`` after the last
            change.
        names: variables that may be unread.
        keep: variables whose producers stay. Producers of the program's inputs (``feed``) stay as well.

    Returns:
        The number of ops removed.
    """
    in_protobuf = hasattr(block, "DESCRIPTOR")
    ops = [
        _Names(op.type, list(variables(op.inputs)), list(variables(op.outputs)))
        if in_protobuf
        else _Names(op.type, op.input_arg_names, op.output_arg_names)
        for op in block.ops
    ]
    unread = _unread(ops, set(names), set(keep))
    for index in unread:
        if in_protobuf:
            del block.ops[index]
        else:
            block._remove_op(index, sync=False)
    return len(unread)


def _unread(ops: Sequence[_Names], names: set[str], keep: set[str]) -> list[int]:
    """Return the indices of the ops to remove, the last one first."""
    reads = Counter(name for op in ops for name in op.read)
    found = []
    for index in reversed(range(len(ops))):
        op = ops[index]
        if op.type == "feed" or names.isdisjoint(op.written) or not keep.isdisjoint(op.written):
            continue
        if not any(reads[name] for name in op.written):
            reads.subtract(op.read)
            names.update(op.read)
            found.append(index)
    return found
