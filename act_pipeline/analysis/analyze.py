"""Analysis of a float model: distributions of its tensors and the INT8 sensitivity of each op."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.analysis.distributions import TensorObserver, observe_activations, weight_statistics
from act_pipeline.analysis.executors import measure_sensitivity
from act_pipeline.analysis.ledger import Ledger
from act_pipeline.analysis.plots import draw_plots
from act_pipeline.analysis.sensitivity import OpSensitivity, attention_shares, group_shares, ranked
from act_pipeline.analysis.sensitivity_task import Subset, Task
from act_pipeline.calibration.collector import collect, quantizable_tensors
from act_pipeline.calibration.observers import NotFiniteError
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_folder
from act_pipeline.core.process_pool import EXECUTORS
from act_pipeline.core.records import ANALYSIS_FILENAME, ANALYSIS_SCHEMA, read_record, write_record
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader, log_notes
from act_pipeline.data.transforms import INPUTS
from act_pipeline.families.registry import decoder_for
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.quantizable_ops import QuantizableOp, quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode

LEDGER_FILENAME = "sensitivity.jsonl"
SENSITIVITY_IMAGES = 8
# Images in memory at a time in every worker; about 0.3 GB per image of 640 x 640.
_BATCH_IMAGES = 4
_NAMED_TENSORS = 3

_logger = logging.getLogger(__name__)


@dataclass
class Analysis:
    """Result of an analysis.

    Attributes:
        directory: the folder with ``analysis.json`` and the plots.
        record: the content of ``analysis.json``.
        sensitivities: sensitivities of the ops, in graph order; empty if they were not measured.
        plots: paths of the plots.
    """

    directory: Path
    record: dict[str, Any]
    sensitivities: list[OpSensitivity] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)


def analyze(
    config: Config,
    output_dir: str | os.PathLike[str],
    *,
    device: str = "auto",
    images: int | None = None,
    sensitivity: bool = True,
    sensitivity_images: int = SENSITIVITY_IMAGES,
    map_images: int = 0,
    workers: int = 1,
    executor: str = "local",
    ray_address: str | None = None,
    progress: bool = True,
    reader_overrides: Sequence[str] = (),
) -> Analysis:
    """Analyse the float model of a config, and write ``analysis.json`` and plots.

    One pass over the calibration images yields the distributions. Then each quantizable op alone is quantized to INT8,
    with thresholds found by ``QuantPost.algo``, and measured on images that were not used for calibration. Measurements
    are stored in ``sensitivity.jsonl``; an interrupted run resumes from them.

    Args:
        config: the model, the data, the op types and the calibration settings; its strategy and ``quantize`` have no
            effect.
        output_dir: the output folder; it is created if missing, and other files in it are left unchanged.
        device: ``CPU``, ``GPU`` or ``auto``.
        images: number of calibration images; None for the number in ``QuantPost``.
        sensitivity: whether to measure sensitivities.
        sensitivity_images: number of images for them.
        map_images: number of images of the eval split on which the mAP of every op is also measured; 0 for none.
        workers, executor, ray_address: see :func:`act_pipeline.analysis.executors.run_units`.
        progress: show progress bars on stderr.
        reader_overrides: ``Section.key=value`` each, applied to the reader file.

    Raises:
        UserError: model and data do not fit together, there are no calibration images, a tensor is NaN or infinite (its
            op is named), another process writes to ``output_dir``, a worker or a cluster fails, or memory does not
            suffice.
    """
    from act_pipeline.core.locking import hold_lock
    from act_pipeline.engines.device import paddle_device
    from act_pipeline.engines.float_model import require_float

    _check_arguments(images, sensitivity_images, map_images, workers, executor)
    target = Path(output_dir)
    require_writable_folder(target, "--output_dir")
    model = InferenceModel.load(config.global_.model_dir, config.global_.model_filename, config.global_.params_filename)
    require_float(model)
    if images is not None:
        post = dataclasses.replace(config.quant_post, calib_images=images, batch_nums=None)
        config = dataclasses.replace(config, quant_post=post)
    fit = fit_reader(model, Reader.load(config.global_.reader_config, reader_overrides))
    reader = fit.reader
    log_notes(fit.notes)
    reader.check("train", *(["eval"] if map_images else []))
    if map_images:
        reader.require_labels("eval", "--map_images")
    device = paddle_device(device)
    subset = Subset(reader.settings, reader.fingerprint("eval"), map_images, {}) if map_images else None
    with hold_lock(target), tempfile.TemporaryDirectory(prefix="act_pipeline_") as work, static_mode():
        target.mkdir(parents=True, exist_ok=True)
        study = _Study(config, model, reader, device=device, work=Path(work), progress=progress)
        study.distributions()
        sensitivities: list[OpSensitivity] = []
        if sensitivity:
            sensitivities = study.sensitivities(
                target / LEDGER_FILENAME,
                sensitivity_images,
                subset,
                executor=executor,
                workers=workers,
                ray_address=ray_address,
            )
        record = study.record(sensitivities, {"executor": executor, "workers": workers})
        with timed(study.seconds, "plot"):
            plots = draw_plots(record, target)
        record["seconds"]["plot"] = round(study.seconds["plot"], 2)
        write_record(target / ANALYSIS_FILENAME, ANALYSIS_SCHEMA, record)
    return Analysis(target, read_record(target / ANALYSIS_FILENAME, ANALYSIS_SCHEMA), sensitivities, plots)


class _Study:
    """State of a running analysis: the prepared model, its ops and the results so far."""

    def __init__(
        self, config: Config, model: InferenceModel, reader: Reader, *, device: str, work: Path, progress: bool
    ) -> None:
        from act_pipeline.graph.folding import prepare

        self.config, self.model, self.reader = config, model, reader
        self.device, self.progress = device, progress
        self.decoder = decoder_for(config, model)
        self.seconds: dict[str, float] = {}
        with timed(self.seconds, "prepare"):
            self.prepared = prepare(model, work / "float")
            self.graph = StaticGraph.load(self.prepared)
            self.ops: list[QuantizableOp] = quantizable_ops(self.graph, config.op_types)
        if not self.ops:
            raise UserError(
                f"{config.path}: {model.directory} has no op of quantize_op_types ({', '.join(config.op_types)}); "
                "name the types of ops that the model has"
            )
        self.observers: dict[str, TensorObserver] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.thresholds: dict[str, float] = {}
        self.constants: list[str] = []
        self.images = self.sensitivity_images = 0
        self.key: str | None = None

    def distributions(self) -> None:
        """Run the calibration images once and collect the statistics and thresholds of all tensors."""
        from act_pipeline.calibration.feeds import feeds_of
        from act_pipeline.calibration.images import calibration_batches
        from act_pipeline.calibration.thresholds import threshold

        settings = self.config.quant_post
        where = str(self.config.global_.model_dir)
        with timed(self.seconds, "collect"):
            try:
                self.weights = weight_statistics(self.graph, self.ops)
            except NotFiniteError as error:
                raise UserError(
                    f"{where}: {error}; its training or its file is damaged: evaluate the float model, and export "
                    "it again"
                ) from None
            self.observers = observe_activations(self.ops)
            readers = quantizable_tensors(self.graph, self.config.op_types)
            feeds = feeds_of(self.config, self.prepared, calibration_batches(self.reader, settings, self.progress))
            watched = {name: observer.observers for name, observer in self.observers.items()}
            self.images = collect(self.prepared, watched, feeds(), self.device, readers, where)
        if not self.images:
            raise UserError(f"{self.reader.path}: TrainDataset gave no calibration image, expected at least one")
        with timed(self.seconds, "thresholds"):
            self.thresholds = {
                name: threshold(observer.histogram, settings.algo, settings.hist_percent)
                for name, observer in self.observers.items()
            }
        self.constants = [f"{name}, {readers[name]}" for name, seen in self.observers.items() if seen.constant]
        if self.constants:
            _logger.warning(
                "%d of %d activations were constant on all %d calibration images: %s",
                len(self.constants),
                len(self.observers),
                self.images,
                "; ".join(self.constants[:_NAMED_TENSORS]) + " ..." * (len(self.constants) > _NAMED_TENSORS),
            )

    def sensitivities(
        self,
        ledger: Path,
        images: int,
        subset: Subset | None,
        *,
        executor: str,
        workers: int,
        ray_address: str | None,
    ) -> list[OpSensitivity]:
        """Measure the sensitivity of every op; see :func:`analyze` for the arguments."""
        from act_pipeline.calibration.feeds import held_out_feeds, model_feed, model_inputs

        with timed(self.seconds, "sensitivity"):
            found = held_out_feeds(self.config, self.reader, self.prepared, images)
            feeds = [model_inputs(feed, self.prepared) for feed in found]
            batches = [_joined(feeds[at : at + _BATCH_IMAGES]) for at in range(0, len(feeds), _BATCH_IMAGES)]
            if subset is not None:
                names = {name: name for name in (*INPUTS, *self.reader.settings.constants)}
                # Given names instead of arrays, model_feed maps the model's inputs to the reader's names.
                sources = model_feed(self.config, list(inspect_model(self.prepared).inputs), names)
                subset = dataclasses.replace(subset, sources=sources)
            task = Task.of(
                self.prepared,
                self.ops,
                self.thresholds,
                batches,
                device=self.device,
                subset=subset,
                source_hash=self.model.content_hash(),
                decoder=self.decoder,
            )
            self.sensitivity_images, self.key = task.images, task.key
            return measure_sensitivity(task, Ledger(ledger, task.key), executor, workers, ray_address, self.progress)

    def record(self, sensitivities: Sequence[OpSensitivity], how: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of ``analysis.json``."""
        measured = {op.name: op for op in sensitivities}
        settings = self.config.quant_post
        return {
            "model": str(self.model.directory),
            "source_hash": self.model.content_hash(),
            "data_hash": {"train": self.reader.fingerprint("train")},
            "config": self.config.as_dict(),
            "device": self.device,
            "images": self.images,
            "images_asked": settings.images,
            "algo": settings.algo,
            "constant_activations": self.constants,
            "ops": [self._described(op, measured.get(op.name)) for op in self.ops],
            "ranking": [op.name for op in ranked(sensitivities)],
            "groups": group_shares(sensitivities),
            "attentions": attention_shares(sensitivities),
            "sensitivity": {"images": self.sensitivity_images, "key": self.key, **how} if sensitivities else None,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def _described(self, op: QuantizableOp, measured: OpSensitivity | None) -> dict[str, Any]:
        figures = ("sqnr_db", "error", "share", "detection_change", "map")
        return {
            "name": op.name,
            "type": op.type,
            "module": op.module,
            "group": op.group,
            **({name: getattr(measured, name) for name in figures} if measured else {}),
            "activations": [
                {"tensor": name, "threshold": self.thresholds[name], **self.observers[name].statistics()}
                for name in op.activations
            ],
            "weight": {"name": op.weight, **self.weights[op.weight]} if op.weight else None,
        }


def _check_arguments(images: int | None, sensitivity_images: int, map_images: int, workers: int, executor: str) -> None:
    for flag, value, least in (
        ("--images", images, 1),
        ("--sensitivity_images", sensitivity_images, 1),
        ("--map_images", map_images, 0),
        ("--workers", workers, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{flag} is {value}, expected at least {least}")
    if executor not in EXECUTORS:
        raise UserError(f"--executor is '{executor}', expected one of {', '.join(EXECUTORS)}")


def _joined(feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
