"""The stages of a compression: prepare the float model, evaluate it, run the strategy, measure, save and record."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.calibration.feeds import open_reader
from act_pipeline.compress.candidates import Candidates
from act_pipeline.compress.held_out import HeldOut
from act_pipeline.compress.identity import processes, shared_identity, source_identity, training_identity
from act_pipeline.compress.job import Job
from act_pipeline.compress.judging.choice import choose_judge
from act_pipeline.compress.judging.float_checks import (
    check_limits,
    check_nodes,
    check_origin,
    check_outputs,
    check_worth,
)
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.compress.plan.op_selection import Selection, check_dynamic, mark_float, select
from act_pipeline.compress.plan.placing import check_placement, place_by_measurement
from act_pipeline.compress.qat.distributed.leader import Leader
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.compress.qat.resume.failures import explained
from act_pipeline.compress.result.act_record import compression_record
from act_pipeline.compress.result.below_max_drop import below_max_drop
from act_pipeline.compress.result.calibration_baseline import calibration_baseline
from act_pipeline.compress.result.outcome import Measured, measure_chosen
from act_pipeline.compress.result.saved_result import Compressed, current_result, write_result
from act_pipeline.compress.strategies import STRATEGIES
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel, copy_infer_cfg
from act_pipeline.core.errors import UserError
from act_pipeline.core.interruption import Interruption, interruptible
from act_pipeline.core.locking import hold_lock
from act_pipeline.core.output_folders import BELOW_SUFFIX, require_replaceable
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import log_notes
from act_pipeline.engines.device import paddle_device
from act_pipeline.engines.float_model import require_float
from act_pipeline.evaluation import Evaluation
from act_pipeline.execution.memory import freed_memory_kept
from act_pipeline.families.registry import decoder_for
from act_pipeline.graph.float_by_default import float_by_default
from act_pipeline.graph.folding import fold, save_folded
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import static_mode
from act_pipeline.report import write_report


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
    checks: bool = True,
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
            `compress.qat.distributed.remote_training.follow`.
        checks: measure the latency, evaluate in ``int8_reference`` and detect on calibration images for a server at the
            end; no other result depends on it.

    Returns:
        The INT8 model in ``save_dir`` and its record.

    Raises:
        BelowFloor: no INT8 model is within ``Strategy.max_drop`` and has ``Strategy.min_agreement``; the best is saved
            in ``<save_dir>.below_max_drop``.
        UserError: model, data and config do not fit together, the device is missing, ``save_dir`` holds something
            else than an earlier result, another process writes to it, the checkpoint belongs to another run, the
            training diverges, or disk or memory do not suffice.
        Interrupted: the process received SIGINT or SIGTERM.
    """
    save_dir = Path(save_dir)
    below_dir = Path(f"{save_dir}{BELOW_SUFFIX}")
    for place in (save_dir, below_dir):
        require_replaceable(place, ACT_FILENAME, "--save_dir")
    inputs = _Inputs.load(config, device, reader_overrides)
    current = current_result(save_dir, inputs.source) if reuse else None
    if current is not None:
        return current
    if isinstance(ranks, Leader):
        ranks.agree(shared_identity(config, inputs.reader, inputs.device))
    run = _Run(inputs, save_dir, ranks, _checkpoints(inputs, save_dir, ranks), progress)
    with _running(run, resume=resume) as running:
        seconds: dict[str, float] = {}
        job = _make_job(run, running, seconds)
        chosen, placement = STRATEGIES[config.strategy.name](job), None
        if config.strategy.placement == "measured":
            chosen, placement = place_by_measurement(job, chosen, inputs.model)
        met = job.tried.meets(chosen)
        target = save_dir if met else below_dir
        measured = measure_chosen(job, chosen, inputs.model) if checks else Measured()
        act = compression_record(job, chosen, inputs.model, seconds, measured, placement)
        usual = calibration_baseline(job, chosen.model) if checks and job.fp32 is not None else None
        write_result(target, inputs.model, chosen, job, {**act.as_json(), **inputs.source, **processes(ranks)}, usual)
        if report is not None:
            write_report(target, inputs.reader, lang=report)
    if not met:
        raise below_max_drop(job, chosen, act.comparison, target)
    record = read_record(save_dir / ACT_FILENAME, ACT_SCHEMA)
    return Compressed(InferenceModel.load(save_dir), record, chosen.evaluation)


@dataclass(frozen=True)
class _Inputs:
    """The checked inputs of a compression.

    Attributes:
        config: model, data and settings.
        model: the float model.
        reader: the data.
        device: ``CPU`` or ``GPU``.
        source: the entries of ``act.json`` that identify the inputs, see `compress.identity.source_identity`.
    """

    config: Config
    model: InferenceModel
    reader: Reader
    device: str
    source: dict[str, Any]

    @classmethod
    def load(cls, config: Config, device: str, reader_overrides: Sequence[str]) -> _Inputs:
        """Load and check the inputs; the arguments and errors are those of :func:`compress`."""
        places = config.global_
        model = InferenceModel.load(places.model_dir, places.model_filename, places.params_filename)
        require_float(model)
        reader, notes = open_reader(config, model, reader_overrides)
        log_notes(notes)
        splits = ["train", "eval"] if places.evaluation else ["train"]
        reader.check(*splits)
        check_limits(config, reader)
        device = paddle_device(device)
        return cls(config, model, reader, device, source_identity(config, model, reader, splits))


