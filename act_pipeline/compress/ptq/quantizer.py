"""Post-training quantization: scales from calibration images, without training.

The float graph is run once over the images (`calibration.collector`). The threshold of each activation is computed from
its statistics (`calibration.thresholds`), and weights are rounded per channel. The model is written by the same passes
and code as a trained one (`compress.paddleslim.int8_program`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.calibration import AbsHistogram, AbsMax, ChannelMean, Observer, collect, quantizable_tensors
from act_pipeline.calibration.feeds import feeds_of
from act_pipeline.calibration.observers import Divided, DividedHistogram
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.paddleslim import qdq_program
from act_pipeline.compress.paddleslim.int8_program import save_int8
from act_pipeline.compress.plan.op_inventory import OpInventory, inventory_of
from act_pipeline.compress.plan.op_selection import Selection, skip_patterns, unmark_float
from act_pipeline.compress.ptq.bias_correction import correct_biases, find_biases
from act_pipeline.compress.smooth_quant.groups import DividedTensor
from act_pipeline.config import Config, QuantPost
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.core.timing import timed
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.residual_connections import shortcuts
from act_pipeline.graph.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
# Ranges of tensors that are not quantized are only hints for TensorRT, so a few images suffice.
_OBSERVED_IMAGES = 8
# Values sampled of a tensor on one image: 13 million with 200 images, more than any threshold needs.
_SAMPLED_VALUES = 1 << 16
_NAMED_TENSORS = 3


@dataclass
class Calibration:
    """Result of a post-training quantization.

    Attributes:
        model: the saved INT8 model.
        inventory: its INT8 ops.
        images: the number of calibration images that were run.
        thresholds: quantized activation -> the largest absolute value that INT8 represents; 0 for ``zero_tensors``,
            whose scale in the model is that of threshold 1.
        corrected_biases: the number of biases that were corrected.
        zero_tensors: activations that were zero on all images.
        seconds: seconds of the stages ``calibrate`` and ``quantize``.
    """

    model: InferenceModel
    inventory: OpInventory
    images: int
    thresholds: dict[str, float]
    corrected_biases: int = 0
    zero_tensors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Statistics:
    """Statistics of the calibration images, which the thresholds of all algorithms are computed from.

    Attributes:
        images: the number of images that were run.
        activations: activation that is quantized, or may be later -> its histogram.
        means: input of an op whose bias can be corrected -> the mean of each channel.
        ranges: tensor that is only observed -> its range on the first images; of what residual connections may read
            rounded (`graph.residual_connections`) its histogram.
        divided: tensor that has other values in an equalized model -> its histogram or range there.
    """

    images: int
    activations: dict[str, AbsHistogram]
    means: dict[str, ChannelMean]
    ranges: dict[str, AbsMax]
    divided: dict[str, AbsMax] = field(default_factory=dict)

    def of(self, names: Collection[str]) -> Statistics:
        """Return the statistics of a model in which only these activations are quantized."""
        activations = {name: seen for name, seen in self.activations.items() if name in names}
        means = {name: seen for name, seen in self.means.items() if name in names}
        return Statistics(self.images, activations, means, self.ranges)

    def equalized(self, divided: Mapping[str, DividedTensor]) -> Statistics:
        """Return the statistics of the equalized model, which were gathered on the same images."""
        other: dict[str, Any] = self.divided
        means = {name: seen.divided(divided[name].by) if name in other else seen for name, seen in self.means.items()}
        activations = {name: other.get(name, seen) for name, seen in self.activations.items()}
        return Statistics(
            self.images, activations, means, {name: other.get(name, seen) for name, seen in self.ranges.items()}
        )


class PostTraining:
    """Run the calibration images once, then write INT8 models by any calibration algorithm.

    Use it within :func:`static_mode`.

    Attributes:
        model: the float model.
        statistics: statistics of the calibration images.
        seconds: ``calibrate`` -> seconds that the calibration images took.
        written: algorithm -> the model that was written for a comparison, for who wants the same one.
    """

    def __init__(
        self,
        model: InferenceModel,
        config: Config,
        batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
        device: str = "CPU",
        selection: Selection | None = None,
        spare: Collection[str] = (),
        divided: Mapping[str, DividedTensor] | None = None,
    ) -> None:
        """Run the calibration images through the float model.

        Args:
            model: the float model with folded constants and BatchNorm.
            config: section ``QuantPost`` has the settings.
            batches: yields the calibration images in batches, the same at every call.
            device: ``CPU`` or ``GPU``, where the float model runs.
            selection: the ops to quantize; None: all of ``QuantPost.quantize_op_types``. Those that stay float have to
                be marked in ``model`` (:func:`act_pipeline.compress.plan.op_selection.mark_float`).
            spare: ops that stay float by default whose inputs are calibrated too, so that :meth:`write` can have them
                in INT8.
            divided: tensors that have other values in an equalized model, for :meth:`equalized`; None: there is none.

        Raises:
            UserError: a weight or tensor is NaN or infinite, no op can be quantized, or memory does not suffice.
        """
        self.model = model
        self._config = config
        self._selection = selection
        self._divided = divided or {}
        self.seconds: dict[str, float] = {}
        self.written: dict[CalibrationAlgorithm, Calibration] = {}
        read = [name for op in (selection.ops if selection else ()) if op.name in spare for name in op.activations]
        with timed(self.seconds, "calibrate"):
            self._inserted: Inserted | None = insert(model, config.quant_post)
            self.statistics = gather(model, self._inserted, config, batches, device, dict.fromkeys(read), self._divided)

    def equalized(self, model: InferenceModel, selection: Selection | None) -> PostTraining:
        """Return the calibration of the equalized model on the same images, which are not run again.

        Args:
            model: the equalized float model, whose tensors are those of ``divided``, and else have the same values.
            selection: the ops to quantize; None: all.
        """
        found = copy.copy(self)
        found.model, found._selection, found._divided, found.seconds = model, selection, {}, {}
        found.written = {}
        found._inserted = None
        found.statistics = self.statistics.equalized(self._divided)
        return found

    def thresholds(self, algo: CalibrationAlgorithm) -> dict[str, float]:
        """Return quantized activation -> its threshold by ``algo``; see `calibration.thresholds.threshold`."""
        return _thresholds(self.statistics, dataclasses.replace(self._config.quant_post, algo=algo))

    def write(
        self, save_dir: Path, algo: CalibrationAlgorithm | None = None, taken_back: Collection[str] = ()
    ) -> Calibration:
        """Write the INT8 model.

        Args:
            save_dir: an existing folder for the model.
            algo: the calibration algorithm; None: ``QuantPost.algo``.
            taken_back: those of the spare ops that compute in INT8 in this model.
        """
        selection = self._selection.take_back(taken_back) if self._selection else None
        seconds = dict(self.seconds)
        with timed(seconds, "quantize"):
            settings = self._config.quant_post
            settings = settings if algo is None else dataclasses.replace(settings, algo=algo)
            # Writing replaces the scope's float weights by integers, so a second call has to load the model again.
            inserted = None if taken_back else self._inserted
            if inserted is None:
                inserted = insert(self.model, settings, taken_back)
            else:
                self._inserted = None
            weight_only = selection.weight_only if selection else ()
            whole = save_dir / ".whole" if weight_only else save_dir
            whole.mkdir(exist_ok=True)
            calibration = write(inserted, settings, self.statistics, whole, selection)
            if weight_only:
                dynamic = selection.dynamic if selection else ()
                calibration.model = revert_to_float(calibration.model, weight_only, save_dir, dynamic=dynamic)
                calibration.inventory = inventory_of(
                    calibration.model, settings.quantize_op_types, "QuantPost", selection
                )
                shutil.rmtree(whole)
        calibration.seconds = seconds
        return calibration


def gather(
    model: InferenceModel,
    inserted: Inserted,
    config: Config,
    batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
    device: str = "CPU",
    spare: Collection[str] = (),
    divided: Mapping[str, DividedTensor] | None = None,
) -> Statistics:
    """Run the calibration images through the float model and gather statistics.

    Args:
        model, config, batches, device: as for :class:`PostTraining`.
        inserted: the float graph and its program with Q/DQ, of :func:`insert`.
        spare: further activations to gather statistics of.
        divided: see :class:`PostTraining`.

    Raises:
        UserError: as :class:`PostTraining`.
    """
    settings, graph = config.quant_post, inserted.graph
    names = qdq_program.quantized_tensors(inserted.program)
    if not names:
        raise UserError(
            f"{config.path}: {model.directory} has no op of QuantPost.quantize_op_types "
            f"({', '.join(settings.quantize_op_types)}); name the types of ops that the model has"
        )
    where = str(config.global_.model_dir)
    _check_weights(inserted, where)
    readers = quantizable_tensors(graph, settings.quantize_op_types)
    feeds = feeds_of(config, model, batches)
    activations = {name: AbsHistogram(_SAMPLED_VALUES) for name in dict.fromkeys([*names, *spare])}
    means = _channel_means(graph, settings, activations)
    observed = [name for name in qdq_program.observed_tensors(inserted.program) if name not in names]
    added = {shortcut.name for shortcut in shortcuts(graph)}
    ranges = {name: AbsHistogram(_SAMPLED_VALUES) if name in added else AbsMax(finite_only=True) for name in observed}
    observers: dict[str, Sequence[Observer]] = {
        name: [histogram, *([means[name]] if name in means else [])] for name, histogram in activations.items()
    }
    apart: dict[str, AbsMax] = {}
    for name, tensor in (divided or {}).items():
        if name in observers:
            apart[name] = DividedHistogram(_SAMPLED_VALUES, tensor.by, tensor.axis)
            observers[name] = [*observers[name], apart[name]]
    ranged: dict[str, Sequence[Observer]] = {name: [seen] for name, seen in ranges.items()}
    for name in ranges:
        if divided and name in divided and name not in apart:
            apart[name] = AbsMax(finite_only=True)
            ranged[name] = [ranges[name], Divided(apart[name], divided[name].by, divided[name].axis)]
    with contextlib.closing(feeds()) as images:
        # All tensors are observed on the first images, so that a damaged tensor is found on the first one.
        few = islice(images, -(-_OBSERVED_IMAGES // settings.batch_size))
        everything = {**observers, **{name: [*observers.get(name, ()), *seen] for name, seen in ranged.items()}}
        run = collect(model, everything, few, device, {**_producers(graph), **readers}, where)
        run += collect(model, observers, images, device, readers, where)
    zeros = [f"{name}, {readers[name]}" for name in names if activations[name].abs_max == 0]
    if zeros:
        _logger.warning(
            "%d of %d quantized activations were zero on all %d calibration images: %s",
            len(zeros),
            len(names),
            run,
            "; ".join(zeros[:_NAMED_TENSORS]) + " ..." * (len(zeros) > _NAMED_TENSORS),
        )
    return Statistics(run, activations, means, ranges, apart)


def _channel_means(graph: StaticGraph, settings: QuantPost, activations: Collection[str]) -> dict[str, ChannelMean]:
    """Return the inputs of ops whose bias is corrected -> what measures the mean of each channel."""
    if not settings.bias_correction:
        return {}
    biases = [bias for bias in find_biases(graph, settings.quantize_op_types) if bias.source in activations]
    # The first bias of an activation decides on the axis of the channels.
    return {bias.source: ChannelMean(bias.channel_axis) for bias in reversed(biases)}


def write(
    inserted: Inserted,
    settings: QuantPost,
    statistics: Statistics,
    save_dir: Path,
    selection: Selection | None = None,
) -> Calibration:
    """Compute the thresholds, correct the biases and write the INT8 model.

    Args:
        inserted: the output of :func:`insert`; its graph is changed and closed.
        settings: section ``QuantPost``.
        statistics: the output of :func:`gather`.
        save_dir: an existing folder for the model.
        selection: the ops to quantize; None: all.
    """
    graph = inserted.graph
    statistics = statistics.of(qdq_program.quantized_tensors(inserted.program))
    thresholds = _thresholds(statistics, settings)
    # A tensor of zeros is exact at any scale. The threshold 1 is a guess for other values that may occur at inference.
    ranges = {name: _threshold(seen, settings) for name, seen in statistics.ranges.items()}
    used = {name: value or 1.0 for name, value in {**ranges, **thresholds}.items()}
    with quiet_upstream():
        corrected = _correct_biases(graph, settings, statistics, selection) if settings.bias_correction else 0
        qdq_program.set_scales(inserted.program, graph, used)
        if settings.zero_points:
            lowest = {name: seen.lowest for name, seen in statistics.activations.items() if thresholds[name] > 0}
            qdq_program.set_lowest(inserted.program, lowest)
        saved, inventory = save_int8(
            inserted.program,
            graph.scope,
            graph.executor.place,
            feed_names=graph.feed_names,
            fetch_names=[target.name for target in graph.fetch_targets],
            op_types=settings.quantize_op_types,
            directory=save_dir,
            section="QuantPost",
            selection=selection,
        )
    graph.close()
    zeros = [name for name, value in thresholds.items() if value == 0]
    return Calibration(saved, inventory, statistics.images, thresholds, corrected, zeros)


def _thresholds(statistics: Statistics, settings: QuantPost) -> dict[str, float]:
    return {name: _threshold(seen, settings) for name, seen in statistics.activations.items()}


def _threshold(seen: AbsMax, settings: QuantPost) -> float:
    """Return the threshold of a tensor: by the algorithm if there is a histogram of it."""
    if not isinstance(seen, AbsHistogram):
        return seen.abs_max
    return threshold(seen, settings.algo, settings.hist_percent, settings.zero_points)


def _correct_biases(
    graph: StaticGraph, settings: QuantPost, statistics: Statistics, selection: Selection | None
) -> int:
    """Correct the biases of the ops that are quantized; return their number."""
    means = {name: observer.mean for name, observer in statistics.means.items()}
    kept = selection.kept if selection else {}
    biases = [
        bias for bias in find_biases(graph, settings.quantize_op_types) if bias.source in means and bias.op not in kept
    ]
    return correct_biases(graph, biases, means, settings.weight_quantize_type == "channel_wise_abs_max")


@dataclass
class Inserted:
    """A float graph and its program with Q/DQ inserted, which share a scope.

    Attributes:
        graph: the float graph.
        program: the program with Q/DQ and observers.
    """

    graph: StaticGraph
    program: Any


def insert(model: InferenceModel, settings: QuantPost, taken_back: Collection[str] = ()) -> Inserted:
    """Load a float model and insert Q/DQ, whose scales are not valid yet.

    Args:
        model: the float model with folded constants and BatchNorm.
        settings: section ``QuantPost``.
        taken_back: ops that get Q/DQ although they are marked in ``model``.
    """
    with quiet_upstream():
        graph = StaticGraph.load(model)
        graph.unwrap_outputs()
        unmark_float(graph, taken_back)
        program = qdq_program.insert_quantization(
            graph,
            {
                "quantize_op_types": settings.quantize_op_types,
                "weight_quantize_type": settings.weight_quantize_type,
                "activation_quantize_type": "moving_average_abs_max",
                "not_quant_pattern": skip_patterns(settings.not_quant_pattern),
                "weight_bits": settings.weight_bits,
                "activation_bits": settings.activation_bits,
                "onnx_format": settings.onnx_format,
            },
        )
    return Inserted(graph, program)


def _check_weights(inserted: Inserted, where: str) -> None:
    """Raise UserError for weights with NaN or infinite values, since a ReLU may hide the NaN from the observers."""
    readers = GraphIndex(inserted.graph.program.global_block().ops).readers
    for op in inserted.program.global_block().ops:
        name = op.input("X")[0] if op.type == "quantize_linear" else ""
        if inserted.graph.is_parameter(name) and not np.isfinite(inserted.graph.parameter(name)).all():
            reader = readers[name][0]
            raise UserError(
                f"{where}: weight {name} of {reader.type} ({reader.output_arg_names[0]}) holds NaN or infinite values; "
                "its training or its file is damaged: evaluate the float model, and export it again"
            )


def _producers(graph: StaticGraph) -> dict[str, str]:
    return {
        name: f"given by {op.type} ({op.output_arg_names[0]})"
        for op in graph.program.global_block().ops
        for name in op.output_arg_names
    }
