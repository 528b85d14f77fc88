"""What a version detected when it was made: what the requests are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number
from act_pipeline.evaluation.agreement import detection_change
from act_pipeline.evaluation.detection_rows import outputs_of_rows
from act_pipeline.evaluation.detections_file import CALIBRATION_FILENAME, DETECTIONS_FILENAME, load_detections
from act_pipeline.evaluation.matching import MIN_SCORE
from act_pipeline.serving.detections import Seen
from act_pipeline.serving.histograms import BIN_NAMES, LEAST_SCORE, score_histogram, size_shares

_MOST = 1 << 53


@dataclass(frozen=True)
class Baseline:
    """Detections of a number of images in figures.

    Attributes:
        images: number of images.
        empty: number of images without a detection of at least 0.1.
        detections: objects (scores above 0.3) an image, mean.
        scores: number of detections in each bin of :data:`act_pipeline.serving.histograms.BIN_NAMES`.
        classes: class index -> the same of one class; empty: the class indices are not known.
        sizes: share of small, medium and large boxes among the objects.
        disagreement: change of the detections compared with the float model's, in [0, 1]; None: not known.
        spread: standard deviation of the objects an image; None: not recorded.
        source: what the images are: ``calibration``, ``evaluation``, or ``requests``.
    """

    images: int
    empty: int
    detections: float
    scores: Sequence[int]
    classes: Mapping[int, Sequence[int]] = field(default_factory=dict)
    sizes: Mapping[str, float] = field(default_factory=dict)
    disagreement: Optional[float] = None
    spread: Optional[float] = None
    source: str = "requests"

    @classmethod
    def of(
        cls, seen: Seen, images: int, empty: int, by_class: bool = True, objects: Optional[np.ndarray] = None
    ) -> Baseline:
        """Return the figures of the detections of a number of images.

        Args:
            seen: the detections of all images.
            images: number of images.
            empty: number of images without a detection.
            by_class: whether there are figures by class.
            objects: number of objects of each image that has one, int [I]; None: not known.
        """
        found = np.unique(seen.classes).tolist() if by_class else []
        mean = float(seen.sure.sum() / max(images, 1))
        squares = None if objects is None else float((np.asarray(objects, np.float64) ** 2).sum() / max(images, 1))
        return cls(
            images=images,
            empty=empty,
            detections=mean,
            scores=score_histogram(seen.scores).tolist(),
            classes={index: score_histogram(seen.scores[seen.classes == index]).tolist() for index in found},
            sizes=size_shares(seen.sides[seen.sure]),
            spread=None if squares is None else max(squares - mean**2, 0.0) ** 0.5,
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Baseline:
        """Read the figures.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: they are damaged.
        """
        scores = [_count(count) for count in found["scores"]]
        classes = {int(index): [_count(count) for count in row] for index, row in found["classes"].items()}
        if any(len(row) != len(BIN_NAMES) for row in (scores, *classes.values())):
            raise ValueError(f"a histogram has not {len(BIN_NAMES)} bins")
        sizes = {str(name): _finite(share) for name, share in found["sizes"].items()}
        images, empty = _count(found["images"]), _count(found["empty"])
        # Records of earlier versions of this package lack the spread.
        change, spread = (
            None if found.get(name) is None else _finite(found[name]) for name in ("disagreement", "spread")
        )
        # Those of earlier versions are of evaluation images.
        source = str(found.get("source", "evaluation"))
        return cls(images, empty, _finite(found["detections"]), scores, classes, sizes, change, spread, source)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {**asdict(self), "classes": {str(index): list(row) for index, row in self.classes.items()}}

    @property
    def variance(self) -> float:
        """Variance of the objects an image; where none is recorded, that of objects which come independently."""
        return self.detections if self.spread is None else self.spread**2

    @property
    def histogram(self) -> np.ndarray:
        """Counts of the score bins, and of the images without a detection: int64 [10].

        With the last entry the histogram of a stream without any detection is far from every other.
        """
        return np.array([*self.scores, self.empty], np.int64)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _finite(value: Any) -> float:
    number = as_number(value)
    if number is None:
        raise ValueError(f"{value!r:.40} is no finite number")
    return number


def recorded_baseline(model: InferenceModel, category_ids: Optional[Sequence[int]] = None) -> Optional[Baseline]:
    """Return the figures of the detections that ``compress`` kept next to a model; None: it kept none.

    They are those of the calibration images; without these, of the evaluation images.

    Args:
        model: the INT8 model.
        category_ids: the COCO category id of every class index, for the evaluation images; None: not known, then there
            are none by class.

    Raises:
        UserError: the file is damaged.
    """
    calibrated = _of_calibration(model)
    path = model.directory / DETECTIONS_FILENAME
    if not path.is_file():
        return calibrated
    kept = load_detections(path)
    rows = kept.rows.get("int8")
    if rows is None or not kept.image_ids:
        return calibrated
    made = calibrated or _of_evaluation(path, rows, len(kept.image_ids), category_ids)
    if "fp32" not in kept.rows or kept.masks:
        return made
    return replace(made, disagreement=detection_change(kept.rows["fp32"], rows))


def _of_calibration(model: InferenceModel) -> Optional[Baseline]:
    path = model.directory / CALIBRATION_FILENAME
    if not path.is_file():
        return None
    kept = load_detections(path)
    rows = kept.rows.get("int8")
    if rows is None or not kept.image_ids:
        return None
    return replace(_of_rows(outputs_of_rows(rows), rows, len(kept.image_ids), True), source="calibration")


def _of_evaluation(path: Path, rows: np.ndarray, images: int, category_ids: Optional[Sequence[int]]) -> Baseline:
    table = outputs_of_rows(rows)
    if category_ids is not None:
        index_of = {number: index for index, number in enumerate(category_ids)}
        unknown = sorted(set(rows[:, 6].astype(int).tolist()) - set(index_of))
        if unknown:
            raise UserError(
                f"{path} has detections of category id {unknown[0]}, which the reader's annotations lack; give the "
                "--reader_config that the model was compressed with"
            )
        table[:, 0] = [index_of[int(number)] for number in rows[:, 6]]
    return replace(_of_rows(table, rows, images, category_ids is not None), source="evaluation")


def _of_rows(table: np.ndarray, rows: np.ndarray, images: int, by_class: bool) -> Baseline:
    """Return the figures of detections: as the model outputs them, and with their images."""
    busy = np.unique(rows[rows[:, 5] >= LEAST_SCORE, 0])
    _, objects = np.unique(rows[rows[:, 5] > MIN_SCORE, 0], return_counts=True)
    return Baseline.of(Seen.of(table), images, images - len(busy), by_class, objects)
