"""Input and output of a strategy: the compression job, and candidates, INT8 models with their evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.calibration.feeds import held_out_feeds
from act_pipeline.compress.candidate_details import CandidateDetails
from act_pipeline.compress.judge import Judge
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.interruption import Interruption
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.evaluation import Comparison, Evaluation, GroundTruth, compare, detection_change
from act_pipeline.evaluation.act_json import FloatOp

# The Strategy.confidence at which the measured drop decides.
MEASURED = 0.5


@dataclass
class Candidate:
    """An INT8 model that a strategy made.

    Attributes:
        name: name in ``act.json``, for example ``ptq:mse``.
        strategy: ``ptq``, ``smooth_quant``, ``mixed`` or ``qat_dis``.
        model: the INT8 model.
        source: the float model that it was quantized from; None: it was trained, and its weights have changed.
        selection: the ops that are meant to compute in INT8.
        inventory: the ops that compute in INT8 in ``model``.
        details: how it was made, for ``act.json``.
        seconds: stage -> seconds.
        evaluation: evaluation on the eval split; None: not evaluated.
        comparison: comparison of ``evaluation`` with the float model's; None until :meth:`Job.compare` is called.
        note: how the model differs from the strategy's usual output, in a few words.
        reverted: ops that accuracy control reverted to float.
        bytes: size of the model, set by :meth:`Job.add`, since the files of a rejected model may be deleted later.
    """

    name: str
    strategy: str
    model: InferenceModel
    source: Optional[InferenceModel]
    selection: Selection
    inventory: OpInventory
    details: CandidateDetails = CandidateDetails()
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: Optional[Evaluation] = None
    comparison: Optional[Comparison] = None
    note: str = ""
    reverted: Sequence[FloatOp] = ()
    bytes: int = 0

    @property
    def map(self) -> float:
        """mAP on the eval split; -1 without an evaluation."""
        return self.evaluation.map if self.evaluation else -1.0


@dataclass
class Job:
    """A running compression.

    Attributes:
        config: the compression config.
        model: the float model with folded constants and BatchNorm, its ops that stay float marked.
        selection: the ops to compute in INT8.
        reader: the data.
        judge: evaluates the float model and the candidates.
        fp32: the float model's evaluation; None: ``Global.Evaluation`` is false.
        work: a folder for files that strategies write.
        device: ``CPU`` or ``GPU``, for calibration and training.
        progress: whether to show progress bars.
        checkpoints: the training checkpoints.
        interruption: the handling of SIGINT and SIGTERM.
        tried: all candidates, in the order in which they were added.
        rankings: name of a candidate -> the :class:`act_pipeline.compress.accuracy_control.ranker.Ranker` of its ops.
        analysis: content of ``analysis.json`` from the last ranking; None: no op was ranked.
        fp32_cached: whether ``fp32`` comes from the cache of an earlier run.
        ranks: the processes that train together; this process is the leader.
    """

    config: Config
    model: InferenceModel
    selection: Selection
    reader: Reader
    judge: Judge
    fp32: Optional[Evaluation]
    work: Path
    device: str
    progress: bool
    checkpoints: Checkpoints
    interruption: Interruption
    tried: list[Candidate] = field(default_factory=list)
    rankings: dict[str, Any] = field(default_factory=dict)
    analysis: Optional[dict[str, Any]] = None
    fp32_cached: bool = False
    ranks: Ranks = ALONE
    _held_out: Optional[list[dict[str, np.ndarray]]] = None
    _exact: np.ndarray = field(default_factory=lambda: np.zeros((0, 7)))
    _exact_images: int = 0
    _truth: Optional[GroundTruth] = None

    @property
    def held_out(self) -> list[dict[str, np.ndarray]]:
        """Feeds of one training image each that candidates are compared on; see `calibration.feeds.held_out`."""
        if self._held_out is None:
            self._held_out = held_out_feeds(self.config, self.reader, self.model)
        return self._held_out

    def change(self, model: InferenceModel, images: Optional[int] = None) -> float:
        """Return the distance of an INT8 model's detections from the float model's on :attr:`held_out`.

        These are training images, so that a choice made with this measure does not use the evaluation images.

        Args:
            model: the INT8 model.
            images: how many of the held-out images to use, from the first on; None: all.

        Returns:
            The distance in [0, 1]; see :func:`act_pipeline.evaluation.detection_change`.
        """
        feeds = self.held_out[:images]
        if self._exact_images < len(feeds):
            self._exact = self.judge.detect(self.model, "fp32", self.reader, feeds)
            self._exact_images = len(feeds)
        exact = self._exact[self._exact[:, 0] < len(feeds)]
        return detection_change(exact, self.judge.detect(model, "int8", self.reader, feeds))

    @property
    def max_drop(self) -> Optional[float]:
        """The largest allowed drop of mAP; None: no limit, or nothing is evaluated."""
        return self.config.strategy.max_drop if self.fp32 else None

    def folder(self, name: str) -> Path:
        """Return a new, empty folder in :attr:`work`, whose name ends with ``name``."""
        path = self.work / f"{len(list(self.work.iterdir())):03d}_{name}"
        path.mkdir(parents=True)
        return path

    def drop(self, candidate: Candidate) -> float:
        """Return the float model's mAP minus a candidate's; 0 without an evaluation."""
        return self.fp32.map - candidate.map if self.fp32 and candidate.evaluation else 0.0

    def compare(self, candidate: Candidate) -> Optional[Comparison]:
        """Return the comparison of a candidate's detections and mAP with the float model's; None if not evaluated."""
        if self.fp32 is None or candidate.evaluation is None:
            return None
        if candidate.comparison is None:
            with timed(candidate.seconds, "compare"):
                candidate.comparison = compare(self.fp32, candidate.evaluation, self.truth)
        return candidate.comparison

    @property
    def truth(self) -> GroundTruth:
        """Ground truth of the eval split."""
        if self._truth is None:
            self._truth = GroundTruth.load(self.reader, "eval")
        return self._truth

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is within ``max_drop`` with probability ``Strategy.confidence``.

        At a confidence of 0.5 the measured drop decides. True if ``max_drop`` is None.
        """
        if self.max_drop is None:
            return True
        confidence = self.config.strategy.confidence
        compared = self.compare(candidate) if confidence != MEASURED else None
        if compared is not None and compared.difference is not None:
            return compared.difference.probability(self.max_drop) >= confidence
        # The tolerance accepts a drop of exactly max_drop in spite of floating-point rounding.
        return self.drop(candidate) <= self.max_drop + 1e-9

    def best(self) -> Candidate:
        """Return the candidate with the highest mAP, the first of equal ones."""
        return max(self.tried, key=lambda candidate: candidate.map)

    def add(self, candidate: Candidate) -> Candidate:
        """Add a candidate to :attr:`tried`, evaluating it first unless that was done or ``fp32`` is None."""
        if self.fp32 is not None and candidate.evaluation is None:
            with timed(candidate.seconds, "evaluate_int8"):
                candidate.evaluation = self.judge.evaluate(candidate.model, "int8", self.reader, self.progress)
        candidate.bytes = candidate.model.bytes
        self.tried.append(candidate)
        return candidate
