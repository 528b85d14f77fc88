"""How much of an activation's outliers goes into the weights: SmoothQuant's factors, and the search for alpha.

``X W = (X / s) (s W)`` for any ``s``, one factor a channel of the activation. One channel that is a hundred times as
large as the others takes all of INT8's steps for itself, since an activation has one scale; divided by its factor it
leaves them to the others, and its row of the weight, which has a scale for each *output* channel, grows by as much.
Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023; in
PaddleSlim, ``paddleslim.quant.advanced.Smooth`` and ``PieceWiseSearch``.

A float is multiplied by a power of two without rounding. So factors that are rounded to powers of two leave what the
float model computes as it is, bit by bit; they cost about 2 dB of what smoothing gains where there are no great
outliers, and are kept for models that the exact ones would change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from act_pipeline.calibration.observers import AbsHistogram
from act_pipeline.calibration.thresholds import LEVELS, Algorithm, threshold
from act_pipeline.graph.int8_rounding import to_int8, weight_threshold

# Of the largest: what is smaller is taken for that, so that no channel that is as good as dead is blown up.
_FLOOR = 1e-5
# Beyond, float16 engines would lose what was gained.
_LARGEST = 2.0**16


@dataclass(frozen=True)
class Sample:
    """What calibration images showed of an activation.

    Attributes:
        by_image: float32 [images, channels], the largest absolute value of every channel.
        rows: float32 [rows, channels], a random sample.
        image: int64 [rows], the image of each.
    """

    by_image: np.ndarray
    rows: np.ndarray
    image: np.ndarray

    @property
    def abs_max(self) -> np.ndarray:
        """float32 [channels]."""
        return self.by_image.max(axis=0)

    def halves(self) -> tuple[Sample, Sample]:
        """Return what to choose by and what to measure on, from different images if there are two or more."""
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
        alpha: the best; 0 to 1.
        factors: float32 [channels]; the activation is divided by them.
        error_before: mean over the weights of ``||X W - Q(X) Q(W)||^2 / ||X W||^2``, on rows and images by which
            neither alpha nor any threshold was chosen.
        error_after: the same with ``Q(X / s) Q(s W)``.
    """

    alpha: float
    factors: np.ndarray
    error_before: float
    error_after: float

    @property
    def improvement(self) -> float:
        """The share by which the error falls; negative where it grows."""
        return 1 - self.error_after / self.error_before if self.error_before > 0 else 0.0


def smoothing_factors(act_max: np.ndarray, weight_max: np.ndarray, alpha: float) -> np.ndarray:
    """Return ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, equation 4 of the paper; float64 [channels].

    Their geometric mean is made 1, which changes no error (activation and weights have scales of their own) and keeps
    both in the ranges they had. What is below 1e-5 of the largest counts as that. A channel that was zero on every
    image
    gets 1: it says nothing of how large it may become. All are within 2**-16 to 2**16.

    Args:
        act_max: [channels], of the activation.
        weight_max: [channels], of the rows of all weights that it is multiplied with.
        alpha: 0: all weights get one range; 1: all channels of the activation do.
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
    """Return the nearest powers of two."""
    return np.exp2(np.rint(np.log2(factors)))


def search(
    sample: Sample,
    weights: Sequence[np.ndarray],
    alphas: Sequence[float],
    algo: Algorithm,
    hist_percent: float = 0.9999,
    rounded: bool = False,
) -> Choice | None:
    """Return the alpha of the least error, and that error on other images.

    Args:
        sample: of the activation.
        weights: [channels, out] each, all of the matmuls that read it.
        alphas: to try.
        algo: how the activation's threshold will be chosen; see :func:`act_pipeline.calibration.thresholds.threshold`.
        hist_percent: for ``hist``.
        rounded: to powers of two.

    Returns:
        None if the activation was zero on all images, or all weights are.
    """
    weights = [weight for weight in weights if weight.any()]
    if not weights or not sample.abs_max.any() or not sample.rows.any():
        return None
    weight_max = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    chosen_by, measured_on = sample.halves()
    best: tuple[float, float, np.ndarray] | None = None
    for alpha in alphas:
        factors = smoothing_factors(sample.abs_max, weight_max, alpha)
        factors = (powers_of_two(factors) if rounded else factors).astype(np.float32)
        error = layer_error(chosen_by, chosen_by, weights, factors, algo, hist_percent)
        if best is None or error < best[0]:
            best = error, alpha, factors
    assert best is not None, "no alpha to try"
    _, alpha, factors = best
    plain = np.ones_like(factors)
    before, after = (
        layer_error(chosen_by, measured_on, weights, used, algo, hist_percent) for used in (plain, factors)
    )
    return Choice(alpha, factors, before, after)


def layer_error(
    chosen_by: Sample,
    measured_on: Sample,
    weights: Sequence[np.ndarray],
    factors: np.ndarray,
    algo: Algorithm,
    hist_percent: float = 0.9999,
) -> float:
    """Return the mean over the weights of ``||X W - Q(X / s) Q(s W)||^2 / ||X W||^2``.

    Q rounds to INT8: the activation with one scale, the weights with one for each output channel.

    Args:
        chosen_by: gives the activation's threshold.
        measured_on: its rows are X.
        weights: [channels, out] each, none of them all zero.
        factors: [channels], s.
        algo, hist_percent: how the threshold is chosen.
    """
    limit = smoothed_threshold(chosen_by, factors, algo, hist_percent)
    rows = measured_on.rows / factors
    rounded = rows if limit == 0 else _rounded(rows, np.float32(limit))
    errors = []
    for weight in weights:
        exact = measured_on.rows @ weight
        scaled = weight * factors[:, None]
        found = rounded @ _rounded(scaled, weight_threshold(scaled, 1))
        power = float((exact.astype(np.float64) ** 2).sum())
        errors.append(float(((found - exact).astype(np.float64) ** 2).sum()) / power if power > 0 else 0.0)
    return float(np.mean(errors))


def smoothed_threshold(sample: Sample, factors: np.ndarray, algo: Algorithm, hist_percent: float = 0.9999) -> float:
    """Return the threshold that calibration would give ``X / s``: exact for ``abs_max`` and ``avg``.

    ``hist``, ``mse`` and ``KL`` look at the sampled rows alone.
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
    """Return the values as INT8 of these thresholds (broadcast) holds them, as Paddle's ``quantize_linear`` rounds."""
    step = limit / np.float32(LEVELS)
    return to_int8(values, step) * step
