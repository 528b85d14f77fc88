"""The stages of a compression: prepare the float model, evaluate it, run the strategy, measure, save and record."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.calibration.feeds import open_reader
from act_pipeline.compress.act_record import compression_record
from act_pipeline.compress.float_checks import check_origin, check_outputs, check_worth
from act_pipeline.compress.identity import processes, shared_identity, source_identity, training_identity
from act_pipeline.compress.job import MEASURED, Candidate, Job, timed
from act_pipeline.compress.judge import choose_judge
from act_pipeline.compress.outcome import measure_chosen
from act_pipeline.compress.plan.op_selection import Selection, mark_float, select
from act_pipeline.compress.qat.distributed.ranks import ALONE, Leader, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.compress.qat.resume.failures import explained
from act_pipeline.compress.strategies import STRATEGIES
from act_pipeline.config import Config
from act_pipeline.core.artifacts import INFER_CFG_FILENAME, MODEL_FILENAME, PARAMS_FILENAME, InferenceModel
from act_pipeline.core.errors import BelowFloor, UserError
from act_pipeline.core.interruption import Interruption, interruptible
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import BELOW_SUFFIX, new_artifact, require_replaceable
from act_pipeline.core.records import (
    ACT_FILENAME,
    ACT_SCHEMA,
    ANALYSIS_FILENAME,
    ANALYSIS_SCHEMA,
    read_record,
    write_record,
)
from act_pipeline.core.tables import rounded_up
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import told
from act_pipeline.engines.device import paddle_device
from act_pipeline.engines.float_model import require_float
from act_pipeline.evaluation import DETECTIONS_FILENAME, save_detections
from act_pipeline.execution.memory import freed_memory_kept
from act_pipeline.graph.folding import fold, save_folded
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.report import write_report


@dataclass
class Compressed:
    """Result of a compression.

    Attributes:
        model: the INT8 model.
        record: the content of ``act.json``.
    """

    model: InferenceModel
    record: dict[str, Any]


def compress(
    config: Config,
    save_dir: str | os.PathLike[str],
    device: str = "auto",
    *,
    progress: bool = True,
    reuse: bool = False,
    reader_overrides: Sequence[str] = (),
    resume: bool = False,
    report: str | None = None,
    ranks: Ranks = ALONE,
) -> Compressed:
    """Compress the model that a config names and write the INT8 model, its record and optionally a report.

    An older result in ``save_dir`` is replaced once the new one is complete. The training writes checkpoints to
    ``<save_dir>.checkpoint``, which is removed after a successful run.

    Args:
        config: model, data and settings.
        save_dir: the folder for the INT8 model and ``act.json``.
        device: ``CPU``, ``GPU`` or ``auto``: the GPU if Paddle finds one.
        progress: show progress bars on stderr.
        reuse: return the result in ``save_dir`` if it was made from the same config, model, data and versions.
        reader_overrides: ``Section.key=value`` each, set over the values of the reader's file.
        resume: continue from the training checkpoint of an interrupted run, with the same result as a run without
            interruption.
        report: language of the ``report.html`` to write into ``save_dir``, ``en`` or ``zh``; None: no report.
        ranks: the processes that train together. Only the leader calls this function; the others run
            `compress.qat.distributed.follower.follow`.

    Returns:
        The INT8 model in ``save_dir`` and its record.

    Raises:
        BelowFloor: no INT8 model is within ``Strategy.max_drop``; the best is saved in ``<save_dir>.below_max_drop``.
        UserError: model, data and config do not fit together, the device is missing, ``save_dir`` holds something
            else than an earlier result, another process writes to it, the checkpoint belongs to another run, the
            training diverges, or disk or memory do not suffice.
        Interrupted: the process received SIGINT or SIGTERM.
    """
    for place in (save_dir, f"{Path(save_dir)}{BELOW_SUFFIX}"):
        require_replaceable(place, ACT_FILENAME, "--save_dir")
    model = InferenceModel.load(config.global_.model_dir, config.global_.model_filename, config.global_.params_filename)
    require_float(model)
    reader, notes = open_reader(config, model, reader_overrides)
    told(notes)
    splits = ["train", "eval"] if config.global_.evaluation else ["train"]
    reader.check(*splits)
    device = paddle_device(device)
    source = source_identity(config, model, reader, splits)
    if reuse:
        current = _current(Path(save_dir), source)
        if current is not None:
            return current
    if isinstance(ranks, Leader):
        ranks.agree(shared_identity(config, reader, device))
    checkpoints = Checkpoints(
        Path(save_dir),
        {**training_identity(config, source, reader, device), **processes(ranks)},
        config.train_config.snapshot_iter if config.train_config else None,
        model.infer_cfg_path,
    )
    with _running(config, reader, Path(save_dir), device, checkpoints, resume, ranks) as (work, interruption):
        seconds: dict[str, float] = {}
        with timed(seconds, "prepare"):
            prepared, selection = _prepare(model, config, work / "float")
            check_outputs(config, prepared, reader)
            judge = choose_judge(config.strategy.engine, device, model)
        fp32, cached = None, False
        if config.global_.evaluation:
            with timed(seconds, "evaluate_fp32"):
                fp32, cached = judge.evaluate_float(model, reader, progress)
            if progress:
                print(f"FP32: {fp32.map:.4f} mAP on {fp32.images} images, {judge.name('fp32')}", file=sys.stderr)
            check_origin(config, fp32)
            check_worth(config, fp32, reader)
        folder = work / "strategies"
        folder.mkdir()
        job = Job(
            config,
            prepared,
            selection,
            reader,
            judge,
            fp32,
            folder,
            device,
            progress,
            checkpoints,
            interruption,
            fp32_cached=cached,
            ranks=ranks,
        )
        chosen = STRATEGIES[config.strategy.name](job)
        met = job.meets(chosen)
        target = Path(save_dir) if met else Path(f"{Path(save_dir)}{BELOW_SUFFIX}")
        found = measure_chosen(job, chosen, model)
        record = {**compression_record(job, chosen, model, seconds, found), **source, **processes(ranks)}
        _write(target, model, chosen, job, record)
        if report is not None:
            write_report(target, reader, lang=report)
    if not met:
        assert fp32 is not None, "there is no max_drop without the float model's mAP"
        raise BelowFloor(
            f"no INT8 model is within max_drop {job.max_drop} of the float model's {fp32.map:.4f} mAP"
            f"{_asked(config, record)}: the best, {chosen.name}, has {chosen.map:.4f}, and is kept in {target}; "
            f"{_remedies(config, record)}"
        )
    return Compressed(InferenceModel.load(save_dir), read_record(Path(save_dir) / ACT_FILENAME, ACT_SCHEMA))


@contextlib.contextmanager
def _running(
    config: Config,
    reader: Reader,
    save_dir: Path,
    device: str,
    checkpoints: Checkpoints,
    resume: bool,
    ranks: Ranks,
) -> Iterator[tuple[Path, Interruption]]:
    """Hold what a run needs from its first step to its end, and explain what ends it early.

    Yields:
        A temporary folder next to ``save_dir``, and the signals.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks.explained())
        stack.enter_context(freed_memory_kept(device))
        stack.enter_context(hold_lock(save_dir))
        stack.enter_context(checkpoints.open(resume))
        stack.enter_context(explained(checkpoints, reader.settings.reader.batch_size))
        interruption = stack.enter_context(
            interruptible(lambda: "; ".join(part for part in (ranks.failure, checkpoints.way_on()) if part))
        )
        stack.enter_context(ranks.leading())
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        if save_dir.exists() and not save_dir.is_dir():
            raise UserError(f"{save_dir} is a file, expected a folder to write to: choose another --save_dir")
        hidden = tempfile.TemporaryDirectory(prefix=f".{save_dir.name}.", dir=save_dir.parent)
        work = Path(stack.enter_context(hidden))
        stack.enter_context(static_mode())
        yield work, interruption


