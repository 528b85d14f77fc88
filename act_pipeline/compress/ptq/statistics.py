"""Statistics of the calibration images, gathered in one run of the float graph, for all algorithms."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from act_pipeline.calibration import AbsHistogram, AbsMax, ChannelMean, Observer, collect, quantizable_tensors
from act_pipeline.calibration.feeds import feeds_of
from act_pipeline.calibration.observers import Divided, DividedHistogram
from act_pipeline.compress.paddleslim import qdq_program
from act_pipeline.compress.ptq.bias_correction import find_biases
from act_pipeline.compress.ptq.insertion import Inserted
from act_pipeline.compress.smooth_quant.groups import DividedTensor
from act_pipeline.config import Config, QuantPost
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
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
        model, config, batches, device: as for :class:`act_pipeline.compress.ptq.quantizer.PostTraining`.
        inserted: the float graph and its program with Q/DQ, of :func:`act_pipeline.compress.ptq.insertion.insert`.
        spare: further activations to gather statistics of.
        divided: as there.

    Raises:
        UserError: as there.
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
