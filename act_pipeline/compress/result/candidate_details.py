"""How a candidate was made, as stored in ``act.json``: its calibration, what was compared, and its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Optional, TypeVar

from act_pipeline.config.sections import CalibrationAlgorithm

_Compared = TypeVar("_Compared", bound="_HeldOutComparison")


@dataclass(frozen=True)
class CalibrationDetails:
    """A calibration.

    Attributes:
        algo: the algorithm that the scales are from.
        hist_percent: ``QuantPost.hist_percent``; None for other algorithms than ``hist``.
        images, images_asked: number of calibration images, and the number in the config.
        seed: of the order of the images.
        bias_correction: ``QuantPost.bias_correction``.
        corrected_biases: number of biases that were corrected.
        zero_tensors: activations that are zero on all images.
        compared: algorithm -> change of the detections, where the best algorithm was chosen, of the finalists; else
            empty.
        compared_images: number of images of that comparison; None: none.
    """

    algo: str
    hist_percent: Optional[float]
    images: int
    images_asked: int
    seed: int
    bias_correction: bool
    corrected_biases: int
    zero_tensors: Sequence[str]
    compared: Mapping[CalibrationAlgorithm, float] = field(default_factory=dict)
    compared_images: Optional[int] = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry ``calibration``, without the comparison if there was none."""
        record = asdict(self)
        if not self.compared:
            del record["compared"], record["compared_images"]
        return record


@dataclass(frozen=True)
class SmoothQuantDetails:
    """A SmoothQuant transformation.

    Attributes:
        layers: one entry for each candidate layer, see :mod:`act_pipeline.compress.smooth_quant`.
        smoothed: number of smoothed layers.
        images: number of images.
        difference: difference of the smoothed float model's outputs from the original's.
        seconds: duration.
    """

    layers: Sequence[Mapping[str, Any]]
    smoothed: int
    images: int
    difference: float
    seconds: float


@dataclass(frozen=True)
class _HeldOutComparison:
    """A calibrated model with a change and without it, compared on the held-out images.

    Attributes:
        change: the least change of the detections with it, see :func:`act_pipeline.evaluation.detection_change`.
        without: the least change of the detections without it.
        allowed: the largest change of the detections with which it is made.
        images: number of held-out images.
    """

    change: float
    without: float
    allowed: float
    images: int

    VERDICT: ClassVar[str]

    @property
    def made(self) -> bool:
        """Whether the detections change by no more than is allowed."""
        return self.change <= self.allowed

    @classmethod
    def from_json(cls: type[_Compared], found: Mapping[str, Any]) -> _Compared:
        """Read what :meth:`as_json` returns."""
        return cls(**{name: value for name, value in found.items() if name != cls.VERDICT})

    def as_json(self) -> dict[str, Any]:
        """Return the entry of ``act.json``."""
        return {**asdict(self), self.VERDICT: self.made}


@dataclass(frozen=True)
class EqualizationDetails(_HeldOutComparison):
    """Factors between ops that cost no time at inference, the entry ``equalization``.

    Attributes:
        groups: number of activations with factors.
    """

    groups: int

    VERDICT = "kept"

    @property
    def kept(self) -> bool:
        """Whether the model with factors is clearly better, and therefore comes first."""
        return self.made

    @property
    def line(self) -> str:
        """The decision for users, in one line."""
        activations = f"{self.groups} activation{'s' * (self.groups > 1)}"
        verdict = "kept" if self.kept else "not clearly better, left out"
        return (
            f"equalization: with the channels of {activations} equalized, which costs no time at inference, the "
            f"detections on held-out training images change by {self.change:.4f} (without: {self.without:.4f}, at most "
            f"{self.allowed:.4f} to be kept): {verdict}"
        )


def equalization_line(found: Mapping[str, Any]) -> str:
    """Return what an entry ``equalization`` of ``act.json`` says."""
    return EqualizationDetails.from_json(found).line


@dataclass(frozen=True)
class ResidualDetails(_HeldOutComparison):
    """Residual connections of rounded maps, the entry ``residuals``; see `compress.accuracy_control.residuals`.

    Attributes:
        ops: number of ops that read a rounded map.
    """

    ops: int

    VERDICT = "rounded"

    @property
    def rounded(self) -> bool:
        """Whether the residual connections read rounded maps."""
        return self.made

    @property
    def line(self) -> str:
        """The decision for users, in one line."""
        return (
            f"residual connections ({self.ops} op{'s' * (self.ops > 1)}): with rounded maps the detections on held-out "
            f"training images change by {self.change:.4f} (without: {self.without:.4f}, allowed: {self.allowed:.4f}): "
            f"{'rounded' if self.rounded else 'stay float'}"
        )


