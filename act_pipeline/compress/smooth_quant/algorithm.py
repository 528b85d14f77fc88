"""SmoothQuant on a static graph: activation outliers go into the weights of the matmuls after a LayerNorm.

Which matmuls share factors, and where these go, is in :mod:`act_pipeline.compress.smooth_quant.groups`; how large they
are, and where they pay, in :mod:`act_pipeline.compress.smooth_quant.factors`. Here a model is looked at, smoothed,
checked and written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from act_pipeline.calibration import collect
from act_pipeline.calibration.row_sample import ChannelAbsMax, RowSample
from act_pipeline.calibration.thresholds import Algorithm
from act_pipeline.compress.smooth_quant.factors import Choice, Sample, search
from act_pipeline.compress.smooth_quant.groups import SmoothGroup, apply_factors, find_groups
from act_pipeline.config import SmoothQuant
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.execution.finite_checks import guarded_outputs
from act_pipeline.graph.int8_rounding import sqnr_db
from act_pipeline.graph.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
# Of the largest value of an output: what the smoothed float model may differ by.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SmoothedLayer:
    """What was found for a group, and done.

    Attributes:
        activation, layer_norm, matmuls: as in :class:`SmoothGroup`.
        alpha: the best one; None where there was nothing to choose.
        sqnr_before_db: signal to quantization noise of the matmuls' outputs as they are, in decibels, on images by
            which neither alpha nor the threshold was chosen; None where there is no signal or no noise.
        sqnr_after_db: the same with the best alpha, used or not.
        smoothed: whether it is used.
        folded: the factors are in the LayerNorm, else in a multiplication of their own.
        reason: why it is not used; empty if it is.
    """

    activation: str
    layer_norm: str | None
    matmuls: tuple[str, ...]
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
        model: as saved; the given one, if nothing was smoothed.
        layers: of every group, in the order of the graph.
        images: how many were looked at.
        difference: of the detections on the first image; see :func:`largest_difference`.
        powers_of_two: the factors are rounded to these, since exact ones would have changed the outputs.
    """

    model: InferenceModel
    layers: list[SmoothedLayer]
    images: int
    difference: float = 0.0
    powers_of_two: bool = False

    @property
    def smoothed(self) -> list[SmoothedLayer]:
        """The layers that were changed."""
        return [layer for layer in self.layers if layer.smoothed]


