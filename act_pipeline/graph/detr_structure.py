"""The query selection and the post-process of a DETR, found by the structure of its graph, whatever the names are.

An RT-DETR selects its queries by a top-k whose indices a gather reads, and its post-process by another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import GATHERING, TOP_K

# What may stand between a top-k and the gather that reads its indices.
_INDEXING = ("stack", "concat", "unsqueeze2", "cast", "tile", "expand_v2", "reshape2", "elementwise_add", "assign")


class DetrStructure(GraphIndex):
    """The ops of an inference program, and the top-ks that select queries and detections among them."""

    def __init__(self, program: Any) -> None:
        """Index a `paddle.static.Program`, which is not changed."""
        self._block = program.global_block()
        super().__init__(self._block.ops)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, -1 for a dynamic dimension."""
        return tuple(self._block.var(name).shape)

    def query_selections(self) -> Iterator[Any]:
        """Yield the top-k ops whose indices a gather reads, in order; in an RT-DETR the first one selects queries."""
        for op in self.ops:
            if op.type in TOP_K and self._is_gathered(op.output("Indices")[0]):
                yield op

    def detection_selection(self, queries: str) -> Optional[Any]:
        """Return the top-k of the post-process: the last one; None: the graph ends before it.

        Args:
            queries: indices of the selected queries, see :meth:`query_selections`.
        """
        found = (op for op in reversed(self.ops) if op.type in TOP_K and op.output("Indices")[0] != queries)
        return next(found, None)

    def _is_gathered(self, indices: str) -> bool:
        return self.downstream([indices], lambda op: op.type in GATHERING, _INDEXING) is not None
