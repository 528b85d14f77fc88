"""SmoothQuant on a static graph: move outliers of activations into the weights of the ops that read them.

:mod:`act_pipeline.compress.smooth_quant.groups` finds the matmuls after a LayerNorm that share factors, and applies the
factors; :mod:`act_pipeline.compress.smooth_quant.pairs` finds those between two convolutions or matmuls.
:mod:`act_pipeline.compress.smooth_quant.factors` computes the factors and their benefit. This module gathers statistics
of a model, smooths it, checks that its outputs stay the same, and writes it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from act_pipeline.calibration import collect
from act_pipeline.calibration.row_sample import ChannelAbsMax, RowSample
from act_pipeline.compress.smooth_quant.factors import Choice, Sample, search
from act_pipeline.compress.smooth_quant.groups import (
    DividedTensor,
    SmoothGroup,
    apply_factors,
    divided_tensors,
    find_groups,
    input_weights,
)
from act_pipeline.compress.smooth_quant.pairs import find_pairs
from act_pipeline.config import SmoothQuant
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.execution.finite_checks import guarded_outputs
from act_pipeline.graph.int8_rounding import sqnr_db
from act_pipeline.graph.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
# Largest allowed change of the float model's outputs, relative to the largest value; see `largest_difference`.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SmoothedLayer:
    """Result of the search for a group.

    Attributes:
        activation, source, ops: as in :class:`SmoothGroup`.
        alpha: the best alpha; None if the activation or all weights were zero.
        sqnr_before_db: signal-to-quantization-noise ratio of the ops' outputs without smoothing, in decibels, on
            images that the threshold and the factors were not chosen on; None if there is no signal or no noise.
        sqnr_after_db: the same with the best alpha, whether it is used or not.
        smoothed: whether the factors are applied.
        folded: whether the factors are folded into the source; else they are in a separate multiplication.
        reason: why the factors are not applied; empty if they are.
    """

    activation: str
    source: str | None
    ops: tuple[str, ...]
    alpha: float | None
    sqnr_before_db: float | None
    sqnr_after_db: float | None
    smoothed: bool
    folded: bool
    reason: str = ""


@dataclass
class Smoothed:
    """A smoothed float model.

    Attributes:
        model: the saved model; the original one if nothing was smoothed.
        layers: one entry for each group, in the order of the graph.
        images: the number of images that statistics were gathered on.
        difference: change of the outputs on the first image; see :func:`largest_difference`.
        powers_of_two: whether the factors are rounded to powers of two, since exact factors changed the outputs.
        divided: the tensors of the original model that have other values in the smoothed one.
    """

    model: InferenceModel
    layers: list[SmoothedLayer]
    images: int
    difference: float = 0.0
    powers_of_two: bool = False
    divided: Mapping[str, DividedTensor] = field(default_factory=dict)

    @property
    def smoothed(self) -> list[SmoothedLayer]:
        """The layers that were changed."""
        return [layer for layer in self.layers if layer.smoothed]


def gather_rows(
    model: InferenceModel,
    groups: Sequence[SmoothGroup],
    feeds: Iterator[Mapping[str, np.ndarray]],
    *,
    rows: int = 1024,
    seed: int = 0,
    device: str = "CPU",
    where: str = "",
) -> dict[str, Sample]:
    """Run images through a float model and sample rows of the groups' activations.

    Args:
        model: the float model that the groups were found in.
        groups: groups of :func:`find_groups`.
        feeds: the model's inputs by name, in batches.
        rows: the number of rows to sample of each activation.
        seed: seed of the random choice.
        device: ``CPU`` or ``GPU``.
        where: path of the model in error messages; empty: the folder of ``model``.

    Returns:
        Activation -> its statistics and sampled rows.

    Raises:
        UserError: there is no image, an activation is NaN or infinite, or memory does not suffice.
    """
    # With one seed, the same rows would be sampled of all activations of one shape.
    observers = {
        group.activation: (ChannelAbsMax(group.axis), RowSample(rows, seed + index, group.axis))
        for index, group in enumerate(groups)
    }
    ops = {
        group.activation: f"read by {'matmul_v2' if group.axis == -1 else 'conv2d'} ({group.ops[0]})"
        for group in groups
    }
    images = collect(model, observers, feeds, device, ops, where)
    if images == 0:
        raise UserError(
            f"{where or model.directory}: no calibration image was given to SmoothQuant, expected one at least; name a "
            "TrainDataset with images"
        )
    return {
        name: Sample(largest.by_image, sampled.values, sampled.image) for name, (largest, sampled) in observers.items()
    }


def smooth(
    graph: StaticGraph,
    groups: Sequence[SmoothGroup],
    samples: Mapping[str, Sample],
    settings: SmoothQuant,
    *,
    algo: CalibrationAlgorithm = "mse",
    hist_percent: float = 0.9999,
    powers_of_two: bool = False,
) -> tuple[list[SmoothedLayer], dict[str, np.ndarray]]:
    """Search the alpha of each group, and smooth the groups whose error falls by at least ``min_improvement``.

    The last group of the graph comes first: its factors scale the output channels of the ops before it, whose errors
    then count as they matter to it.

    Args:
        graph: the float graph that the groups were found in; it is changed.
        groups: groups of :func:`find_groups`.
        samples: the output of :func:`gather_rows`.
        settings: the alphas to try, and ``min_improvement``.
        algo, hist_percent: the algorithm for the activations' thresholds in the later calibration.
        powers_of_two: round the factors to powers of two; the graph's results are then identical bit by bit.

    Returns:
        One entry for each group; and activation -> factors, of the groups that were smoothed.
    """
    layers, factors = [], dict[str, np.ndarray]()
    for group in reversed(groups):
        weights = [input_weights(graph.parameter(reader.weight), reader, group.channels) for reader in group.readers]
        choice = search(samples[group.activation], weights, settings.alphas, algo, hist_percent, powers_of_two)
        reason = _reason_against(choice, settings.min_improvement)
        if choice is not None and not reason:
            apply_factors(graph, group, choice.factors)
            factors[group.activation] = choice.factors
        before, after = (choice.error_before, choice.error_after) if choice else (0.0, 0.0)
        layers.append(
            SmoothedLayer(
                group.activation,
                group.source,
                group.ops,
                choice.alpha if choice else None,
                sqnr_db(before) if before > 0 else None,
                sqnr_db(after) if after > 0 else None,
                not reason,
                group.folds and not reason,
                reason,
            )
        )
    return layers[::-1], factors


def _reason_against(choice: Choice | None, min_improvement: float) -> str:
    if choice is None:
        return "zero on all calibration images"
    gained = choice.improvement
    if gained <= 0 or np.all(choice.factors == 1):
        return "the error does not fall"
    if gained < min_improvement:
        return f"the error falls by {gained:.1%}, less than min_improvement ({min_improvement:.1%})"
    return ""


def smooth_model(
    model: InferenceModel,
    feeds: Callable[[], Iterator[Mapping[str, np.ndarray]]],
    directory: Path,
    settings: SmoothQuant,
    *,
    algo: CalibrationAlgorithm = "mse",
    hist_percent: float = 0.9999,
    device: str = "CPU",
    exclude: Collection[str] = (),
    free_only: bool = False,
    where: str = "",
) -> Smoothed:
    """Write a float model with equal outputs and a smaller loss in INT8; call it within :func:`static_mode`.

    If the factors change the outputs on the first image by more than 1e-4, they are rounded to powers of two, which do
    not change the results. If the outputs still change, nothing is smoothed.

    Args:
        model: the float model with folded constants and BatchNorm.
        feeds: yields the calibration images as the model's inputs by name, in batches.
        directory: a folder for the smoothed model, made if it does not exist.
        settings: see :class:`act_pipeline.config.SmoothQuant`.
        algo, hist_percent: the algorithm for the activations' thresholds in the later calibration.
        device: ``CPU`` or ``GPU``, where the float model runs.
        exclude: outputs of matmuls that stay float.
        free_only: leave out what costs time at inference: factors that cannot be folded.
        where: path of the model in error messages; empty: the folder of ``model``.

    Returns:
        The smoothed model, or ``model`` itself if nothing was smoothed.

    Raises:
        UserError: see :func:`gather_rows`.
    """
    with contextlib.ExitStack() as stack:

        def opened() -> StaticGraph:
            graph = stack.enter_context(contextlib.closing(StaticGraph.load(model)))
            graph.unwrap_outputs()
            return graph

        graph = opened()
        pairs = find_pairs(graph, exclude)
        paired = [op for pair in pairs for op in pair.ops]
        groups = [*pairs, *find_groups(graph, settings.smooth_all_linears, [*exclude, *paired])]
        if free_only:
            groups = [group for group in groups if group.folds]
        if not groups:
            return Smoothed(model, [], 0)
        samples = gather_rows(
            model,
            groups,
            _first_images(feeds(), settings.calib_images),
            rows=settings.sample_rows,
            seed=settings.seed,
            device=device,
            where=where,
        )
        images = max(len(sample.by_image) for sample in samples.values())
        first = next(_first_images(feeds(), 1))
        expected = _outputs(graph, first)
        for powers_of_two in (False, True):
            layers, factors = smooth(
                graph, groups, samples, settings, algo=algo, hist_percent=hist_percent, powers_of_two=powers_of_two
            )
            if not any(layer.smoothed for layer in layers):
                return Smoothed(model, layers, images)
            difference = largest_difference(expected, _outputs(graph, first))
            if difference <= _TOLERANCE:
                directory.mkdir(parents=True, exist_ok=True)
                with quiet_upstream():
                    saved = graph.save(directory)
                divided = divided_tensors(opened(), groups, factors)
                return Smoothed(saved, layers, images, difference, powers_of_two, divided)
            _logger.info(
                "%s: SmoothQuant's factors%s change the float model's outputs by %.1e, more than %.0e",
                where or model.directory,
                ", powers of two," * powers_of_two,
                difference,
                _TOLERANCE,
            )
            graph = opened()
        return Smoothed(model, _undone(layers, difference), images, difference)


def _undone(layers: Sequence[SmoothedLayer], difference: float) -> list[SmoothedLayer]:
    """Return the layers of a model that is not smoothed, since its outputs would change by ``difference``."""
    reason = f"outputs would change by {difference:.1e}"
    return [
        replace(layer, smoothed=False, folded=False, reason=reason) if layer.smoothed else layer for layer in layers
    ]


def largest_difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the largest difference of two models' outputs on one image.

    Detections are compared as sets, since rounding decides the order of two detections with equal scores. Each
    detection is compared with the nearest one of its class in the other output, in both directions. The distance is the
    absolute difference of scores, and the difference of box coordinates relative to the largest coordinate. All other
    outputs are compared element by element, relative to the largest absolute value.

    Args:
        expected, found: outputs on one image: ``bbox [K, 6]`` (class, score, x1, y1, x2, y2) and ``bbox_num [1]``, or
            arrays of other shapes.

    Returns:
        At least 0; infinite if shapes or classes differ, or a value is NaN or infinite.
    """
    largest = 0.0
    for one, other in zip(expected, found):
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return float("inf")
        if not one.size:
            continue
        extent = max(float(np.abs(one).max()), float(np.finfo(np.float32).tiny))
        if one.ndim == 2 and one.shape[1] == 6:
            scale = np.array([0, 1, *[max(float(np.abs(one[:, 2:]).max()), 1.0)] * 4])
            with np.errstate(divide="ignore", invalid="ignore"):
                apart = np.nan_to_num(np.abs(one[:, None] - other[None]) / scale, nan=0.0, posinf=np.inf).max(axis=2)
            largest = max(largest, float(apart.min(axis=0).max()), float(apart.min(axis=1).max()))
        else:
            largest = max(largest, float(np.abs(one - other).max()) / extent)
    return largest


def _outputs(graph: StaticGraph, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [value.astype(np.float64) for value in guarded_outputs(graph, feed).values()]


def _first_images(feeds: Iterator[Mapping[str, np.ndarray]], images: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the first ``images`` images, in the batches of ``feeds``."""
    try:
        for feed in feeds:
            count = len(next(iter(feed.values())))
            yield {name: value[:images] for name, value in feed.items()}
            images -= count
            if images <= 0:
                return
    finally:
        if hasattr(feeds, "close"):  # ends the generator's threads and progress bar now, not at garbage collection
            feeds.close()