@dataclass(frozen=True)
class _Run:
    """A run of a compression.

    Attributes:
        inputs: the checked inputs.
        save_dir: the folder for the result.
        ranks: the processes that train together.
        checkpoints: the training checkpoints, next to ``save_dir``.
        progress: whether to show progress bars.
    """

    inputs: _Inputs
    save_dir: Path
    ranks: Ranks
    checkpoints: Checkpoints
    progress: bool

    @property
    def how_to_continue(self) -> str:
        """How to go on after an interruption, for a message."""
        return "; ".join(part for part in (self.ranks.failure, self.checkpoints.how_to_continue()) if part)


def _checkpoints(inputs: _Inputs, save_dir: Path, ranks: Ranks) -> Checkpoints:
    config = inputs.config
    return Checkpoints(
        save_dir,
        {**training_identity(config, inputs.source, inputs.reader, inputs.device), **processes(ranks)},
        config.train_config.snapshot_iter if config.train_config else None,
        inputs.model.infer_cfg_path,
    )


@dataclass(frozen=True)
class _Running:
    """What exists while a run is in progress: a temporary folder next to ``save_dir``, and the signals' handling."""

    work: Path
    interruption: Interruption


@contextlib.contextmanager
def _running(run: _Run, *, resume: bool) -> Iterator[_Running]:
    """Hold what a run needs from its first step to its end, and explain what ends it early.

    Args:
        run: the run.
        resume: continue from the checkpoint.
    """
    save_dir = run.save_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(run.ranks.explained())
        stack.enter_context(freed_memory_kept(run.inputs.device))
        stack.enter_context(hold_lock(save_dir))
        stack.enter_context(run.checkpoints.open(resume))
        stack.enter_context(explained(run.checkpoints, run.inputs.reader.settings.reader.batch_size))
        interruption = stack.enter_context(interruptible(lambda: run.how_to_continue))
        stack.enter_context(run.ranks.leading())
        save_dir.parent.mkdir(parents=True, exist_ok=True)
        hidden = tempfile.TemporaryDirectory(prefix=f".{save_dir.name}.", dir=save_dir.parent)
        work = Path(stack.enter_context(hidden))
        stack.enter_context(static_mode())
        yield _Running(work, interruption)


def _make_job(run: _Run, running: _Running, seconds: dict[str, float]) -> Job:
    """Prepare and evaluate the float model, and return what the strategies take.

    Args:
        run: the run.
        running: its temporary folder and the handling of signals.
        seconds: the seconds of the stages are added to it.
    """
    inputs = run.inputs
    config, reader = inputs.config, inputs.reader
    with timed(seconds, "prepare"):
        prepared, selection = _prepare(inputs.model, config, running.work / "float")
        check_nodes(config, inputs.model, prepared)
        check_outputs(config, prepared, reader)
        judge = choose_judge(
            config.strategy.engine, inputs.device, inputs.model, decoder=decoder_for(config, inputs.model)
        )
        check_placement(config, judge.engine, judge.device)
    fp32, cached = None, False
    if config.global_.evaluation:
        with timed(seconds, "evaluate_fp32"):
            fp32, cached = _evaluate_float(inputs, judge, run.progress)
    folder = running.work / "strategies"
    folder.mkdir()
    return Job(
        config=config,
        model=prepared,
        selection=selection,
        reader=reader,
        judge=judge,
        fp32=fp32,
        tried=Candidates(config.strategy, judge, reader, fp32, progress=run.progress),
        held_out=HeldOut(config, reader, judge, prepared),
        work=folder,
        device=inputs.device,
        progress=run.progress,
        checkpoints=run.checkpoints,
        interruption=running.interruption,
        fp32_cached=cached,
        ranks=run.ranks,
    )


def _evaluate_float(inputs: _Inputs, judge: Judge, progress: bool) -> tuple[Evaluation, bool]:
    """Return the float model's evaluation, and whether it comes from the cache; raise UserError if it is useless."""
    fp32, cached = judge.evaluate_float(inputs.model, inputs.reader, progress)
    if progress:
        figure = ", ".join(fp32.figures()) if fp32.has_map else "no labels, no mAP"
        print(f"FP32: {figure} on {fp32.images} images, {judge.name('fp32')}", file=sys.stderr)
    check_origin(inputs.config, fp32)
    check_worth(inputs.config, fp32, inputs.reader)
    return fp32, cached


def _prepare(model: InferenceModel, config: Config, directory: Path) -> tuple[InferenceModel, Selection]:
    """Return the folded float model, its ops that stay float marked, and the ops to compute in INT8."""
    graph = fold(model)
    ops = quantizable_ops(graph, config.op_types)
    if not ops:
        raise UserError(
            f"{config.path}: {model.directory} has no op of {config.op_section}.quantize_op_types "
            f"({', '.join(config.op_types)}); name the types of ops that the model has"
        )
    selection = select(ops, config.quantize, config.path, float_by_default(graph, ops))
    check_dynamic(graph, selection, config.path)
    mark_float(graph, list(selection.kept))
    prepared = save_folded(graph, directory)
    copy_infer_cfg(model, prepared.directory)  # a training reads the family and the classes from it
    return prepared, selection
