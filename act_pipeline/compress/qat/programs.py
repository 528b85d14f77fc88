"""The programs of a training, as PaddleSlim's ACT has built them, and how long they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.compress.qat.teacher import Teacher
from act_pipeline.execution.runners import Runner


@dataclass(frozen=True)
class Programs:
    """The programs of a training; their variables are initialized, and no step was run.

    Attributes:
        train: PaddleSlim's ``ProgramInfo`` of the training program.
        test: PaddleSlim's ``ProgramInfo`` of the test program, which the INT8 models are made from.
        runner: runs the training program.
        teacher: computes the teacher's outputs of a batch; None: the training program computes them.
        op_order: outputs of the float program's ops, see `compress.paddleslim.op_order.in_order`.
        place: the device of the programs' variables.
    """

    train: Any
    test: Any
    runner: Runner
    teacher: Optional[Teacher]
    op_order: Sequence[str]
    place: Any


@dataclass(frozen=True)
class Schedule:
    """When a training ends, and when it is evaluated.

    Attributes:
        iterations: the last iteration.
        eval_iter: iterations between two evaluations.
        target_metric: the mAP that stops the training; None: none does.
    """

    iterations: int
    eval_iter: int
    target_metric: Optional[float]

    @classmethod
    def of(cls, train_config: Any, batches_per_epoch: int) -> Schedule:
        """Return the schedule of a config.

        Args:
            train_config: PaddleSlim's ``TrainConfig``.
            batches_per_epoch: the number of batches of an epoch.
        """
        in_epochs = (train_config.epochs or 0) * batches_per_epoch
        iterations = train_config.train_iter or in_epochs or batches_per_epoch
        if in_epochs:
            iterations = min(iterations, in_epochs)
        return cls(iterations, train_config.eval_iter, train_config.target_metric)
