"""Rank ops by the accuracy that each costs in INT8, measuring only as many as accuracy control needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.sensitivity import BlockError, OpSensitivity, ranked
from act_pipeline.analysis.sensitivity_runner import SensitivityRunner
from act_pipeline.analysis.sensitivity_task import Task
from act_pipeline.calibration.feeds import model_inputs
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.execution.cpu_cores import all_cores
from act_pipeline.graph.quantizable_ops import QuantizableOp

RANK_IMAGES = 1


class Ranker:
    """Rank ops by the accuracy that each costs when it alone is quantized.

    Blocks of neighbouring ops are measured first. Then the ops of the worst block are measured one by one, and those of
    the next block when the first ones are used up.

    Attributes:
        ops: the ops to rank.
    """

    def __init__(
        self,
        job: Job,
        candidate: Candidate,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        thresholds: Mapping[str, float],
    ) -> None:
        """Prepare the ranking; nothing is measured yet.

        Args:
            job: the compression, for its held-out images, device and progress bars.
            candidate: the INT8 model, under whose name the ranking is recorded.
            model: the float model that the INT8 model was made from.
            ops: ops of ``model``.
            thresholds: activation -> largest absolute value that INT8 represents.
        """
        self.ops = list(ops)
        self._job, self._candidate, self._model, self._thresholds = job, candidate, model, thresholds
        feeds = [model_inputs(feed, model) for feed in job.held_out.feeds[:RANK_IMAGES]]
        self._batch = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
        self._blocks: list[list[QuantizableOp]] = []
        self._errors: list[BlockError] = []
        self._runner: Optional[SensitivityRunner] = None
        self._measured: dict[str, OpSensitivity] = {}
        self._reverted: set[str] = set()
        self._weight_errors: dict[str, float] = {}

    def restart(self) -> None:
        """Count all ops as INT8 again; the measurements are kept."""
        self._reverted.clear()

    def foremost(self, count: int) -> list[str]:
        """Return the names of the ops still in INT8 that cost most, in descending order.

        Args:
            count: the largest number of ops to return.
        """
        if not self._errors:
            self._measure_blocks()
        while True:
            found = [op.name for op in ranked(self._measured.values()) if op.name not in self._reverted]
            if len(found) >= count or not self._blocks:
                return found[:count]
            self._measure_ops(self._blocks.pop(0))

    def remove(self, names: Sequence[str]) -> None:
        """Exclude ops from the ranking, since they were reverted to float."""
        self._reverted.update(names)

    def detection_change(self, name: str) -> float:
        """Return the change of the detections when an op alone is quantized, in [0, 1]; it must have been measured."""
        return self._measured[name].detection_change

    def with_int8_weights(self, names: Sequence[str]) -> list[str]:
        """Return the ops whose weights can stay in INT8 when they are reverted to float, so that the file stays small.

        These are the ops whose activations cost the accuracy: rounding the weight alone adds no more error than a
        typical op (the median of the blocks' errors, divided by their numbers of ops).

        Args:
            names: names of the ops.
        """
        typical = float(np.median([block.error / block.ops for block in self._errors]))
        for name in names:
            if name not in self._weight_errors:
                with all_cores():
                    self._weight_errors[name] = self._opened().weight_error(name)
        return [name for name in names if self._weight_errors[name] <= typical]

    def close(self) -> None:
        """Free the model; it is loaded again when more ops are to be measured."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _opened(self) -> SensitivityRunner:
        if self._runner is None:
            task = Task.of(
                self._model,
                self.ops,
                self._thresholds,
                [self._batch],
                device=self._job.device,
                decoder=self._job.judge.decoder,
            )
            self._runner = SensitivityRunner(task)
        return self._runner

    def _measure_blocks(self) -> None:
        """Measure blocks of consecutive ops and sort them by error, largest first."""
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
    """Return ``name``, ``ops`` and ``share`` of the blocks' errors by group; a block has its first op's group."""
    total = sum(block.error for block in errors)
    shares: dict[str, dict[str, Any]] = {}
    for block in errors:
        entry = shares.setdefault(block.group, {"name": block.group, "ops": 0, "share": 0.0})
        entry["ops"] += block.ops
        entry["share"] += block.error / total if total else 0.0
    return list(shares.values())
