"""INT8 models that the strategies of a compression made, and how their accuracy compares with the float model's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

from act_pipeline.compress.candidate_details import CandidateDetails
from act_pipeline.compress.judge import Judge
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.config.sections import Strategy
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.evaluation import Comparison, Evaluation, GroundTruth, compare
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
        comparison: comparison of ``evaluation`` with the float model's; None until :meth:`Candidates.compare` is
            called.
        note: how the model differs from the strategy's usual output, in a few words.
        reverted: ops that accuracy control reverted to float.
        bytes: size of the model, set by :meth:`Candidates.add`, since the files of a rejected model may be deleted
            later.
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


class Candidates:
    """The candidates of a compression, evaluated and compared with the float model on the eval split.

    Iterating yields the candidates in the order in which they were added.
    """

    def __init__(
        self, settings: Strategy, judge: Judge, reader: Reader, fp32: Optional[Evaluation], *, progress: bool
    ) -> None:
        """Start without candidates.

        Args:
            settings: section ``Strategy``, for ``max_drop`` and ``confidence``.
            judge: evaluates the candidates.
            reader: the data.
            fp32: the float model's evaluation; None: nothing is evaluated.
            progress: show progress bars on stderr.
        """
        self._settings, self._judge, self._reader, self._fp32 = settings, judge, reader, fp32
        self._progress = progress
        self._added: list[Candidate] = []

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._added)

    def add(self, candidate: Candidate) -> Candidate:
        """Add a candidate and return it, evaluating it first unless that was done or nothing is evaluated."""
        if self._fp32 is not None and candidate.evaluation is None:
            with timed(candidate.seconds, "evaluate_int8"):
                candidate.evaluation = self._judge.evaluate(candidate.model, "int8", self._reader, self._progress)
        candidate.bytes = candidate.model.bytes
        self._added.append(candidate)
        return candidate

    @functools.cached_property
    def truth(self) -> GroundTruth:
        """Ground truth of the eval split."""
        return GroundTruth.load(self._reader, "eval")

    @property
    def max_drop(self) -> Optional[float]:
        """The largest allowed drop of mAP; None: no limit, or nothing is evaluated."""
        return self._settings.max_drop if self._fp32 else None

    def drop(self, candidate: Candidate) -> float:
        """Return the float model's mAP minus a candidate's; 0 without an evaluation."""
        return self._fp32.map - candidate.map if self._fp32 and candidate.evaluation else 0.0

    def compare(self, candidate: Candidate) -> Optional[Comparison]:
        """Return the comparison of a candidate's detections and mAP with the float model's; None if not evaluated."""
        if self._fp32 is None or candidate.evaluation is None:
            return None
        if candidate.comparison is None:
            with timed(candidate.seconds, "compare"):
                candidate.comparison = compare(self._fp32, candidate.evaluation, self.truth)
        return candidate.comparison

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is within ``max_drop`` with probability ``Strategy.confidence``.

        At a confidence of 0.5 the measured drop decides. True if ``max_drop`` is None.
        """
        if self.max_drop is None:
            return True
        confidence = self._settings.confidence
        compared = self.compare(candidate) if confidence != MEASURED else None
        if compared is not None and compared.difference is not None:
            return compared.difference.probability(self.max_drop) >= confidence
        # The tolerance accepts a drop of exactly max_drop in spite of floating-point rounding.
        return self.drop(candidate) <= self.max_drop + 1e-9

    def best(self) -> Candidate:
        """Return the candidate with the highest mAP, the first of equal ones."""
        return max(self._added, key=lambda candidate: candidate.map)
