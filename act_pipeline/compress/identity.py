"""What determines a result: of a compression, of a training that is resumed, of one training in several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from act_pipeline.compress.qat.distributed.ranks import Ranks
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.package_versions import versions
from act_pipeline.data import Reader
from act_pipeline.engines.onnx_runtimes.openvino import FLOAT_PRECISION_KEY


def source_identity(config: Config, model: InferenceModel, reader: Reader, splits: Sequence[str]) -> dict[str, Any]:
    """Return what ``act.json`` states of where a result comes from; the same gives the same result.

    Args:
        config: with all of its keys.
        model: the float model.
        reader: the data.
        splits: that are read.
    """
    return {
        "config": config.as_dict(),
        "source_hash": model.content_hash(),
        FLOAT_PRECISION_KEY: model.infer_cfg().get(FLOAT_PRECISION_KEY),
        "data_hash": {split: reader.fingerprint(split) for split in splits},
        "versions": versions(),
    }


def training_identity(config: Config, source: Mapping[str, Any], reader: Reader, device: str) -> dict[str, Any]:
    """Return everything that determines a training's result, without paths; a checkpoint is valid only for the same."""
    settings = source["config"]
    loading = reader.settings.reader
    places = ("teacher_model_dir", "teacher_model_filename", "teacher_params_filename")

    def without(section: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name, value in (settings.get(section) or {}).items() if name not in names}

    return {
        "Distillation": without("Distillation", places),
        "Strategy": without("Strategy", ("search",)),  # it comes after the training
        "quantize": settings.get("quantize"),
        "QuantAware": settings.get("QuantAware"),
        # What `auto` does before it trains decides which model is trained, and from which scales.
        **{
            name: settings.get(name) if config.strategy.name == "auto" else None
            for name in ("QuantPost", "SmoothQuant")
        },
        "TrainConfig": without("TrainConfig", ("snapshot_iter", "logging_iter")),
        "Global": {name: settings["Global"].get(name) for name in ("Evaluation", "input_list")},
        "EvalReader": {"batch_size": loading.batch_size, "drop_last": loading.drop_last},
        "the float model": source["source_hash"],
        "the teacher": _teacher_hash(config),
        "the data": source["data_hash"],
        "device": device,
        "version": {
            name: version
            for name, version in source["versions"].items()
            if name in ("act_pipeline", "paddlepaddle", "paddlepaddle-gpu", "paddleslim", "numpy")
        },
    }


def processes(ranks: Ranks) -> dict[str, Any]:
    """Return the entry of a record for several processes, whose number changes the result."""
    return {"processes": ranks.world} if ranks.world > 1 else {}


def shared_identity(config: Config, reader: Reader, device: str) -> dict[str, Any]:
    """Return everything that has to be equal on all ranks, in JSON types."""
    return {
        "config": {**config.as_dict(), "batch_size": reader.settings.reader.batch_size},
        "the training data": reader.fingerprint("train"),
        "device": device,
        "versions": {name: version for name, version in versions().items() if name != "platform"},
    }


def _teacher_hash(config: Config) -> str | None:
    teacher = config.distillation.teacher() if config.distillation is not None else None
    return teacher.content_hash() if teacher is not None else None