def residuals_line(found: Mapping[str, Any]) -> str:
    """Return what an entry ``residuals`` of ``act.json`` says."""
    return ResidualDetails.from_json(found).line


@dataclass(frozen=True)
class TrainingPoint:
    """Agreement of the trained model's detections with the float model's after an iteration, in [0, 1]."""

    iteration: int
    agreement: float


@dataclass(frozen=True)
class TrainingDetails:
    """A training.

    Attributes:
        iterations: number of iterations.
        evaluations: the evaluations during the training.
        loss: loss by iteration.
        stopped: why it ended early; None or empty: it did not.
        scales_from: what the scales started from.
        held_out_images: number of images of the evaluations.
    """

    iterations: int
    evaluations: Sequence[TrainingPoint]
    loss: Sequence[float]
    stopped: Optional[str]
    scales_from: Optional[str]
    held_out_images: int


@dataclass(frozen=True)
class TriedGroup:
    """Ops that stay float by default for one reason, tried in INT8 with the groups that were taken before.

    Attributes:
        name: of the group, a value of :data:`act_pipeline.graph.float_by_default.MAY_BE_INT8`.
        ops: names of its ops.
        change: the change of the detections on the held-out images with it, see
            :func:`act_pipeline.evaluation.detection_change`.
        allowed: the largest change with which it is taken.
    """

    name: str
    ops: Sequence[str]
    change: float
    allowed: float

    @property
    def taken(self) -> bool:
        """Whether the ops are in INT8 from then on."""
        return self.change <= self.allowed

    def line(self, without: float) -> str:
        """Return the decision for users, in one line.

        Args:
            without: the change of the detections with all groups in float.
        """
        ops = f"{len(self.ops)} op{'s' * (len(self.ops) > 1)}"
        return (
            f"float by default: {self.name} ({ops}): in INT8 the detections on held-out training images change by "
            f"{self.change:.4f} (without: {without:.4f}, allowed: {self.allowed:.4f}): "
            f"{'INT8' if self.taken else 'stays float'}"
        )


@dataclass(frozen=True)
class TakenBackDetails:
    """Groups of ops that stay float by default, tried in INT8.

    Attributes:
        change: the change of the detections on the held-out images with all of them in float.
        allowed: the largest change with which a group is taken.
        images: number of held-out images.
        groups: the groups, in the order in which they were tried.
        within_limits: whether the model with the groups that were taken is within the limits of the strategy; if not,
            they stay float. None: no group was taken.
    """

    change: float
    allowed: float
    images: int
    groups: Sequence[TriedGroup]
    within_limits: Optional[bool] = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry ``taken_back``."""
        groups = [
            {"name": group.name, "ops": list(group.ops), "change": group.change, "taken": group.taken}
            for group in self.groups
        ]
        return {**asdict(self), "groups": groups}


def taken_back_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what an entry ``taken_back`` of ``act.json`` says, one line a group."""
    lines = [
        TriedGroup(group["name"], group["ops"], group["change"], found["allowed"]).line(found["change"])
        for group in found["groups"]
    ]
    if found["within_limits"] is False:
        lines.append("float by default: the model with them in INT8 is not within the limits: all stay float")
    return lines


@dataclass(frozen=True)
class CandidateDetails:
    """How a candidate was made; what does not apply is None."""

    calibration: Optional[CalibrationDetails] = None
    smooth_quant: Optional[SmoothQuantDetails] = None
    training: Optional[TrainingDetails] = None
    taken_back: Optional[TakenBackDetails] = None
    equalization: Optional[EqualizationDetails] = None
    residuals: Optional[ResidualDetails] = None

    def as_json(self) -> dict[str, Any]:
        """Return the entries of ``act.json`` that apply."""
        record = {
            "calibration": self.calibration and self.calibration.as_json(),
            "equalization": self.equalization and self.equalization.as_json(),
            "residuals": self.residuals and self.residuals.as_json(),
            "taken_back": self.taken_back and self.taken_back.as_json(),
            "smooth_quant": self.smooth_quant and asdict(self.smooth_quant),
            "training": self.training and asdict(self.training),
        }
        return {name: entry for name, entry in record.items() if entry is not None}
