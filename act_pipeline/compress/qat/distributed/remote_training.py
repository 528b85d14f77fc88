"""The training on the followers: they train whenever rank 0 trains, with the model that it sends."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from act_pipeline.calibration.feeds import open_reader, training_reader
from act_pipeline.compress.identity import shared_identity
from act_pipeline.compress.qat.distributed.follower import Follower
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.ranks import Ranks
from act_pipeline.compress.qat.trainer import train
from act_pipeline.config import Config
from act_pipeline.core.artifacts import INFER_CFG_FILENAME, MODEL_FILENAME, PARAMS_FILENAME, InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.loader import Loader
from act_pipeline.execution.memory import freed_memory_kept
from act_pipeline.graph.static_graph import static_mode


def call_followers(ranks: Ranks, model: InferenceModel, lowest: Mapping[str, float]) -> None:
    """Send a float model to the followers, which starts their training; without several ranks do nothing.

    Args:
        ranks: this process's part; only the leader sends.
        model: the float model.
        lowest: activation to round with a zero point -> its least value.
    """
    if isinstance(ranks, Leader):
        files = [(MODEL_FILENAME, model.model_path), (PARAMS_FILENAME, model.params_path)]
        if model.infer_cfg_path.is_file():
            files.append((INFER_CFG_FILENAME, model.infer_cfg_path))
        ranks.tell(
            "train", {name: np.frombuffer(path.read_bytes(), np.uint8) for name, path in files}, lowest=dict(lowest)
        )


def follow(config: Config, device: str, ranks: Ranks, reader_overrides: Sequence[str] = ()) -> NoReturn:
    """Follow the commands of rank 0 until the end of its run, which also ends :meth:`Ranks.run`.

    Args:
        config: the same config as on rank 0.
        device: ``CPU``, ``GPU`` or ``auto``.
        ranks: this process's part, a :class:`Follower`.
        reader_overrides: the same as on rank 0.

    Raises:
        UserError: data and config do not fit together, the device is missing, or rank 0 has ended.
    """
    from act_pipeline.engines.device import paddle_device

    assert isinstance(ranks, Follower)
    global_ = config.global_
    reader = Reader.load(global_.reader_config, reader_overrides)
    with contextlib.suppress(UserError):  # rank 0 reports errors; the model may exist on its host only
        source = InferenceModel.load(global_.model_dir, global_.model_filename, global_.params_filename)
        reader, _ = open_reader(config, source, reader_overrides)
    reader.check("train")
    device = paddle_device(device)
    ranks.say("identity", identity=shared_identity(config, reader, device))
    train_on_command(config, lambda: training_reader(config, reader).loader("train"), device, ranks)


def train_on_command(config: Config, load: Callable[[], Loader], device: str, ranks: Follower) -> NoReturn:
    """Train each model that rank 0 sends, on this rank's share of the batches.

    Args:
        config: the same config as on rank 0.
        load: makes the loader of the training images; called for each training.
        device: ``CPU`` or ``GPU``.
        ranks: this process's part.

    Raises:
        UserError: rank 0 has ended, or see `compress.qat.trainer.train`.
    """
    while True:
        message = ranks.receive()
        with tempfile.TemporaryDirectory(prefix="act_pipeline.") as work, static_mode(), freed_memory_kept(device):
            float_model, save_dir = Path(work, "float"), Path(work, "int8")
            float_model.mkdir()
            save_dir.mkdir()
            for name, content in message.arrays.items():
                (float_model / name).write_bytes(content.tobytes())
            batches = ranks.shard(load())
            model = InferenceModel.load(float_model)
            lowest = message.fields["lowest"]
            train(model, config, batches, None, save_dir, device=device, progress=False, lowest=lowest, ranks=ranks)
