"""Which ops cost most in INT8, measured no further than accuracy control has come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.sensitivity import BlockError, OpSensitivity, SensitivityRunner, Task, ranked
from act_pipeline.compress.job import Candidate, Job
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.execution.cpu_kernels import all_cores
from act_pipeline.graph.quantizable_ops import QuantizableOp

RANK_IMAGES = 1


class Ranker:
    """Ops in the order of what each costs alone.

    Blocks of neighbouring ops are measured first, then the ops of the worst block, and of the next one when these are
    used up.

    Attributes:
        ops: that are ranked.
    """

    def __init__(
        self,
        job: Job,
        candidate: Candidate,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        thresholds: Mapping[str, float],
    ) -> None:
        """Measure nothing yet.

        Args:
            job: gives the images.
            candidate: the INT8 model, by whose name the ranking is recorded.
            model: the float model that it was made from.
            ops: of the model.
            thresholds: activation -> largest absolute value that its INT8 form represents.
        """
        self.ops = list(ops)
        self._job, self._candidate, self._model, self._thresholds = job, candidate, model, thresholds
        feeds = job.held_out[:RANK_IMAGES]
        self._batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        self._blocks: list[list[QuantizableOp]] = []
        self._errors: list[BlockError] = []
        self._runner: Optional[SensitivityRunner] = None
        self._measured: dict[str, OpSensitivity] = {}
        self._reverted: set[str] = set()

    def restart(self) -> None:
        """Take all ops as INT8 again; what was measured stays."""
        self._reverted.clear()

    def foremost(self, count: int) -> list[str]:
        """Return the ``count`` ops that cost most and are still in INT8, fewer if there are no more."""
        if not self._errors:
            self._measure_blocks()
        while True:
            found = [op.name for op in ranked(self._measured.values()) if op.name not in self._reverted]
            if len(found) >= count or not self._blocks:
                return found[:count]
            self._measure_ops(self._blocks.pop(0))

    def remove(self, names: Sequence[str]) -> None:
        """Leave ops out from now on: they are float."""
        self._reverted.update(names)

    def detection_change(self, name: str) -> float:
        """Return how far the detections move when an op is quantized alone, in [0, 1]."""
        return self._measured[name].detection_change

    def close(self) -> None:
        """Free the model; it is loaded again when more ops are to be measured."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _opened(self) -> SensitivityRunner:
        if self._runner is None:
            task = Task.of(self._model, self.ops, self._thresholds, [self._batch], self._job.device)
            self._runner = SensitivityRunner(task)
        return self._runner

    def _measure_blocks(self) -> None:
        """Put blocks into the order of their errors; neighbours in the graph are a block."""
        size = max(math.isqrt(len(self.ops)), 1)
        blocks = [self.ops[start : start + size] for start in range(0, len(self.ops), size)]
        with all_cores():
            self._errors = self._opened().block_errors(blocks, self._job.progress)
        order = sorted(range(len(blocks)), key=lambda index: -self._errors[index].error)
        self._blocks = [blocks[index] for index in order]

    def _measure_ops(self, block: Sequence[QuantizableOp]) -> None:
        with all_cores():
            found = self._opened().measure_ops(block, self._job.progress)
        self._measured.update({op.name: op for op in found})
        self._job.analysis = {
            "of": self._candidate.name,
            "sensitivity": {"images": len(next(iter(self._batch.values())))},
            "ops": [dataclasses.asdict(op) for op in self._measured.values()],
            "ranking": [op.name for op in ranked(self._measured.values())],
            "groups": _group_shares(self._errors),
            "attentions": [],
        }


def _group_shares(errors: Sequence[BlockError]) -> list[dict[str, Any]]:
    """Return ``name``, ``ops`` and ``share`` of the blocks' errors by group; a block is of its first op's group."""
    total = sum(block.error for block in errors)
    shares: dict[str, dict[str, Any]] = {}
    for block in errors:
        entry = shares.setdefault(block.group, {"name": block.group, "ops": 0, "share": 0.0})
        entry["ops"] += block.ops
        entry["share"] += block.error / total if total else 0.0
    return list(shares.values())
