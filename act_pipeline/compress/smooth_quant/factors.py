"""SmoothQuant's factors, and the search for alpha, the share of an activation's outliers that moves into the weights.

``X W = (X / s) (s W)`` for any ``s`` with one factor for each channel of the activation. An activation has one INT8
scale, so a channel that is a hundred times as large as the others leaves them almost no INT8 steps. Dividing it by its
factor makes the channels similar, and multiplies its row of the weight, which has a scale for each *output* channel.
Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023; in
PaddleSlim, ``paddleslim.quant.advanced.Smooth`` and ``PieceWiseSearch``.

Multiplying a float by a power of two does not round. Factors that are rounded to powers of two therefore leave the
float model's results identical bit by bit. Without large outliers they lose about 2 dB of the gain, so they are used
only for models whose outputs the exact factors change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.config.sections import CalibrationAlgorithm
from act_pipeline.graph.int8_rounding import LEVELS, to_int8

# Smallest value relative to the largest; smaller ones are clipped, so that no channel close to zero is scaled up.
_FLOOR = 1e-5
# Larger factors would cost float16 engines more accuracy than smoothing gains.
_LARGEST = 2.0**16


@dataclass(frozen=True)
class Sample:
    """Statistics of an activation on calibration images.

    Attributes:
        by_image: float32 [images, channels], the largest absolute value of every channel on every image.
        rows: float32 [rows, channels], a random sample of rows.
        image: int64 [rows], the index of each row's image.
    """

    by_image: np.ndarray
    rows: np.ndarray
    image: np.ndarray

    @property
    def abs_max(self) -> np.ndarray:
        """Largest absolute value of every channel, float32 [channels]."""
        return self.by_image.max(axis=0)

    def halves(self) -> tuple[Sample, Sample]:
        """Return two parts of the sample, from different images if possible: to choose alpha and to measure errors."""
        odd = self.image % 2 == 1
        if odd.all() or not odd.any():  # one image, or rows of one
            odd = np.arange(len(self.rows)) % 2 == 1
            parts = [Sample(self.by_image, self.rows[part], self.image[part]) for part in (~odd, odd)]
        else:
            parts = [
                Sample(self.by_image[start::2], self.rows[part], self.image[part])
                for start, part in ((0, ~odd), (1, odd))
            ]
        return parts[0], parts[1] if len(parts[1].rows) else parts[0]


@dataclass(frozen=True)
class Choice:
    """The best alpha of a layer.

    Attributes:
        alpha: the best alpha, in [0, 1].
        factors: float32 [channels]; the activation is divided by them.
        error_before: mean over the weights of ``||X W - Q(X) Q(W)||^2 / ||X W||^2``, and over two halves of the sample
            that are rounded with the threshold of the other half.
        error_after: the same with ``Q(X / s) Q(s W)``, and factors of the other half with this alpha.
        improvement: relative reduction of the error of the half that gains less; negative if its error grows.
    """

    alpha: float
    factors: np.ndarray
    error_before: float
    error_after: float
    improvement: float


def smoothing_factors(act_max: np.ndarray, weight_max: np.ndarray, alpha: float) -> np.ndarray:
    """Return SmoothQuant's factors, ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (equation 4 of the paper).

    The factors are normalized to a geometric mean of 1. This does not change the error, since activation and weights
    have separate scales, and it preserves their ranges. Maxima below 1e-5 of the largest one are raised to that. A
    channel that was zero on all images gets the factor 1, since its range is unknown.

    Args:
        act_max: largest absolute value of each channel of the activation, [channels].
        weight_max: largest absolute value of each input channel of all weights, [channels].
        alpha: in [0, 1]. 0 equalizes the input channels of the weights, 1 the channels of the activation.

    Returns:
        float64 [channels], in [2**-16, 2**16].
    """
    act_max, weight_max = np.asarray(act_max, np.float64), np.asarray(weight_max, np.float64)
    factors = np.ones(len(act_max))
    seen = act_max > 0
    if not seen.any() or not (weight_max > 0).any():
        return factors
    act = np.log(np.maximum(act_max, act_max.max() * _FLOOR)[seen])
    weight = np.log(np.maximum(weight_max, weight_max.max() * _FLOOR)[seen])
    powers = alpha * act - (1 - alpha) * weight
    factors[seen] = np.exp(powers - powers.mean())
    return np.clip(factors, 1 / _LARGEST, _LARGEST)


def powers_of_two(factors: np.ndarray) -> np.ndarray:
    """Return the powers of two nearest to the factors (on a logarithmic scale), float64 [channels]."""
    return np.exp2(np.rint(np.log2(factors)))


def search(
    sample: Sample,
    weights: Sequence[np.ndarray],
    alphas: Sequence[float],
    algo: CalibrationAlgorithm,
    hist_percent: float = 0.9999,
    rounded: bool = False,
) -> Choice | None:
    """Search the alpha with the least error on two halves of a sample.

    Each half is rounded with the factors and the threshold of the other one, as images after the calibration are: with
    few images, a channel that is hardly used on them would else seem to gain from factors that clip it later.

    Args:
        sample: statistics of the activation.
        weights: the weights of all ops that read it, float32 [groups, channels / groups, out / groups, positions] each
            (:func:`act_pipeline.compress.smooth_quant.groups.input_weights`).
        alphas: the alphas to try.
        algo: the algorithm for the activation's threshold; see
            :func:`act_pipeline.calibration.thresholds.threshold`.
        hist_percent: the quantile of ``hist``, in (0, 1].
        rounded: whether to round the factors to powers of two.

    Returns:
        The best alpha; None if the activation or all weights are zero.
    """
    weights = [weight for weight in weights if weight.any()]
    if not weights or not sample.abs_max.any() or not sample.rows.any():
        return None
    # The input channels of a depthwise convolution have scales of their own, so that the factors cost them nothing.
    dense = [np.abs(weight).max(axis=(2, 3)).reshape(-1) for weight in weights if len(weight) == 1]
    weight_max = np.max(dense, axis=0) if dense else np.ones(sample.by_image.shape[1])
    first, second = sample.halves()
    turns = ((first, second), (second, first)) if second is not first else ((first, first),)
    exact = [[_products(unseen.rows, weight) for weight in weights] for _, unseen in turns]

    def factors_of(part: Sample, alpha: float) -> np.ndarray:
        factors = smoothing_factors(part.abs_max, weight_max, alpha)
        return (powers_of_two(factors) if rounded else factors).astype(np.float32)

    def errors_of(alpha: float | None) -> list[float]:
        plain = np.ones_like(weight_max, np.float32)
        return [
            layer_error(
                seen, unseen, weights, plain if alpha is None else factors_of(seen, alpha), algo, hist_percent, products
            )
            for (seen, unseen), products in zip(turns, exact)
        ]

    # The error changes slowly with alpha: every second one, then the neighbours of the best.
    errors = {place: errors_of(alphas[place]) for place in range(0, len(alphas), 2)}
    best = min(errors, key=lambda place: sum(errors[place]))
    errors.update((place, errors_of(alphas[place])) for place in (best - 1, best + 1) if 0 <= place < len(alphas))
    best = min(errors, key=lambda place: sum(errors[place]))
    before, after = errors_of(None), errors[best]
    gained = min(1 - less / more if more > 0 else 0.0 for more, less in zip(before, after))
    mean_before, mean_after = float(np.mean(before)), float(np.mean(after))
    return Choice(alphas[best], factors_of(sample, alphas[best]), mean_before, mean_after, gained)


def layer_error(
    chosen_by: Sample,
    measured_on: Sample,
    weights: Sequence[np.ndarray],
    factors: np.ndarray,
    algo: CalibrationAlgorithm,
    hist_percent: float = 0.9999,
    products: Sequence[np.ndarray] | None = None,
) -> float:
    """Return the mean over the weights of ``||X W - Q(X / s) Q(s W)||^2 / ||X W||^2``.

    Q rounds to INT8: the activation with one scale, the weights with one scale for each output channel. Each position
    of a convolution's kernel counts as a product of its own; that the errors of neighbours are correlated is neglected.
    A depthwise convolution counts as the mean of its channels, since nothing here says how much each of them matters.

    Args:
        chosen_by: the sample that the activation's threshold is computed from.
        measured_on: the sample whose rows are X.
        weights: W, float32 [groups, channels / groups, out / groups, positions] each, none of them all zero.
        factors: s, float32 [channels].
        algo, hist_percent: the algorithm for the threshold.
        products: X W of each weight, where it is known.
    """
    limit = smoothed_threshold(chosen_by, factors, algo, hist_percent)
    rows = measured_on.rows / factors
    rounded = rows if limit == 0 else _rounded(rows, np.float32(limit))
    errors = []
    for number, weight in enumerate(weights):
        scaled = weight * factors.reshape(*weight.shape[:2], 1, 1)
        exact = products[number] if products else _products(measured_on.rows, weight)
        difference = (_products(rounded, _rounded(scaled, _weight_limits(scaled))) - exact).astype(np.float64)
        power, error = (np.square(values, dtype=np.float64).sum(axis=(1, 2)) for values in (exact, difference))
        errors.append(float(np.mean(error[power > 0] / power[power > 0])) if power.any() else 0.0)
    return float(np.mean(errors))


def _products(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return rows times weight, [groups, rows, out / groups * positions]; see :func:`layer_error`."""
    groups, channels = weight.shape[:2]
    split = rows.reshape(len(rows), groups, channels).transpose(1, 0, 2)
    return np.asarray(split @ weight.reshape(groups, channels, -1))


