"""What a training is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np

from act_pipeline.compress.qat.detection_loss import DetectionDistillation
from act_pipeline.compress.qat.distributed.ranks import Ranks
from act_pipeline.compress.qat.int8_snapshots import Scorer
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.compress.qat.training import Batches
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.interruption import Interruption


@dataclass
class Setup:
    """What is trained, on what, and how.

    Attributes:
        batches: the training images, as the reader gives them.
        batches_per_epoch: how many those are.
        probe: the feed of the first batch.
        scorer: of INT8 models; None: no evaluation.
        origin_metric: the float model's metric, if the training shall stop when it is reached.
        patience: ``TrainConfig.patience``.
        op_types: that are quantized.
        teacher_cache_mb: ``Distillation.teacher_cache_mb``.
        distillation: of detections; None: ACT's losses.
        factors: of the weights that are trained unfolded, see `compress.qat.unfolded_weights`.
        start: a calibrated INT8 model, from whose scales and biases the training starts; None: PaddleSlim's start.
        checkpoints: where to go on from, and where to write; None: neither.
        interruption: the signals that end the training between two steps.
        ranks: the processes that train together.
        progress: show a progress bar on stderr.
    """

    batches: Batches
    batches_per_epoch: int
    probe: Mapping[str, np.ndarray]
    scorer: Optional[Scorer]
    origin_metric: Optional[float]
    patience: Optional[int]
    op_types: tuple[str, ...]
    teacher_cache_mb: float
    distillation: Optional[DetectionDistillation]
    factors: Mapping[str, np.ndarray]
    start: Optional[InferenceModel]
    checkpoints: Optional[Checkpoints]
    interruption: Interruption
    ranks: Ranks
    progress: bool

    @property
    def one_image(self) -> dict[str, np.ndarray]:
        """The feed of the first image."""
        return {name: value[:1] for name, value in self.probe.items()}

    @property
    def batch_size(self) -> int:
        """How many images a batch has."""
        return len(next(iter(self.probe.values())))
