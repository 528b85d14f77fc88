"""SmoothQuant on a static graph: activation outliers go into the weights of the matmuls after a LayerNorm.

Which matmuls share factors, and where these go, is in :mod:`act_pipeline.compress.smooth_groups`; how large they are, and
where they pay, in :mod:`act_pipeline.compress.smoothing`. Here a model is looked at, smoothed, checked and written.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from act_pipeline.analysis import collect
from act_pipeline.analysis.row_sample import ChannelAbsMax, RowSample
from act_pipeline.compress.act import quiet_upstream
from act_pipeline.compress.calibration import Algorithm
from act_pipeline.compress.finite import guard_grids
from act_pipeline.compress.smooth_groups import SmoothGroup, apply_factors, find_groups
from act_pipeline.compress.smoothing import Choice, Sample, search, sqnr_db
from act_pipeline.config import SmoothQuant
from act_pipeline.errors import UserError
from act_pipeline.model import InferenceModel
from act_pipeline.static_graph import StaticGraph

_logger = logging.getLogger(__name__)
# Of the largest value of an output: what the smoothed float model may differ by.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class SmoothedLayer:
    """What was found for a group, and done.

    Attributes:
        activation, layer_norm, matmuls: as in :class:`SmoothGroup`.
        alpha: the best one; None where there was nothing to choose.
        sqnr_before_db: signal to quantization noise of the matmuls' outputs as they are, in decibels, on rows that
            decided nothing.
        sqnr_after_db: the same with the best alpha, used or not.
        smoothed: whether it is used.
        folded: the factors are in the LayerNorm, else in a multiplication of their own.
        reason: why it is not used; empty if it is.
    """

    activation: str
    layer_norm: str | None
    matmuls: tuple[str, ...]
    alpha: float | None
    sqnr_before_db: float
    sqnr_after_db: float
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
        difference: the largest difference of an output on the first image, as a share of its largest value.
    """

    model: InferenceModel
    layers: list[SmoothedLayer]
    images: int
    difference: float = 0.0

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
) -> list[SmoothedLayer]:
    """Search each group's alpha, and smooth the groups whose error falls enough; the graph is changed.

    Args:
        graph: that the groups were found in.
        groups: of :func:`find_groups`.
        samples: of :func:`gather_rows`.
        settings: the alphas to try, and ``min_improvement``.
        algo, hist_percent: how calibration will choose the activations' thresholds.

    Returns:
        one for each group.
    """
    layers = []
    for group in groups:
        weights = [
            graph.parameter(name).T if transposed else graph.parameter(name)
            for name, transposed in zip(group.weights, group.transposed)
        ]
        choice = search(samples[group.activation], weights, settings.alphas, algo, hist_percent)
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
                sqnr_db(before),
                sqnr_db(after),
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
        With ``model`` itself where there is nothing to smooth, or where smoothing would change its outputs by more than
        1e-4 of their largest value (which is said in a warning).

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
    layers = smooth(graph, groups, samples, settings, algo, hist_percent)
    if not any(layer.smoothed for layer in layers):
        return Smoothed(model, layers, images)
    first = next(_first_images(feeds(), 1))
    difference = largest_difference(StaticGraph.load(model), graph, first)
    if not difference <= _TOLERANCE:
        _logger.warning(
            "%s: SmoothQuant would change the float model's outputs by %.1e of their largest value, more than %.0e; the "
            "model is left as it was",
            where or model.directory,
            difference,
            _TOLERANCE,
        )
        undone = f"outputs would change by {difference:.1e}"
        layers = [
            replace(layer, smoothed=False, folded=False, reason=undone) if layer.smoothed else layer for layer in layers
        ]
        return Smoothed(model, layers, images, difference)
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_upstream():
        return Smoothed(graph.save(directory), layers, images, difference)


def largest_difference(before: StaticGraph, after: StaticGraph, feed: Mapping[str, np.ndarray]) -> float:
    """Return the largest difference of two graphs' outputs, each as a share of its largest absolute value.

    Values are compared as they stand: RT-DETR's detections come by falling score, and a model that puts two of them in
    another order has changed. Infinite where shapes differ or an output holds NaN.

    Args:
        before, after: graphs with the same outputs, in the same order; left as they are.
        feed: their inputs.
    """
    largest = 0.0
    for expected, found in zip(_outputs(before, feed), _outputs(after, feed)):
        if expected.shape != found.shape:
            return float("inf")
        if not expected.size:
            continue
        difference = float(np.abs(found - expected).max())
        if difference > 0:
            largest = max(largest, difference / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny))
        elif difference != 0:  # NaN
            return float("inf")
    return largest


def _outputs(graph: StaticGraph, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    import paddle

    program = graph.program.clone()
    guard_grids(program)
    names = [target.name for target in graph.fetch_targets]
    with paddle.static.scope_guard(graph.scope):
        feed = {name: feed[name] for name in graph.feed_names}
        values = graph.executor.run(program, feed=feed, fetch_list=names, return_numpy=False)
    return [np.array(value).astype(np.float64) for value in values]


def _first_images(feeds: Iterator[Mapping[str, np.ndarray]], images: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the first images, in the batches in which they come."""
    with contextlib.closing(feeds):
        for feed in feeds:
            count = len(next(iter(feed.values())))
            yield {name: value[:images] for name, value in feed.items()}
            images -= count
            if images <= 0:
                return