def _weight_limits(weight: np.ndarray) -> np.ndarray:
    """Return the thresholds of the output channels, [groups, 1, out / groups, 1]; 1 for a channel of zeros."""
    largest = np.abs(weight).max(axis=(1, 3), keepdims=True)
    return np.where(largest > 0, largest, np.float32(1))


def smoothed_threshold(
    sample: Sample, factors: np.ndarray, algo: CalibrationAlgorithm, hist_percent: float = 0.9999
) -> float:
    """Return the threshold of ``X / s``: exact for ``abs_max`` and ``avg``, else estimated from the sampled rows.

    Args:
        sample: statistics of X.
        factors: s, float32 [channels].
        algo, hist_percent: see :func:`act_pipeline.calibration.thresholds.threshold`.
    """
    largest = (sample.by_image / factors).max(axis=1)
    if algo == "abs_max":
        return float(largest.max())
    if algo == "avg":
        return float(largest.mean(dtype=np.float64))
    histogram = AbsHistogram()
    histogram.update(sample.rows / factors, 1)
    return threshold(histogram, algo, hist_percent)


def _rounded(values: np.ndarray, limit: np.ndarray | np.float32) -> np.ndarray:
    """Return the values rounded to INT8 with these thresholds (broadcast), as by Paddle's ``quantize_linear``."""
    step = limit / np.float32(LEVELS)
    return to_int8(values, step) * step
