"""A training program run by the executor that goes through the ops in their order, as fast at once as ever after.

``paddle.static.Executor`` plans what may run at the same time: Paddle 2.6.2's ``StreamAnalyzer`` and
``DependencyBuilder`` note for each pair of ops of two steps which comes first. For the 4,700 ops of RT-DETR-R18's
training that takes 6 s and 1.4 GB, on a CPU that then runs one op after the other all the same (`cpu_kernels`). The
executor that Paddle had before, and still carries, plans nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class OpByOp:
    """A program ready to run, in the scope that is the global one now."""

    def __init__(self, program: Any, fetches: Sequence[str], place: Any) -> None:
        """Take the program; ops are made when it first runs.

        Args:
            program: a `paddle.static.Program` of one block; loses its ``feed`` ops and must not be changed afterwards.
            fetches: the variables that :meth:`run` returns.
            place: a `paddle.CPUPlace`.
        """
        import paddle

        block = program.global_block()
        for op in [op for op in block.ops if op.type == "feed"]:
            block._remove_op(block.ops.index(op), sync=False)
        self._program, self._fetches, self._place = program, list(fetches), place
        self._scope = paddle.static.global_scope()
        self._nothing = paddle.static.Program()
        self._executor: Any = None
        self._prepared: Any = None

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the program once, and return what was asked for.

        Args:
            feed: array by variable; names that the program does not have are let be.

        Raises:
            MemoryError, RuntimeError, ValueError: as `paddle.static.Executor.run` does.
        """
        if self._executor is None:
            self._prepare()
        values = {name: array for name, array in feed.items() if self._program.global_block().has_var(name)}
        scheduler = getattr(self._program, "lr_scheduler", None)
        if scheduler is not None:
            values[scheduler._var_name] = np.float32([scheduler()])
        for name, array in values.items():
            self._scope.var(name).get_tensor().set(array, self._place)
        inner_scope, new_variables, keep_inner_scopes = False, False, False
        # What oneDNN's kernels keep, they keep for the executor that this thread has named last; one names itself when it
        # runs a program that it has not prepared.
        self._executor.run(self._nothing.desc, self._scope, 0, inner_scope, new_variables, [])
        self._executor.run_prepared_ctx(self._prepared, self._scope, inner_scope, new_variables, keep_inner_scopes)
        return [np.array(self._scope.find_var(name).get_tensor()) for name in self._fetches]

    def rest(self) -> None:
        """Free what oneDNN's kernels keep from run to run; the next run makes it anew.

        Call it before programs are rewritten: each of Paddle's passes (``Pass::Apply``) lets the kernels forget what they
        keep, but does not free it.
        """
        self._prepared = self._executor = None

    def _prepare(self) -> None:
        from paddle.base import core

        place = core.Place()
        place.set_place(self._place)
        self._executor = core.Executor(place)
        self._executor.create_variables(self._program.desc, self._scope, 0)
        # What is neither persistable nor named here is freed after the op that reads it last.
        self._prepared = self._executor.prepare(self._program.desc, 0, self._fetches, False)
