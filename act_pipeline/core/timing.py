"""Wall-clock time of the stages of a job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, MutableMapping


@contextlib.contextmanager
def timed(seconds: MutableMapping[str, float], stage: str) -> Iterator[None]:
    """Add the wall-clock seconds of the ``with`` block to ``seconds[stage]``, also if the block raises an error.

    >>> seconds: dict[str, float] = {}
    >>> with timed(seconds, "prepare"):
    ...     pass
    >>> list(seconds)
    ['prepare']

    Args:
        seconds: stage -> seconds; a stage that is timed more than once accumulates.
        stage: name of the stage.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
