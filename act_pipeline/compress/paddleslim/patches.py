"""What keeps Paddle and PaddleSlim from speaking up, from meeting what another run has left, and from walking in
circles.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock


@contextlib.contextmanager
def own_scope() -> Iterator[None]:
    """Give the run a scope of its own: ACT keeps its variables in the global one, where the next would find them."""
    import paddle

    with paddle.static.scope_guard(paddle.static.Scope()):
        yield


@contextlib.contextmanager
def quick_walks() -> Iterator[None]:
    """Let PaddleSlim look up which ops follow an op, where it compares every input of every op; programs must not
    change.

    ``AutoCompression`` so searches the graph for its last weights (``find_final_nodes``), which takes as long as all of
    the quantization passes.
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


@contextlib.contextmanager
def quick_building() -> Iterator[None]:
    """Let Paddle build programs without what takes it most of the time; no error tells where an op was made then.

    For each op, Paddle reads the source of all functions that led to it (``op_callstack``). For each variable that is
    renamed, as all of the teacher's are, it looks through the block for what C++ may have added.
    """
    from paddle.base import framework

    rename = framework.Block._rename_var

    def rename_alone(block: Any, name: str, new_name: str) -> Any:
        with mock.patch.object(block, "_sync_with_cpp", lambda: None):
            return rename(block, name, new_name)

    with mock.patch.object(framework.Block, "_rename_var", rename_alone):
        with mock.patch.object(framework, "traceback", SimpleNamespace(extract_stack=list)):
            yield