def _asked(config: Config, record: Mapping[str, Any]) -> str:
    """Return the required and the best probability for the message; empty where the measured drop decides."""
    probability, confidence = record["probability_within_max_drop"], config.strategy.confidence
    if confidence == MEASURED or probability is None:
        return ""
    return f" with a probability of {confidence:g} (Strategy.confidence; the best has {probability:.3g})"


def _remedies(config: Config, record: Mapping[str, Any]) -> str:
    needed = record["images_needed"]
    more = "" if needed is None else f"evaluate on more images (some {rounded_up(needed):,} would tell), "
    surer = "" if config.strategy.confidence == MEASURED else "lower Strategy.confidence, "
    return f"{more}{surer}raise Strategy.max_drop, calibrate on more images, or train longer"


def _prepare(model: InferenceModel, config: Config, directory: Path) -> tuple[InferenceModel, Selection]:
    """Return the folded float model, its ops that stay float marked, and the ops to compute in INT8."""
    graph = fold(model)
    ops = quantizable_ops(graph, config.op_types)
    if not ops:
        raise UserError(
            f"{config.path}: {model.directory} has no op of {config.op_section}.quantize_op_types "
            f"({', '.join(config.op_types)}); name the types of ops that the model has"
        )
    selection = select(ops, config.quantize, config.path)
    mark_float(graph, list(selection.kept))
    return save_folded(graph, directory), selection


def _write(target: Path, model: InferenceModel, chosen: Candidate, job: Job, record: Mapping[str, Any]) -> None:
    with new_artifact(target) as staging:
        for path, name in ((chosen.model.model_path, MODEL_FILENAME), (chosen.model.params_path, PARAMS_FILENAME)):
            shutil.copyfile(path, staging / name)
        if model.infer_cfg_path.exists():
            shutil.copyfile(model.infer_cfg_path, staging / INFER_CFG_FILENAME)
        if job.fp32 is not None and chosen.evaluation is not None:
            names = {image["id"]: image["file_name"] for image in job.reader.annotations("eval").images}
            save_detections(staging / DETECTIONS_FILENAME, {"fp32": job.fp32, "int8": chosen.evaluation}, names)
        if job.analysis is not None:
            write_record(staging / ANALYSIS_FILENAME, ANALYSIS_SCHEMA, job.analysis)
        write_record(staging / ACT_FILENAME, ACT_SCHEMA, dict(record))


def _current(save_dir: Path, source: Mapping[str, Any]) -> Compressed | None:
    try:
        record = read_record(save_dir / ACT_FILENAME, ACT_SCHEMA)
        model = InferenceModel.load(save_dir)
    except UserError:
        return None
    same = all(record.get(key) == value for key, value in source.items())
    return Compressed(model, record) if same and record.get("model_hash") == model.content_hash() else None
