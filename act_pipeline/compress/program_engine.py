"""The program that is being trained, seen as an engine: what evaluates it between iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class ProgramEngine:
    """Runs a test program in the training executor (an `act_pipeline.engines.base.Engine`)."""

    name = "paddle_executor"
    precision = "int8"

    def __init__(
        self, executor: Any, program: Any, feed_names: Sequence[str], fetch_targets: Sequence[Any], device: str
    ):
        self.device = device
        self.threads = 0
        self._executor = executor
        self._program = program
        self._feed_names = list(feed_names)
        self._fetch_targets = list(fetch_targets)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See `Engine.run`."""
        bbox, bbox_num = self._executor.run(
            self._program, feed={name: inputs[name] for name in self._feed_names}, fetch_list=self._fetch_targets
        )
        return {"bbox": bbox, "bbox_num": bbox_num}

    def close(self) -> None:
        """Nothing is held that the training does not hold."""

    def versions(self) -> dict[str, str]:
        import paddle

        return {"paddle": paddle.__version__}
