"""The stages of a compression: prepare, evaluate the float model, quantize, evaluate what was saved, record."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_pipeline.compress.act import model_feed, quiet_upstream, train
from act_pipeline.compress.checkpoint import Checkpoints
from act_pipeline.compress.failures import explained
from act_pipeline.compress.finite import check_float_model
from act_pipeline.compress.interrupt import Interruption, interruptible
from act_pipeline.compress.inventory import OpInventory
from act_pipeline.compress.lock import hold_lock
from act_pipeline.compress.ptq import calibration_batches, quantize
from act_pipeline.config import Config
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine
from act_pipeline.engines.base import available_cpus
from act_pipeline.engines.model_files import inspect_model
from act_pipeline.errors import UserError
from act_pipeline.evaluation import Evaluation, evaluate
from act_pipeline.model import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.records import new_artifact, read_record, versions, write_record
from act_pipeline.static_graph import StaticGraph, fold_batch_norm, fold_constants, static_mode

ACT_SCHEMA = "act_pipeline.act/1"
RECORD_FILENAME = "act.json"
# PaddleSlim's own tolerance between TrainConfig.origin_metric and what the float model gives.
_ORIGIN_TOLERANCE = 0.05


@dataclass
class Compressed:
    """A finished compression.

    Attributes:
        model: the INT8 model.
        record: what ``act.json`` holds.
    """

    model: InferenceModel
    record: dict[str, Any]


@dataclass
class Quantized:
    """What a strategy made.

    Attributes:
        model: the INT8 model.
        inventory: its INT8 ops.
        record: what the strategy adds to ``act.json``, under names of its own.
        seconds: by stage.
    """

    model: InferenceModel
    inventory: OpInventory
    record: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)


def compress(
    config: Config,
    save_dir: str | os.PathLike[str],
    device: str = "auto",
    progress: bool = True,
    reuse: bool = False,
    reader_overrides: Sequence[str] = (),
    resume: bool = False,
) -> Compressed:
    """Compress the model that a config names; an older result in ``save_dir`` is replaced when the new one is whole.

    The training writes checkpoints to ``<save_dir>.checkpoint``, which is removed when all has ended well.

    Args:
        config: what to compress, on which data, how.
        save_dir: the INT8 model's folder, with ``act.json`` beside the model.
        device: ``CPU``, ``GPU`` or ``auto``: the GPU if Paddle finds one.
        progress: show progress bars on stderr.
        reuse: return the result that is there already if its record says that it was made from the same.
        reader_overrides: ``Section.key=value`` each, set over the reader file.
        resume: go on from the checkpoint of a run that was broken off, to the same result as an unbroken one.

    Raises:
        UserError: model, data and config do not fit together, the device is not there, another process writes to
            ``save_dir``, the checkpoint is of another run, the training diverges, or disk or memory do not suffice.
        Interrupted: SIGINT or SIGTERM came.
    """
    model = InferenceModel.load(config.global_.model_dir, config.global_.model_filename, config.global_.params_filename)
    reader = Reader.load(config.global_.reader_config, reader_overrides)
    splits = ["train", "eval"] if config.global_.evaluation else ["train"]
    reader.check(*splits)
    device = choose_device(device)
    source = {
        "config": config.as_dict(),
        "source_hash": model.content_hash(),
        "data_hash": {split: reader.fingerprint(split) for split in splits},
        "versions": versions(),
    }
    if reuse:
        current = _current(Path(save_dir), source)
        if current is not None:
            return current
    seconds: dict[str, float] = {}
    checkpoints = Checkpoints(
        Path(save_dir),
        _identity(config, source, reader, device),
        config.train_config.snapshot_iter if config.train_config else None,
        model.infer_cfg_path,
    )
    batch_size = reader.settings.reader.batch_size
    with hold_lock(save_dir), checkpoints.open(resume), explained(checkpoints, batch_size), interruptible(
        checkpoints.way_on
    ) as interruption, new_artifact(save_dir) as staging, static_mode():
        work = staging / ".work"
        with _timed(seconds, "prepare"):
            _check_fit(model, reader)
            prepared = prepare(model, work / "float")
            _check_outputs(config, prepared, reader)
        fp32 = None
        if config.global_.evaluation:
            with _timed(seconds, "evaluate_fp32"):
                fp32 = _evaluate(model, "fp32", device, reader, progress)
            _check_origin(config, fp32)
        strategy = _STRATEGIES[config.strategy.name]
        made = strategy(config, prepared, reader, fp32, work, device, progress, checkpoints, interruption)
        seconds.update(made.seconds)
        for path in (made.model.model_path, made.model.params_path):
            shutil.move(str(path), str(staging / path.name))
        if model.infer_cfg_path.exists():
            shutil.copyfile(model.infer_cfg_path, staging / INFER_CFG_FILENAME)
        shutil.rmtree(work)
        saved = InferenceModel.load(staging)
        int8 = None
        if config.global_.evaluation:
            with _timed(seconds, "evaluate_int8"):
                int8 = _evaluate(saved, "int8", device, reader, progress)
        record = {**_record(config, model, saved, made, fp32, int8, seconds, device), **source}
        write_record(staging / RECORD_FILENAME, ACT_SCHEMA, record)
    return Compressed(InferenceModel.load(save_dir), read_record(Path(save_dir) / RECORD_FILENAME, ACT_SCHEMA))


def _identity(config: Config, source: Mapping[str, Any], reader: Reader, device: str) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to fit: all that decides the result, and no place on disk."""
    settings = source["config"]
    loading = reader.settings.reader
    places = ("teacher_model_dir", "teacher_model_filename", "teacher_params_filename")

    def without(section: str, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name, value in (settings.get(section) or {}).items() if name not in names}

    return {
        "Distillation": without("Distillation", places),
        "QuantAware": settings.get("QuantAware"),
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


def _teacher_hash(config: Config) -> str | None:
    distillation = config.distillation
    if distillation is None or distillation.teacher_model_dir is None:
        return None
    names = (distillation.teacher_model_filename, distillation.teacher_params_filename)
    return InferenceModel.load(distillation.teacher_model_dir, *names).content_hash()


def _check_outputs(config: Config, prepared: InferenceModel, reader: Reader) -> None:
    batch = next(iter(reader.loader("train", batch_size=1, shuffle=False)))
    check_float_model(prepared, model_feed(config, list(inspect_model(prepared).inputs), batch))


def _current(save_dir: Path, source: Mapping[str, Any]) -> Compressed | None:
    try:
        record = read_record(save_dir / RECORD_FILENAME, ACT_SCHEMA)
        model = InferenceModel.load(save_dir)
    except UserError:
        return None
    same = all(record.get(key) == value for key, value in source.items())
    return Compressed(model, record) if same and record.get("model_hash") == model.content_hash() else None


def prepare(model: InferenceModel, directory: Path) -> InferenceModel:
    """Write a copy of a float model that computes the same, with constants and BatchNorm folded into its weights."""
    directory.mkdir(parents=True)
    with quiet_upstream():
        graph = StaticGraph.load(model)
        fold_constants(graph)
        fold_batch_norm(graph)
        return graph.save(directory)


def choose_device(device: str) -> str:
    """Return ``CPU`` or ``GPU`` for ``auto``, ``cpu`` or ``gpu``.

    Raises:
        UserError: a GPU is asked for that Paddle does not find.
    """
    import paddle

    wanted = device.upper()
    if wanted not in ("AUTO", "CPU", "GPU"):
        raise UserError(f"device is '{device}', expected auto, cpu or gpu")
    found = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0
    if wanted == "GPU" and not found:
        reason = "this machine has no GPU" if paddle.is_compiled_with_cuda() else "paddlepaddle is the CPU package"
        raise UserError(
            f"no GPU can be used: {reason}; use --devices=cpu, or install requirements/gpu.txt on a GPU machine"
        )
    return "GPU" if wanted != "CPU" and found else "CPU"


def _train(
    config: Config,
    prepared: InferenceModel,
    reader: Reader,
    fp32: Evaluation | None,
    work: Path,
    device: str,
    progress: bool,
    checkpoints: Checkpoints,
    interruption: Interruption,
) -> Quantized:
    seconds: dict[str, float] = {}
    loader = reader.loader("train")

    def score(model: InferenceModel) -> float:
        return _evaluate(model, "int8", device, reader, progress).map

    save_dir = work / "int8"
    save_dir.mkdir()
    with _timed(seconds, "train"):
        training = train(
            prepared,
            config,
            loader,
            len(loader),
            score if config.global_.evaluation else None,
            save_dir,
            device,
            fp32.map if fp32 and config.train_config.origin_metric is not None else None,
            progress,
            checkpoints,
            interruption,
        )
    seconds["train"] += training.earlier_seconds
    record = {
        "iterations": training.iterations,
        "evaluations": [{"iteration": iteration, "map": metric} for iteration, metric in training.evaluations],
        "loss": [round(loss, 6) for _, loss in training.losses],
        "stopped": training.stopped,
    }
    return Quantized(training.model, training.inventory, {"training": record}, seconds)


def _calibrate(
    config: Config,
    prepared: InferenceModel,
    reader: Reader,
    fp32: Evaluation | None,
    work: Path,
    device: str,
    progress: bool,
    checkpoints: Checkpoints,
    interruption: Interruption,
) -> Quantized:
    save_dir = work / "int8"
    save_dir.mkdir()
    settings = config.quant_post
    calibration = quantize(prepared, config, calibration_batches(reader, settings, progress), save_dir, device)
    record = {
        "algo": settings.algo,
        "hist_percent": settings.hist_percent if settings.algo == "hist" else None,
        "images": calibration.images,
        "images_asked": settings.images,
        "seed": settings.seed,
        "bias_correction": settings.bias_correction,
        "corrected_biases": calibration.corrected_biases,
        "zero_tensors": calibration.zero_tensors,
    }
    return Quantized(calibration.model, calibration.inventory, {"calibration": record}, calibration.seconds)


_STRATEGIES = {"qat_dis": _train, "ptq": _calibrate}


def _evaluate(model: InferenceModel, precision: str, device: str, reader: Reader, progress: bool) -> Evaluation:
    # Paddle's own kernels compute an INT8 model just as it was trained; for a float one oneDNN gives the same, sooner.
    name = "paddle_onednn" if precision == "fp32" and device == "CPU" else "paddle"
    engine = create_engine(name, model, precision, device, available_cpus())
    with contextlib.closing(engine):
        return evaluate(engine, reader, progress=progress)


def _check_fit(model: InferenceModel, reader: Reader) -> None:
    """Find out before the first hour, not after it, that the reader does not feed what the model takes."""
    taken = inspect_model(model).input_size
    height, width = reader.input_size
    if taken is not None and tuple(taken) != (height, width):
        raise UserError(
            f"{reader.path}: the reader resizes to {height} x {width}, but {model.model_path} takes "
            f"{taken[0]} x {taken[1]}; set its Resize.target_size, or export the model so"
        )
    labels = model.infer_cfg().get("label_list")
    if isinstance(labels, list) and len(labels) != len(reader.class_names):
        raise UserError(
            f"{reader.path}: the data has {len(reader.class_names)} classes, {model.infer_cfg_path} names {len(labels)}; "
            "give the reader of the data that the model was trained on"
        )


def _check_origin(config: Config, fp32: Evaluation) -> None:
    origin = config.train_config.origin_metric if config.train_config else None
    if origin is not None and abs(fp32.map - origin) > _ORIGIN_TOLERANCE:
        raise UserError(
            f"{config.path}: TrainConfig.origin_metric is {origin}, the float model has {fp32.map:.4f} mAP here; "
            "check the data set, or correct origin_metric"
        )


def _record(
    config: Config,
    model: InferenceModel,
    saved: InferenceModel,
    made: Quantized,
    fp32: Evaluation | None,
    int8: Evaluation | None,
    seconds: dict[str, float],
    device: str,
) -> dict[str, Any]:
    def figures(evaluation: Evaluation | None, measured: InferenceModel) -> dict[str, Any]:
        return {
            "map": evaluation.map if evaluation else None,
            "map50": evaluation.map50 if evaluation else None,
            "bytes": measured.bytes,
        }

    return {
        "strategy": config.strategy.name,
        "fp32": figures(fp32, model),
        "int8": figures(int8, saved),
        "map_drop": fp32.map - int8.map if fp32 and int8 else None,
        "bytes_ratio": saved.bytes / model.bytes,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "quantized_ops": made.inventory.quantized,
        "kept_ops": made.inventory.kept,
        **made.record,
        "evaluation": {
            "engine": "paddle",
            "device": device,
            "threads": available_cpus(),
            "images": int8.images if int8 else 0,
        },
        "model_hash": saved.content_hash(),
    }


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
