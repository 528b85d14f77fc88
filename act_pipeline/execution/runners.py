"""What runs the programs of a training: on a CPU op by op, and as fast at once as ever after.

``paddle.static.Executor`` plans what may run at the same time: Paddle 2.6.2's ``StreamAnalyzer`` and
``DependencyBuilder`` note for each pair of ops of two steps which comes first. For the 4,700 ops of RT-DETR-R18's
training that takes 6 s and 1.4 GB, on a CPU that then runs one op after the other all the same (`cpu_kernels`). The
executor that Paddle had before, and still carries, plans nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from act_pipeline.execution import cpu_kernels


class Runner(Protocol):
    """A program, and the executor for it."""

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the program once, and return what it was to fetch.

        Args:
            feed: array by variable; names that the program does not have are let be.

        Raises:
            MemoryError, RuntimeError, ValueError: as Paddle's executors do.
        """

    def release_caches(self) -> None:
        """Free what kernels keep from run to run; the next run makes it anew.

        Call it before programs are rewritten: each of Paddle's passes (``Pass::Apply``) lets oneDNN's kernels forget
        what they keep, and does not free it.
        """


def make_runner(program: Any, fetches: Sequence[str], place: Any, scope: Any = None) -> Runner:
    """Return what runs a program on this machine.

    Args:
        program: a `paddle.static.Program` of one block; it belongs to the runner from now on.
        fetches: the variables that :meth:`Runner.run` returns.
        place: where its variables are.
        scope: holds them; None: the one that is the global one now.
    """
    import paddle

    made = OpByOp if cpu_kernels.on_cpu() else Planned
    return made(program, fetches, place, scope or paddle.static.global_scope())


class Planned:
    """By `paddle.static.Executor`: several ops at once, on several streams of a GPU."""

    def __init__(self, program: Any, fetches: Sequence[str], place: Any, scope: Any) -> None:
        import paddle

        self._program, self._fetches, self._scope = program, list(fetches), scope
        self._executor = paddle.static.Executor(place)

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._executor.run(self._program, feed=feed, fetch_list=self._fetches, scope=self._scope)

    def release_caches(self) -> None:
        pass


class OpByOp:
    """By the executor that plans nothing; in one thread at a time."""

    def __init__(self, program: Any, fetches: Sequence[str], place: Any, scope: Any) -> None:
        import paddle

        block = program.global_block()
        for op in [op for op in block.ops if op.type in ("feed", "fetch")]:
            block._remove_op(block.ops.index(op), sync=False)
        self._program, self._fetches, self._place, self._scope = program, list(fetches), place, scope
        self._nothing = paddle.static.Program()
        self._running = threading.Lock()
        self._executor: Any = None
        self._prepared: Any = None

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        values = {name: array for name, array in feed.items() if self._program.global_block().has_var(name)}
        scheduler = getattr(self._program, "lr_scheduler", None)
        if scheduler is not None:
            values[scheduler._var_name] = np.array([scheduler()], np.float32)
        inner_scope, new_variables, keep_inner_scopes = False, False, False
        with self._running:
            if self._executor is None:
                self._prepare()
            for name, array in values.items():
                self._scope.var(name).get_tensor().set(array, self._place)
            # What oneDNN's kernels keep, they keep for the executor that this thread has named last; one names itself
            # when it runs a program that it has not prepared.
            self._executor.run(self._nothing.desc, self._scope, 0, inner_scope, new_variables, [])
            self._executor.run_prepared_ctx(self._prepared, self._scope, inner_scope, new_variables, keep_inner_scopes)
            return [np.array(self._scope.find_var(name).get_tensor()) for name in self._fetches]

    def release_caches(self) -> None:
        with self._running:
            self._prepared = self._executor = None

    def _prepare(self) -> None:
        from paddle.base import core

        place = core.Place()
        place.set_place(self._place)
        self._executor = core.Executor(place)
        self._executor.create_variables(self._program.desc, self._scope, 0)
        # What is neither persistable nor named here is freed after the op that reads it last.
        self._prepared = self._executor.prepare(self._program.desc, 0, self._fetches, False)
