"""Quantization-aware training with distillation, by PaddleSlim's Auto Compression Toolkit (ACT).

``paddleslim.auto_compression.AutoCompression`` builds the programs, with methods replaced in `adapter`, and `loop` runs
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.calibration.feeds import model_feed
from act_pipeline.compress.paddleslim.patches import own_scope, quick_walks
from act_pipeline.compress.paddleslim.prefixes import TEACHER_PREFIX
from act_pipeline.compress.plan.op_selection import skip_patterns
from act_pipeline.compress.qat.adapter import make_adapter
from act_pipeline.compress.qat.detection_loss import DetectionDistillation
from act_pipeline.compress.qat.distributed import averaging
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.int8_snapshots import Scorer
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.compress.qat.setup import Setup
from act_pipeline.compress.qat.training import Batches, Training
from act_pipeline.compress.qat.unfolded_weights import read_factors
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.interruption import Interruption
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.graph.model_files import inspect_model


def train(
    model: InferenceModel,
    config: Config,
    batches: Batches,
    scorer: Scorer | None,
    save_dir: Path,
    *,
    device: str = "CPU",
    origin_metric: float | None = None,
    progress: bool = True,
    checkpoints: Checkpoints | None = None,
    interruption: Interruption | None = None,
    start: InferenceModel | None = None,
    lowest: Mapping[str, float] | None = None,
    ranks: Ranks = ALONE,
) -> Training:
    """Train the quantized model and save the best INT8 model.

    Args:
        model: the float model with folded constants; files are written to its folder.
        config: sections ``Distillation``, ``QuantAware`` and ``TrainConfig``.
        batches: yields the batches of an epoch, and can resume within an epoch.
        scorer: scores INT8 models; None: no evaluation, and the last weights are saved.
        save_dir: an existing folder for the INT8 model.
        device: ``CPU`` or ``GPU``.
        origin_metric: the float model's mAP, if the training has to stop when it is reached.
        progress: show a progress bar on stderr.
        checkpoints: the checkpoint to resume from and to write; None: neither.
        interruption: the handling of signals, which end the training between two steps.
        start: a calibrated INT8 model of ``model`` whose scales and biases the training starts from; None:
            PaddleSlim's start, whose scales the first batches overwrite.
        lowest: activation to round with a zero point -> its least value, the output of :func:``.zero_points_of``;
            None: all are rounded symmetrically.
        ranks: the processes that train together. Only rank 0 evaluates and saves; ``batches`` is this rank's share.

    Returns:
        The result; on rank 0, ``model`` is the INT8 model in ``save_dir``.

    Raises:
        Diverged: the loss, a weight or an output of an INT8 model is not finite.
        UserError: the config, model or checkpoint does not fit, the reader yields no batch, or another rank failed.
        Interrupted: the process received a signal; the checkpoint has been written.
        MemoryError, RuntimeError: memory does not suffice.
    """
    import paddle

    paddle.set_device(device.lower())
    averaging.connect(ranks, device)
    with quiet_upstream(), own_scope(), paddle.utils.unique_name.guard():
        distillation = DetectionDistillation.of(config, model, TEACHER_PREFIX)
        feeds = _Feeds(batches, config, model)
        with quick_walks():
            compression = make_adapter()(
                model_dir=str(model.directory),
                model_filename=model.model_filename,
                params_filename=model.params_filename,
                save_dir=str(save_dir),
                config=_act_config(config, distillation),
                train_dataloader=feeds,
            )
        compression.setup = Setup(
            batches=batches,
            probe=feeds.first,  # set, since PaddleSlim has read the first batch to check whether it is a dict
            scorer=scorer,
            origin_metric=origin_metric,
            patience=config.training.train_config.patience,
            op_types=tuple(config.training.quant_aware.quantize_op_types),
            teacher_cache_mb=config.training.distillation.teacher_cache_mb,
            distillation=distillation,
            factors=read_factors(model),
            start=start,
            lowest=lowest or {},
            checkpoints=checkpoints,
            interruption=interruption or Interruption(),
            ranks=ranks,
            progress=progress,
        )
        compression.compress()
        training = compression.training
    if ranks.leads:
        training.model = InferenceModel.load(save_dir)
    return training


class _Feeds:
    """The batches of an epoch under the names of the model's inputs, in the form of PaddleSlim's ``train_dataloader``.

    Attributes:
        first: the first feed that was read; empty: none yet.
    """

    def __init__(self, batches: Batches, config: Config, model: InferenceModel) -> None:
        self.first: dict[str, np.ndarray] = {}
        self._batches, self._config, self._names = batches, config, list(inspect_model(model).inputs)

    def __call__(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._batches():
            feed = model_feed(self._config, self._names, batch)
            self.first = self.first or feed
            yield feed


def _act_config(config: Config, distillation: DetectionDistillation | None) -> dict[str, Any]:
    """Return the config in the form of ``AutoCompression``."""
    strategies, train_config = config.to_act()
    quantization = strategies["QuantAware"]
    quantization["not_quant_pattern"] = skip_patterns(quantization["not_quant_pattern"])
    if distillation is not None:
        strategies["Distillation"].update(node=distillation.nodes, loss="l2")
    # The caller has compared it already; ACT would evaluate the float model again, in Paddle's slow executor.
    train_config.pop("origin_metric", None)
    return {**strategies, "TrainConfig": train_config}
