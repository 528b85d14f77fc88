"""Patches of Paddle and PaddleSlim: a scope for each run, and a faster search of programs."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def own_scope() -> Iterator[None]:
    """Run with a separate scope, since ACT leaves its variables in the global scope, where the next run finds them."""
    import paddle

    with paddle.static.scope_guard(paddle.static.Scope()):
        yield


@contextlib.contextmanager
def quick_walks() -> Iterator[None]:
    """Replace ``GraphWrapper.next_ops`` by a lookup in an index; programs must not change meanwhile.

    PaddleSlim compares every input of every op instead. ``AutoCompression`` searches the graph in this way for its last
    weights (``find_final_nodes``), which takes as long as all quantization passes together.
    """
    from paddleslim.core import GraphWrapper

    def next_ops(graph: Any, op: Any) -> list[Any]:
        readers = graph.__dict__.get("_readers")
        if readers is None:
            readers = graph.__dict__["_readers"] = defaultdict(list)
            for reader in graph.ops():
                for name in dict.fromkeys(reader._op.input_arg_names):
                    readers[name].append(reader)
        found = (reader for name in op._op.output_arg_names for reader in readers[name])
        return sorted(reader for reader in found if reader.idx() != op.idx())

    with mock.patch.object(GraphWrapper, "next_ops", next_ops):
        yield
