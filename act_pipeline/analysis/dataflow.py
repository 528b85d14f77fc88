"""Which ops of a program depend on others, and which tensors lie between them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from act_pipeline.graph.program_desc import variables


class DataFlow:
    """The ops of a program; a position is an index into :attr:`nodes`.

    Attributes:
        nodes: the ops, protobuf messages, in order.
        reads, writes: names of the tensors of each op.
    """

    def __init__(self, nodes: Sequence[Any]) -> None:
        """Index protobuf ops, without feed and fetch ops."""
        self.nodes = nodes
        self.reads = [list(variables(node.inputs)) for node in nodes]
        self.writes = [list(variables(node.outputs)) for node in nodes]
        self._position = {names[0]: index for index, names in enumerate(self.writes) if names}

    def written(self, positions: Iterable[int] | None = None) -> set[str]:
        """Return the tensors that ops write; all ops for None."""
        everywhere = range(len(self.nodes)) if positions is None else positions
        return {name for index in everywhere for name in self.writes[index]}

    def needed(self, wanted: Collection[str], positions: Sequence[int] | None = None) -> list[int]:
        """Return the positions, in order, of the ops that contribute to tensors.

        Args:
            wanted: names of the tensors.
            positions: the ops to choose from, in order; None for all ops.
        """
        missing, kept = set(wanted), []
        for index in reversed(range(len(self.nodes)) if positions is None else positions):
            if not missing.isdisjoint(self.writes[index]):
                missing.update(self.reads[index])
                kept.append(index)
        return kept[::-1]

    def affected(self, names: Collection[str], wanted: Collection[str]) -> list[int]:
        """Return the positions of the ops that depend on other ops and contribute to tensors.

        Args:
            names: first outputs of these other ops, which are included.
            wanted: names of the tensors.
        """
        starts = {self._position[name] for name in names}
        changed: set[str] = set()
        positions = []
        for index in range(min(starts, default=len(self.nodes)), len(self.nodes)):
            if index in starts or not changed.isdisjoint(self.reads[index]):
                changed.update(self.writes[index])
                positions.append(index)
        return self.needed(wanted, positions)

    def boundary(self, positions: Sequence[int]) -> set[str]:
        """Return the tensors that ops read and none of them writes."""
        return {name for index in positions for name in self.reads[index]} - self.written(positions)
