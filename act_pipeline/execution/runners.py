"""Execution of training programs; on a CPU by Paddle's older executor, which needs no scheduling.

``paddle.static.Executor`` schedules ops for parallel execution: ``StreamAnalyzer`` and ``DependencyBuilder`` of Paddle
2.6.2 store the order of each pair of ops of two steps. For the 4,700 ops of RT-DETR-R18's training this takes 6 s and
1.4 GB, although the CPU runs one op at a time (`cpu_cores`). Paddle's older executor, which 2.6.2 still contains,
does no scheduling.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from act_pipeline.execution import cpu_cores


class Runner(Protocol):
    """A program with its executor."""

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the program once.

        Args:
            feed: name of an input variable -> array.

        Returns:
            The values of the fetched variables, in the order given to :func:`make_runner`.

        Raises:
            MemoryError, RuntimeError, ValueError: raised by Paddle's executors.
        """

    def release_caches(self) -> None:
        """Free the caches of kernels; the next run creates them again.

        Call it before programs are rewritten: each of Paddle's passes (``Pass::Apply``) drops the caches of oneDNN's
        kernels without freeing them.
        """


def make_runner(program: Any, fetches: Sequence[str], place: Any, scope: Any = None) -> Runner:
    """Return a runner of a program: :class:`OpByOp` on a CPU with oneDNN, otherwise :class:`Planned`.

    Args:
        program: a `paddle.static.Program` with one block; the runner may change it.
        fetches: names of the variables that :meth:`Runner.run` returns.
        place: the device, such as ``paddle.CPUPlace()``.
        scope: the scope of its variables; None: the current global scope.
    """
    import paddle

    made = OpByOp if cpu_cores.on_cpu() else Planned
    return made(program, fetches, place, scope or paddle.static.global_scope())


class Planned:
    """Runs a program by `paddle.static.Executor`, which schedules ops in parallel, on several streams of a GPU."""

    def __init__(self, program: Any, fetches: Sequence[str], place: Any, scope: Any) -> None:
        import paddle

        self._program, self._fetches, self._scope = program, list(fetches), scope
        self._executor = paddle.static.Executor(place)

    def run(self, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self._executor.run(self._program, feed=feed, fetch_list=self._fetches, scope=self._scope)

    def release_caches(self) -> None:
        pass


class OpByOp:
    """Runs a program by Paddle's older executor, one op at a time, in one thread at a time."""

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
            # oneDNN's kernels assign their caches to the executor that this thread has registered last. An executor
            # registers itself only when it runs a program that it has not prepared, hence the empty program.
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
        # Variables that are neither persistable nor in `fetches` are freed after their last reader.
        self._prepared = self._executor.prepare(self._program.desc, 0, self._fetches, False)
