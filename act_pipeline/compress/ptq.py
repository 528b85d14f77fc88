"""Post-training quantization: scales from calibration images, no training.

The float graph is run once over the images (`analysis.collect`), each activation's threshold is taken from its
statistics (`compress.calibration`), weights are rounded per channel, and the model is written by the passes and the
code that write the trained one (`compress.quant_graph`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.analysis import AbsHistogram, AbsMax, ChannelMean, Observer, collect, quantizable_tensors
from act_pipeline.compress import quant_graph
from act_pipeline.compress.act import feed_sources, quiet_upstream
from act_pipeline.compress.bias_correction import correct_biases, find_biases
from act_pipeline.compress.calibration import threshold
from act_pipeline.compress.inventory import OpInventory
from act_pipeline.config import Config, QuantPost
from act_pipeline.data import Reader
from act_pipeline.engines.model_files import inspect_model
from act_pipeline.errors import UserError
from act_pipeline.model import InferenceModel
from act_pipeline.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
# Ranges of tensors that are not quantized are hints to TensorRT only: a few images do.
_OBSERVED_IMAGES = 16
_NAMED_TENSORS = 3


@dataclass
class Calibration:
    """What a post-training quantization did.

    Attributes:
        model: the INT8 model as saved.
        inventory: its INT8 ops.
        images: how many calibration images were run.
        thresholds: quantized activation -> the largest absolute value it represents.
        corrected_biases: how many biases were corrected.
        zero_tensors: activations that were zero on every image.
        seconds: by stage, ``calibrate`` and ``quantize``.
    """

    model: InferenceModel
    inventory: OpInventory
    images: int
    thresholds: dict[str, float]
    corrected_biases: int = 0
    zero_tensors: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def quantize(
    model: InferenceModel,
    config: Config,
    batches: Callable[[], Iterator[Mapping[str, np.ndarray]]],
    save_dir: Path,
    device: str = "CPU",
) -> Calibration:
    """Quantize a float model after its training; call it within :func:`static_mode`.

    Args:
        model: the float model, its constants and BatchNorm folded.
        config: its ``QuantPost`` says how.
        batches: gives the calibration images, the same at every call.
        save_dir: an existing folder for the INT8 model.
        device: ``CPU`` or ``GPU``, where the float model runs.

    Raises:
        UserError: a tensor is NaN or infinite, no op can be quantized, or memory does not suffice.
    """
    settings = config.quant_post
    start = time.perf_counter()
    graph, program = insert(model, settings)
    names = quant_graph.quantized_tensors(program)
    if not names:
        raise UserError(
            f"{config.path}: {model.directory} has no op of QuantPost.quantize_op_types "
            f"({', '.join(settings.quantize_op_types)}); name the types of ops that the model has"
        )
    readers = quantizable_tensors(graph, settings.quantize_op_types)
    feed_names = list(inspect_model(model).inputs)

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches():
            yield {name: batch[source] for name, source in feed_sources(config, feed_names, batch).items()}

    histograms = {name: AbsHistogram() for name in names}
    observers: dict[str, list[Observer]] = {name: [histograms[name]] for name in names}
    biases = find_biases(graph, settings.quantize_op_types) if settings.bias_correction else []
    means: dict[str, ChannelMean] = {}
    for bias in biases:
        if bias.source not in means:
            means[bias.source] = ChannelMean(bias.channel_axis)
            observers[bias.source].append(means[bias.source])
    images = collect(model, observers, feeds(), device, readers)
    ranges = {name: AbsMax() for name in quant_graph.observed_tensors(program) if name not in histograms}
    if ranges:
        few = islice(feeds(), -(-_OBSERVED_IMAGES // settings.batch_size))
        collect(model, {name: [observer] for name, observer in ranges.items()}, few, device)
    thresholds = {name: threshold(seen, settings.algo, settings.hist_percent) for name, seen in histograms.items()}
    zeros = [name for name, value in thresholds.items() if value == 0]
    if zeros:
        _logger.warning(
            "%d of %d quantized activations were zero on all %d calibration images: %s",
            len(zeros), len(thresholds), images, _shorten([f"{name}, read by {readers[name]}" for name in zeros]),
        )
    calibrated = time.perf_counter()
    # Zeros are zeros at any scale; what else comes at inference is kept as well as can be without having seen it.
    used = {name: value or 1.0 for name, value in thresholds.items()}
    used.update({name: observer.abs_max or 1.0 for name, observer in ranges.items()})
    with quiet_upstream():
        corrected = correct_biases(graph, biases, {name: seen.mean for name, seen in means.items()})
        quant_graph.set_scales(program, graph, used)
        saved, inventory = quant_graph.save_int8(
            program, graph.scope, graph.executor.place, graph.feed_names,
            [target.name for target in graph.fetch_targets], settings.quantize_op_types, save_dir, "QuantPost",
        )
    seconds = {"calibrate": calibrated - start, "quantize": time.perf_counter() - calibrated}
    return Calibration(saved, inventory, images, thresholds, corrected, zeros, seconds)


def insert(model: InferenceModel, settings: QuantPost) -> tuple[StaticGraph, Any]:
    """Return the float graph and the program with Q/DQ inserted, which share a scope."""
    with quiet_upstream():
        graph = StaticGraph.load(model)
        graph.unwrap_outputs()
        program = quant_graph.insert_quantization(
            graph,
            {
                "quantize_op_types": settings.quantize_op_types,
                "weight_quantize_type": settings.weight_quantize_type,
                "activation_quantize_type": "moving_average_abs_max",
                "not_quant_pattern": settings.not_quant_pattern,
                "weight_bits": settings.weight_bits,
                "activation_bits": settings.activation_bits,
                "onnx_format": settings.onnx_format,
            },
        )
    return graph, program


def calibration_batches(
    reader: Reader, settings: QuantPost, progress: bool = True
) -> Callable[[], Iterator[Mapping[str, np.ndarray]]]:
    """Return what gives the calibration images: of the train split, chosen at random from a seed.

    Fewer than asked for are used all, and that is said.

    Raises:
        UserError: there are none.
    """
    loader = reader.loader(
        "train", batch_size=settings.batch_size, shuffle=False, drop_last=False, seed=settings.seed,
        images=settings.images,
    )
    found = loader.dataset.readable()
    if found < settings.images:
        _logger.warning(
            "%s: TrainDataset has %d images, %d were asked for (QuantPost.%s); calibrating on all of them",
            reader.path, found, settings.images, "calib_images" if settings.batch_nums is None else "batch_nums",
        )

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        from tqdm import tqdm

        with contextlib.closing(iter(loader)) as images:
            yield from tqdm(
                images, total=len(loader), desc="calibrate", unit="batch", disable=not progress, leave=False
            )

    return batches


def _shorten(lines: Sequence[str]) -> str:
    return "; ".join(lines[:_NAMED_TENSORS]) + (" ..." if len(lines) > _NAMED_TENSORS else "")
