"""INT8 models that the strategies of a compression made, and how their accuracy compares with the float model's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Optional

from act_pipeline.compress.judging.judge import Judge
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.result.candidate_details import CandidateDetails
from act_pipeline.config.sections import Strategy
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.timing import timed
from act_pipeline.data import Reader
from act_pipeline.evaluation import Comparison, Evaluation, GroundTruth, compare
from act_pipeline.evaluation.act_candidates import FloatOp
from act_pipeline.evaluation.confidence import TOLERANCE

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
        """mAP on the eval split; -1 without an evaluation or labels."""
        return self.evaluation.map if self.evaluation else -1.0


class Candidates:
    """The candidates of a compression, evaluated and compared with the float model on the eval split.

    Iterating yields the candidates in the order in which they were added.
    """

    def __init__(
        self,
        settings: Strategy,
        judge: Optional[Judge],
        reader: Optional[Reader],
        fp32: Optional[Evaluation],
        *,
        progress: bool,
    ) -> None:
        """Start without candidates.

        Args:
            settings: section ``Strategy``, for ``max_drop``, ``min_agreement`` and ``confidence``.
            judge: evaluates the candidates; None, without ``fp32``: nothing does.
            reader: the data; None: as ``judge``.
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
            assert self._judge is not None and self._reader is not None
            with timed(candidate.seconds, "evaluate_int8"):
                candidate.evaluation = self._judge.evaluate(candidate.model, "int8", self._reader, self._progress)
        candidate.bytes = candidate.model.bytes
        self._added.append(candidate)
        if self._progress and self._fp32 is not None:
            print(self._verdict(candidate), file=sys.stderr)
        return candidate

    def announce(self, step: str) -> None:
        """Tell on stderr what is tried next, if progress is shown."""
        if self._progress:
            print(f"next: {step}", file=sys.stderr)

    def _verdict(self, candidate: Candidate) -> str:
        """Return a line on the accuracy of a candidate, and whether that is within the limits."""
        figures = []
        if self.has_map:
            figures.append(f"mAP {candidate.map:.4f}, drop {self.drop(candidate):.4f}")
        if self.min_agreement is not None or not self.has_map:
            figures.append(f"agreement {self.agreement(candidate):.4f}")
        limits = f"; {'within' if self.meets(candidate) else 'not within'} {self.limits}" if self.limits else ""
        return f"{candidate.name}: {', '.join(figures)}{limits}"

    @functools.cached_property
    def truth(self) -> GroundTruth:
        """Ground truth of the eval split."""
        assert self._reader is not None
        return GroundTruth.load(self._reader, "eval")

    @property
    def max_drop(self) -> Optional[float]:
        """The largest allowed drop of mAP; None: no limit, or no mAP is measured."""
        return self._settings.max_drop if self.has_map else None

    @property
    def min_agreement(self) -> Optional[float]:
        """The least agreement with the float model; None: no limit, or nothing is evaluated."""
        return self._settings.min_agreement if self._fp32 else None

    @property
    def has_map(self) -> bool:
        """Whether mAP is measured: the models are evaluated, on images with labels."""
        return self._fp32 is not None and self._fp32.map >= 0

    @property
    def limits(self) -> str:
        """The limits, for messages; empty: there are none."""
        named = {"max_drop": self.max_drop, "min_agreement": self.min_agreement}
        return " and ".join(f"{name} {value}" for name, value in named.items() if value is not None)

    def drop(self, candidate: Candidate) -> float:
        """Return the float model's mAP minus a candidate's; 0 without an mAP."""
        return self._fp32.map - candidate.map if self._fp32 and self.has_map and candidate.evaluation else 0.0

    def agreement(self, candidate: Candidate) -> float:
        """Return a candidate's agreement with the float model, in [0, 1]; 1 if there is nothing to compare."""
        compared = self.compare(candidate)
        return 1.0 if compared is None or compared.loss is None else compared.loss.agreement

    def compare(self, candidate: Candidate) -> Optional[Comparison]:
        """Return the comparison of a candidate's detections and mAP with the float model's; None if not evaluated."""
        if self._fp32 is None or candidate.evaluation is None:
            return None
        if candidate.comparison is None:
            with timed(candidate.seconds, "compare"):
                candidate.comparison = compare(self._fp32, candidate.evaluation, self.truth)
        return candidate.comparison

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is within all limits, each with probability ``Strategy.confidence``.

        At a confidence of 0.5 the measured figures decide. True without limits.
        """
        return self._meets_max_drop(candidate) and self._meets_min_agreement(candidate)

    def _meets_max_drop(self, candidate: Candidate) -> bool:
        if self.max_drop is None:
            return True
        compared = self.compare(candidate) if self._settings.confidence != MEASURED else None
        if compared is not None and compared.difference is not None:
            return compared.difference.probability(self.max_drop) >= self._settings.confidence
        # The tolerance accepts a drop of exactly max_drop in spite of floating-point rounding.
        return self.drop(candidate) <= self.max_drop + TOLERANCE

    def _meets_min_agreement(self, candidate: Candidate) -> bool:
        if self.min_agreement is None:
            return True
        if self._settings.confidence == MEASURED:
            return self.agreement(candidate) >= self.min_agreement - TOLERANCE
        compared = self.compare(candidate)
        lost = compared.loss if compared is not None else None
        return lost is None or lost.probability(1 - self.min_agreement) >= self._settings.confidence

    def rank(self, candidate: Candidate) -> tuple[float, float]:
        """Return the rank of a candidate: of two, the better one has the greater rank.

        The first entry is minus the sum of what is missing to each limit; the second is the mAP, without it the
        agreement. With ``max_drop`` as the only limit, this is the order of the mAP.
        """
        missing = 0.0
        if self.max_drop is not None:
            missing += max(self.drop(candidate) - self.max_drop, 0.0)
        if self.min_agreement is not None:
            missing += max(self.min_agreement - self.agreement(candidate), 0.0)
        measured = self._fp32 is not None and not self.has_map
        return -missing, self.agreement(candidate) if measured else candidate.map

    def gains(self, candidate: Candidate, other: Candidate, share: float) -> bool:
        """Return whether a candidate has lost less accuracy than another, by more than a share of the other's loss.

        Args:
            candidate: the candidate.
            other: a candidate that is not within the limits.
            share: the share, in [0, 1].
        """

        def loss(of: Candidate) -> float:
            return self.drop(of) if by_map else 1 - self.agreement(of)

        by_map = self.has_map and (self.min_agreement is None or not self._meets_max_drop(other))
        return loss(other) - loss(candidate) > share * loss(other)

    def best(self) -> Candidate:
        """Return the candidate with the greatest rank, the first of equal ones."""
        return max(self._added, key=self.rank)
