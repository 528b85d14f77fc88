"""Training curves as scalars for VisualDL, PaddlePaddle's visualization tool."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# VisualDL recognizes its files by the prefix of the name.
LOG_FILENAME = "vdlrecords.act.log"


class Scalars:
    """Scalars of one run in a folder for ``visualdl --logdir``; has no effect if VisualDL is not installed.

    >>> with contextlib.closing(Scalars("output/rtdetr_int8/visualdl")) as scalars:  # doctest: +SKIP
    ...     scalars.add("train/loss", 3.9, step=1)

    Attributes:
        path: the log file; None if VisualDL is not installed.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Open the log; that of an earlier run is replaced, since VisualDL would join both into one curve.

        Args:
            directory: the folder of the log.
        """
        self.path: Path | None = None
        self._writer: Any = None
        if importlib.util.find_spec("visualdl") is None:
            return
        from visualdl import LogWriter

        self.path = Path(directory) / LOG_FILENAME
        self.path.unlink(missing_ok=True)
        self._writer = LogWriter(logdir=str(directory), file_name=LOG_FILENAME, display_name="act_pipeline")

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a point.

        Args:
            tag: name of the curve, e.g. ``train/loss`` or ``eval/map``.
            value: the value.
            step: the iteration.
        """
        if self._writer is not None:
            self._writer.add_scalar(tag=tag, value=value, step=step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def write_scalars(training: Mapping[str, Any] | None, directory: str | os.PathLike[str]) -> Path | None:
    """Write the curves of a training: ``train/loss`` of every iteration, ``eval/agreement`` of every evaluation.

    Args:
        training: ``training`` of an ``act.json``; None: nothing was trained.
        directory: the folder of the log.

    Returns:
        the file; None if nothing was trained or VisualDL is not installed.
    """
    training = training or {}
    if not training.get("loss") and not training.get("evaluations"):
        return None
    with contextlib.closing(Scalars(directory)) as scalars:
        for step, loss in enumerate(training.get("loss") or (), start=1):
            scalars.add("train/loss", loss, step)
        for evaluation in training.get("evaluations") or ():
            scalars.add("eval/agreement", evaluation["agreement"], evaluation["iteration"])
        return scalars.path