def gather_rows(
    model: InferenceModel,
    groups: Sequence[SmoothGroup],
    feeds: Iterator[Mapping[str, np.ndarray]],
    rows: int = 1024,
    seed: int = 0,
    device: str = "CPU",
    where: str = "",
) -> dict[str, Sample]:
    """Run images through a float model and sample the rows of the groups' activations.

    Args:
        model: the float model that the groups were found in.
        groups: of :func:`find_groups`.
        feeds: the model's inputs by name, in batches.
        rows: how many to keep of each activation.
        seed: of the choice.
        device: ``CPU`` or ``GPU``.
        where: the model that the user knows, for messages.

    Returns:
        activation -> what was seen.

    Raises:
        UserError: there is no image, an activation is NaN or infinite, or memory does not suffice.
    """
    # Different seeds, or the same rows of every image would be chosen everywhere.
    observers = {
        group.activation: (ChannelAbsMax(), RowSample(rows, seed + index)) for index, group in enumerate(groups)
    }
    ops = {group.activation: f"read by matmul_v2 ({group.matmuls[0]})" for group in groups}
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
    algo: Algorithm = "mse",
    hist_percent: float = 0.9999,
    powers_of_two: bool = False,
) -> list[SmoothedLayer]:
    """Search each group's alpha, and smooth the groups whose error falls enough; the graph is changed.

    Args:
        graph: that the groups were found in.
        groups: of :func:`find_groups`.
        samples: of :func:`gather_rows`.
        settings: the alphas to try, and ``min_improvement``.
        algo, hist_percent: how calibration will choose the activations' thresholds.
        powers_of_two: round the factors to these; the graph then computes the same bit by bit.

    Returns:
        one for each group.
    """
    layers = []
    for group in groups:
        weights = [
            graph.parameter(name).T if transposed else graph.parameter(name)
            for name, transposed in zip(group.weights, group.transposed)
        ]
        choice = search(samples[group.activation], weights, settings.alphas, algo, hist_percent, powers_of_two)
        reason = _reason_against(choice, settings.min_improvement)
        if choice is not None and not reason:
            apply_factors(graph, group, choice.factors)
        before, after = (choice.error_before, choice.error_after) if choice else (0.0, 0.0)
        layers.append(
            SmoothedLayer(
                group.activation,
                group.layer_norm,
                group.matmuls,
                choice.alpha if choice else None,
                sqnr_db(before) if before > 0 else None,
                sqnr_db(after) if after > 0 else None,
                not reason,
                group.folds and not reason,
                reason,
            )
        )
    return layers


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
    algo: Algorithm = "mse",
    hist_percent: float = 0.9999,
    device: str = "CPU",
    exclude: Collection[str] = (),
    where: str = "",
) -> Smoothed:
    """Write a float model that computes the same and loses less in INT8; call it within :func:`static_mode`.

    Args:
        model: the float model, its constants and BatchNorm folded.
        feeds: gives the calibration images, as the model's inputs by name, in batches.
        directory: a folder for the smoothed model, made if it does not exist.
        settings: see :class:`act_pipeline.config.SmoothQuant`.
        algo, hist_percent: how calibration will choose the activations' thresholds.
        device: ``CPU`` or ``GPU``, where the float model runs.
        exclude: outputs of matmuls that stay float.
        where: the model that the user knows, for messages.

    Returns:
        With ``model`` itself where there is nothing to smooth. Factors that would change the outputs by more than 1e-4
        are rounded to powers of two, which change nothing.

    Raises:
        UserError: see :func:`gather_rows`.
    """
    graph = StaticGraph.load(model)
    graph.unwrap_outputs()
    groups = find_groups(graph, settings.smooth_all_linears, exclude)
    if not groups:
        return Smoothed(model, [], 0)
    samples = gather_rows(
        model, groups, _first_images(feeds(), settings.calib_images), settings.sample_rows, settings.seed, device, where
    )
    images = max(len(sample.by_image) for sample in samples.values())
    first = next(_first_images(feeds(), 1))
    expected = _outputs(graph, first)
    for powers_of_two in (False, True):
        layers = smooth(graph, groups, samples, settings, algo, hist_percent, powers_of_two)
        if not any(layer.smoothed for layer in layers):
            return Smoothed(model, layers, images)
        difference = largest_difference(expected, _outputs(graph, first))
        if difference <= _TOLERANCE:
            break
        _logger.info(
            "%s: SmoothQuant's factors%s change the float model's outputs by %.1e, more than %.0e",
            where or model.directory,
            ", powers of two," * powers_of_two,
            difference,
            _TOLERANCE,
        )
        graph = StaticGraph.load(model)
        graph.unwrap_outputs()
    else:
        undone = f"outputs would change by {difference:.1e}"
        layers = [
            replace(layer, smoothed=False, folded=False, reason=undone) if layer.smoothed else layer for layer in layers
        ]
        return Smoothed(model, layers, images, difference)
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_upstream():
        return Smoothed(graph.save(directory), layers, images, difference, powers_of_two)


def largest_difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return how far a model's outputs on one image are from another's; infinite if shapes or classes differ, or for
    NaN.

    Detections are sets: RT-DETR gives two of the same score in either order, and the least rounding decides. So each
    one is held to the nearest of its class on the other side, from both sides; scores differ as they stand, boxes as a
    share of the largest coordinate. Any other output is compared as it stands, as a share of its largest absolute
    value.

    Args:
        expected, found: outputs of one image: ``bbox [K, 6]``, ``bbox_num [1]``; or others.
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
    """Yield the first images, in the batches in which they come."""
    try:
        for feed in feeds:
            count = len(next(iter(feed.values())))
            yield {name: value[:images] for name, value in feed.items()}
            images -= count
            if images <= 0:
                return
    finally:
        if hasattr(feeds, "close"):  # a generator's threads and progress bar end now, not when it is collected
            feeds.close()
