"""Which op writes a tensor, and which ops read it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class GraphIndex:
    """An index over the ops of a block; it does not follow later changes of the block.

    Attributes:
        ops: in the order of the block.
        producer: tensor -> the op that writes it (the last one).
        readers: tensor -> the ops that read it, in order; an op that reads it twice is there once.
    """

    def __init__(self, ops: Iterable[Any]) -> None:
        """Index ops of ``paddle.static`` (with ``input_arg_names`` and ``output_arg_names``)."""
        self.ops: Sequence[Any] = list(ops)
        self.producer: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        for op in self.ops:
            for name in dict.fromkeys(op.input_arg_names):
                self.readers.setdefault(name, []).append(op)
            self.producer.update(dict.fromkeys(op.output_arg_names, op))
