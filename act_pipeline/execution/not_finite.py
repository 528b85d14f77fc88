"""Find where a training step that ends in NaN or infinity computes the first of them.

A step also updates the weights, so that afterwards all of them may be NaN. :class:`Origin` therefore copies what a step
changes before each step (80 MB for RT-DETR-R18, some 20 ms of a step of seconds), and repeats the failed step on the
copy, without its update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from act_pipeline.execution.runners import make_runner

_OPTIMIZE = 2  # of Paddle's OpRole, a bit mask
_CHUNK_BYTES = 1 << 28
_COLUMNS = ("feed", "fetch")  # variables without an element type


class Origin:
    """The values before the current step, and the step's forward and backward pass."""

    def __init__(self, program: Any, place: Any) -> None:
        """Find what a step changes.

        Args:
            program: a training program with an optimizer, whose variables are in the current scope; not changed.
            place: the device of its variables.
        """
        self._program, self._place = program, place
        block = program.global_block()
        written = {name for op in block.ops for name in op.output_arg_names}
        read = {name for op in _computing(block) for name in op.input_arg_names}
        self._changing = sorted(name for name in written & read if block.var(name).persistable)
        self._before: dict[str, np.ndarray] = {}

    def remember(self) -> None:
        """Copy what the next step changes; call it before the step."""
        import paddle

        scope = paddle.static.global_scope()
        self._before = {name: np.array(scope.find_var(name).get_tensor()) for name in self._changing}

    def find(self, feed: Mapping[str, np.ndarray]) -> str:
        """Repeat the last step on its old values and return where NaN or infinity begins, in words.

        Args:
            feed: the feed of the step.

        Returns:
            The first op in the order of execution that writes NaN or infinity and reads none, and its tensor, or the
            input that is not finite; empty: there is none, since only the update is not finite.
        """
        kinds = {name: _kinds(value) for name, value in feed.items()}
        for name, kind in kinds.items():
            if kind:
                return f"the input {name} holds {' and '.join(sorted(kind))}"
        parameters = self._kinds_of_parameters()
        for chunk in self._chunks(len(next(iter(feed.values())))):
            names = [name for op in chunk for name in self._floats(op.output_arg_names)]
            kinds.update(self._run(feed, names))
            for op in chunk:
                read: set[str] = set()
                for name in op.input_arg_names:
                    read |= kinds.get(name) or parameters.get(name) or set()
                for name in self._floats(op.output_arg_names) if op.input_arg_names else ():
                    new = kinds[name] - read
                    if new and not (read and "NaN" not in new):
                        return f"op {op.type} is the first to write {' and '.join(sorted(new))}, in {name}"
        return ""

    def _kinds_of_parameters(self) -> dict[str, set[str]]:
        import paddle

        scope, block = paddle.static.global_scope(), self._program.global_block()
        found = {}
        for name, variable in block.vars.items():
            if variable.persistable and self._floats([name]) and scope.find_var(name) is not None:
                value = self._before.get(name)
                tensor = scope.find_var(name).get_tensor()
                if value is not None or tensor._is_initialized():
                    found[name] = _kinds(np.array(tensor) if value is None else value)
        return found

    def _floats(self, names: Any) -> list[str]:
        import paddle

        block = self._program.global_block()
        there = [name for name in names if name not in _COLUMNS and block.has_var(name)]
        return [name for name in there if block.var(name).dtype == paddle.float32]

    def _chunks(self, batch: int) -> Iterator[list[Any]]:
        """Yield the ops but the update, in parts whose outputs fit into memory together."""
        block = self._program.global_block()
        chunk: list[Any] = []
        size = 0
        for op in _computing(block):
            sizes = [
                math.prod(batch if n < 0 else n for n in block.var(name).shape)
                for name in self._floats(op.output_arg_names)
            ]
            if chunk and size + 4 * sum(sizes) > _CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(op)
            size += 4 * sum(sizes)
        yield chunk

    def _run(self, feed: Mapping[str, np.ndarray], names: list[str]) -> dict[str, set[str]]:
        """Return the kinds of the values of some variables in a step from the old values."""
        import paddle

        scope = paddle.static.global_scope()
        for name, value in self._before.items():
            scope.find_var(name).get_tensor().set(value, self._place)
        program = self._program.clone()
        block = program.global_block()
        for op in [op for op in block.ops if op.attr("op_role") & _OPTIMIZE]:
            block._remove_op(block.ops.index(op), sync=False)
        program._sync_with_cpp()
        values = make_runner(program, names, self._place).run(feed)
        return {name: _kinds(np.asarray(value)) for name, value in zip(names, values)}


def _computing(block: Any) -> list[Any]:
    return [op for op in block.ops if op.type not in _COLUMNS and not op.attr("op_role") & _OPTIMIZE]


def _kinds(value: np.ndarray) -> set[str]:
    if value.dtype.kind != "f" or np.isfinite(value).all():
        return set()
    return {name for name, test in (("NaN", np.isnan), ("infinity", np.isinf)) if test(value).any()}
