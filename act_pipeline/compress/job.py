"""What a strategy is given, and what it makes: INT8 models with what they scored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.calibration.feeds import held_out_feeds
from act_pipeline.compress.judge import Judge
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.interruption import Interruption
from act_pipeline.data import Reader
from act_pipeline.evaluation import Comparison, Evaluation, GroundTruth, compare, detection_change

# The Strategy.confidence at which the drop that was measured decides.
MEASURED = 0.5


@dataclass
class Candidate:
    """An INT8 model that a strategy made.

    Attributes:
        name: what it is called in ``act.json``, ``ptq:mse`` say.
        strategy: ``ptq``, ``smooth_quant``, ``mixed`` or ``qat_dis``.
        model: the INT8 model.
        source: the float model that it was quantized from; None: it was trained, and its weights are its own.
        selection: which of its ops compute in INT8.
        inventory: what was found in it.
        record: what the strategy adds to ``act.json``, under names of its own.
        seconds: by stage.
        evaluation: on the eval split; None: there was none.
        comparison: of that with the float model's, once :meth:`Job.compare` was asked for it.
        note: why it is as it is, in a few words.
        bytes: of the model; :meth:`Job.add` sets it, since a model that is given up may be deleted.
    """

    name: str
    strategy: str
    model: InferenceModel
    source: Optional[InferenceModel]
    selection: Selection
    inventory: OpInventory
    record: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: Optional[Evaluation] = None
    comparison: Optional[Comparison] = None
    note: str = ""
    bytes: int = 0

    @property
    def map(self) -> float:
        """mAP on the eval split; -1 without an evaluation."""
        return self.evaluation.map if self.evaluation else -1.0


@dataclass
class Job:
    """A compression under way.

    Attributes:
        config: what was asked for.
        model: the float model, constants and BatchNorm folded, its ops that stay float marked.
        selection: which ops compute in INT8.
        reader: the data.
        judge: the engine that evaluates.
        fp32: the float model's evaluation; None: no evaluation is wanted.
        work: a folder for what strategies write.
        device: ``CPU`` or ``GPU``, where the float model calibrates and trains.
        progress: whether to show progress bars.
        checkpoints: of the training.
        interruption: signals.
        tried: every candidate, in the order of the trial.
        rankings: candidate -> its ops by what each costs alone, where that was measured
            (`compress.accuracy_control.algorithm`).
        analysis: the last of these as ``analysis.json`` has it.
        fp32_cached: ``fp32`` is that of an earlier run.
        ranks: the processes that train together; this one leads.
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
        """The feeds that candidates are compared on, one training image each; no calibration looks at them."""
        if self._held_out is None:
            self._held_out = held_out_feeds(self.config, self.reader, self.model)
        return self._held_out

    def change(self, model: InferenceModel, images: Optional[int] = None) -> float:
        """Return how far an INT8 model's detections are from the float model's on :attr:`held_out`, in [0, 1].

        The images that the model is evaluated on are not among them, so that what is chosen by this is not chosen by
        its verdict.

        Args:
            model: the INT8 model.
            images: the first so many of them, each a feed of one image; None: all.
        """
        feeds = self.held_out[:images]
        if self._exact_images < len(feeds):
            self._exact = self.judge.detect(self.model, "fp32", self.reader, feeds)
            self._exact_images = len(feeds)
        exact = self._exact[self._exact[:, 0] < len(feeds)]
        return detection_change(exact, self.judge.detect(model, "int8", self.reader, feeds))

    @property
    def max_drop(self) -> Optional[float]:
        """The largest drop in mAP that is allowed; None: any."""
        return self.config.strategy.max_drop if self.fp32 else None

    def folder(self, name: str) -> Path:
        """Return a new, empty folder."""
        path = self.work / f"{len(list(self.work.iterdir())):03d}_{name}"
        path.mkdir(parents=True)
        return path

    def drop(self, candidate: Candidate) -> float:
        """Return how much lower a candidate's mAP is than the float model's; 0 without an evaluation."""
        return self.fp32.map - candidate.map if self.fp32 and candidate.evaluation else 0.0

    def compare(self, candidate: Candidate) -> Optional[Comparison]:
        """Return a candidate's detections and mAP compared with the float model's; None without an evaluation."""
        if self.fp32 is None or candidate.evaluation is None:
            return None
        if candidate.comparison is None:
            with timed(candidate.seconds, "compare"):
                candidate.comparison = compare(self.fp32, candidate.evaluation, self.truth)
        return candidate.comparison

    @property
    def truth(self) -> GroundTruth:
        """What the eval split is scored against."""
        if self._truth is None:
            self._truth = GroundTruth.load(self.reader, "eval")
        return self._truth

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is within ``max_drop``, as surely as ``Strategy.confidence`` asks."""
        if self.max_drop is None:
            return True
        confidence = self.config.strategy.confidence
        compared = self.compare(candidate) if confidence != MEASURED else None
        if compared is not None and compared.difference is not None:
            return compared.difference.probability(self.max_drop) >= confidence
        # The two figures are means of the same numbers; a drop of just max_drop is within it.
        return self.drop(candidate) <= self.max_drop + 1e-9

    def best(self) -> Candidate:
        """Return the candidate of the highest mAP, of equal ones the first."""
        return max(self.tried, key=lambda candidate: candidate.map)

    def add(self, candidate: Candidate) -> Candidate:
        """Evaluate a candidate, unless that is done, and note it."""
        if self.fp32 is not None and candidate.evaluation is None:
            with timed(candidate.seconds, "evaluate_int8"):
                candidate.evaluation = self.judge.evaluate(candidate.model, "int8", self.reader, self.progress)
        candidate.bytes = candidate.model.bytes
        self.tried.append(candidate)
        return candidate


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that the block takes to ``seconds[stage]``."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
