"""Run programs one op at a time on all cores of the CPU.

By default Paddle runs as many ops in parallel as there are cores, each on one core, and each needs memory.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from act_pipeline.core.cpus import available_cpus

_WAIT_MS = 1


def on_cpu() -> bool:
    """Return whether Paddle computes on the CPU and was built with oneDNN."""
    import paddle

    return paddle.get_device() == "cpu" and paddle.base.core.is_compiled_with_mkldnn()


@contextlib.contextmanager
def all_cores(sharing: int = 1) -> Iterator[None]:
    """Run programs in the block one op at a time, each on all cores; without effect on a GPU.

    Args:
        sharing: number of processes that share the CPUs that this process may use.
    """
    if not on_cpu():
        yield
        return
    openmp = _openmp()
    # In Intel's OpenMP library, threads spin for 200 ms while they wait for the next parallel op. The thread that
    # prefetches the next batch needs these cores.
    waiting = [library.dynlib for library in openmp.lib_controllers if hasattr(library.dynlib, "kmp_set_blocktime")]
    before = [library.kmp_get_blocktime() for library in waiting]
    # Paddle sets OMP_NUM_THREADS to 1 when it is imported.
    with op_after_op(), openmp.limit(limits=max(available_cpus() // sharing, 1)):
        try:
            for library in waiting:
                library.kmp_set_blocktime(_WAIT_MS)
            yield
        finally:
            for library, milliseconds in zip(waiting, before):
                library.kmp_set_blocktime(milliseconds)


@functools.lru_cache(maxsize=1)
def _openmp() -> Any:
    """Return a controller of the OpenMP libraries of this process, including Paddle's."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="openmp")


@contextlib.contextmanager
def op_after_op() -> Iterator[None]:
    """Run programs in the block, in all threads, one op at a time each; without effect on a GPU."""
    import paddle

    if not on_cpu():
        yield
        return
    flag = "FLAGS_new_executor_serial_run"
    before = paddle.get_flags([flag])
    paddle.set_flags({flag: True})
    try:
        yield
    finally:
        paddle.set_flags(before)
