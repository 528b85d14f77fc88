"""The parts of an imported detector, found by which inputs an op depends on.

A graph from an ONNX file does not have its layers in the order that `graph.rtdetr_modules` expects. What its ops depend
on still tells them apart: a text tower reads token ids only, a backbone the image only, an encoder both, and a decoder
works on the queries that a top-k has selected.
"""

from __future__ import annotations

from typing import Any

from act_pipeline.graph.op_types import TOP_K
from act_pipeline.graph.static_graph import StaticGraph

TEXT, BACKBONE, ENCODER, DECODER = "text", "backbone", "encoder", "decoder"
_QUERIES = "queries of a top-k"


def find_towers(graph: StaticGraph) -> dict[str, str]:
    """Return the part that each op belongs to.

    Args:
        graph: a float graph.

    Returns:
        Name of an output -> ``text``, ``backbone``, ``encoder`` or ``decoder``. In a graph without a text, only the
        ``decoder`` is found. Ops that depend on no input are left out.
    """
    block = graph.program.global_block()
    texts = {name for name in graph.feed_names if _is_text(block.var(name))}
    images = {name for name in graph.feed_names if len(block.var(name).shape) == 4}
    sources: dict[str, frozenset[str]] = {name: frozenset([name]) for name in graph.feed_names}
    for op in block.ops:
        if op.type in ("feed", "fetch"):
            continue
        found = frozenset().union(*(sources.get(name, frozenset()) for name in op.input_arg_names))
        if op.type in TOP_K:
            found |= {_QUERIES}
        sources.update(dict.fromkeys(op.output_arg_names, found))
    towers = {}
    for name, found in sources.items():
        if _QUERIES in found:
            towers[name] = DECODER
        elif texts and found:
            towers[name] = TEXT if found <= texts else BACKBONE if not found & texts and found & images else ENCODER
    return towers


def _is_text(variable: Any) -> bool:
    """Return whether an input holds a row of tokens for each text, as integers or booleans [N, T]."""
    kind = str(variable.dtype).lower()
    return len(variable.shape) == 2 and ("int" in kind or "bool" in kind)
