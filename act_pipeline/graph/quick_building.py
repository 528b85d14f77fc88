"""Faster building of Paddle programs: what Paddle reads only for its error messages is left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock


@contextlib.contextmanager
def quick_building() -> Iterator[None]:
    """Let Paddle build programs without call stacks, repeated conversions, and synchronizations at every renaming.

    These take most of the time. For each op, Paddle reads the source of all functions in the call stack
    (``op_callstack``); without it, error messages do not show where an op was created. For each sum of two tensors with
    an open batch it reads them again, for a deprecation warning (``math_op_patch``). For each variable that is renamed,
    as all of the teacher's are, Paddle searches the block for variables added in C++. And its cache of converted
    methods (``paddle.jit.to_static``) is asked with a bound method, which is a new object each time, so that the
    ``forward`` of a class is converted again for each of its layers; what is kept is the function.
    """
    from paddle.base import framework
    from paddle.base.layers import math_op_patch
    from paddle.jit.dy2static.program_translator import FunctionCache

    rename = framework.Block._rename_var

    def rename_alone(block: Any, name: str, new_name: str) -> Any:
        with mock.patch.object(block, "_sync_with_cpp", lambda: None):
            return rename(block, name, new_name)

    convert = FunctionCache.convert_with_cache

    def convert_once(cache: Any, method: Any) -> Any:
        return convert(cache, getattr(method, "__func__", method))

    no_stack = SimpleNamespace(stack=lambda: [("", "", 0)] * 2)  # an entry is (frame, file, line, ...)
    with contextlib.ExitStack() as patches:
        for place, name, replacement in (
            (framework.Block, "_rename_var", rename_alone),
            (framework, "traceback", SimpleNamespace(extract_stack=list)),
            (FunctionCache, "convert_with_cache", convert_once),
        ):
            patches.enter_context(mock.patch.object(place, name, replacement))
        patches.enter_context(mock.patch.object(math_op_patch, "inspect", no_stack, create=True))
        yield
