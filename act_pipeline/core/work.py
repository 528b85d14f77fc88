"""A piece of work that consists of many units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Protocol


class Session(Protocol):
    """Works on units, one after the other, in one process."""

    def __call__(self, unit: Any) -> Any:
        """Return the result of a unit."""

    def close(self) -> None:
        """Free what was loaded."""


@dataclass(frozen=True)
class Work:
    """What is done with every unit, and how messages name it. Two works are equal if ``open`` and ``key`` are.

    Attributes:
        open: makes a session of ``shared``, once in each process; a module's own, so that it can be sent.
        shared: the same for all units.
        key: tells ``shared`` from others, for processes that outlive a work (Ray's).
        name: such as ``the analysis``.
        fewer: the flag that sets the number of processes.
        kept: what is left of the work when it breaks off, such as ``; what was measured is kept``; empty: nothing is.
        environment: variables that are set in the processes before they load anything; on Ray, Ray sets its own.
        cpus: the number of CPUs that one unit takes on Ray.
        gpus: the number of GPUs that one unit takes on Ray.
    """

    open: Callable[[Any], Session]
    shared: Any = field(compare=False)
    key: str = ""
    name: str = field(default="the work", compare=False)
    fewer: str = field(default="--workers", compare=False)
    kept: str = field(default="", compare=False)
    environment: Optional[Mapping[str, str]] = field(default=None, compare=False)
    cpus: int = field(default=1, compare=False)
    gpus: int = field(default=0, compare=False)
