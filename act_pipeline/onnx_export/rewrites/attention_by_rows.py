"""Deformable attention that gathers rows, for runtimes on a CPU.

``GridSample`` reads each channel of a sampling point from another place in memory, and needs the values transposed
before. Gathered by rows (:mod:`act_pipeline.graph.deformable_attention`), the channels of a head are next to each
other.
The values are the same up to the order of additions.
"""

from __future__ import annotations

import dataclasses

from act_pipeline.graph.deformable_attention import attend_by_rows
from act_pipeline.graph.program_desc import parsed
from act_pipeline.graph.static_graph import StaticGraph


def with_attention_by_rows(graph: StaticGraph) -> StaticGraph:
    """Return the graph with the deformable attentions that PaddleDetection exports computed by rows.

    Args:
        graph: a graph without gradients; not changed, and its parameters are shared.

    Returns:
        The graph itself if it has no such attention.
    """
    import paddle

    desc = parsed(graph.program.desc.serialize_to_string())
    if not attend_by_rows(desc):
        return graph
    return dataclasses.replace(graph, program=paddle.static.Program.parse_from_string(desc.SerializeToString()))
