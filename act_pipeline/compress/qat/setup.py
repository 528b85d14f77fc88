"""The data, settings and callbacks of a training."""

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
    """The data, settings and callbacks of a training.

    Attributes:
        batches: the training images in batches, under the reader's names.
        probe: the feed of the first batch, under the names of the model's inputs.
        scorer: scores INT8 models; None: no evaluation.
        origin_metric: the float model's mAP, if the training has to stop when it is reached.
        patience: ``TrainConfig.patience``.
        op_types: the op types that are quantized.
        teacher_cache_mb: ``Distillation.teacher_cache_mb``, in 10^6 bytes.
        distillation: the detection loss; None: ACT's losses.
        factors: factors of the weights that are trained unfolded, see `compress.qat.unfolded_weights`.
        start: a calibrated INT8 model whose scales and biases the training starts from; None: PaddleSlim's start.
        lowest: activation to round with a zero point -> its least value, see `compress.qat.zero_points`.
        checkpoints: the checkpoint to resume from and to write; None: neither.
        interruption: the handling of signals, which end the training between two steps.
        ranks: the processes that train together.
        progress: whether to show a progress bar on stderr.
    """

    batches: Batches
    probe: Mapping[str, np.ndarray]
    scorer: Optional[Scorer]
    origin_metric: Optional[float]
    patience: Optional[int]
    op_types: tuple[str, ...]
    teacher_cache_mb: float
    distillation: Optional[DetectionDistillation]
    factors: Mapping[str, np.ndarray]
    start: Optional[InferenceModel]
    lowest: Mapping[str, float]
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
        """The number of images in a batch."""
        return len(next(iter(self.probe.values())))
