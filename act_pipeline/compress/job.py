"""Input of a strategy: the compression job."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from act_pipeline.compress.candidates import Candidates
from act_pipeline.compress.held_out import HeldOut
from act_pipeline.compress.judging.judge import Judge
from act_pipeline.compress.plan.op_selection import Selection
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.interruption import Interruption
from act_pipeline.data import Reader
from act_pipeline.evaluation import Evaluation

if TYPE_CHECKING:  # it imports this module
    from act_pipeline.compress.accuracy_control.ranker import Ranker


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
        tried: all candidates, to which strategies add theirs, and their comparison with the float model.
        held_out: compares INT8 models with the float model on training images.
        work: a folder for files that strategies write.
        device: ``CPU`` or ``GPU``, for calibration and training.
        progress: whether to show progress bars.
        checkpoints: the training checkpoints.
        interruption: the handling of SIGINT and SIGTERM.
        fp32_cached: whether ``fp32`` comes from the cache of an earlier run.
        ranks: the processes that train together; this process is the leader.
        rankings: name of a candidate -> the ranking of its ops.
        analysis: content of ``analysis.json`` from the last ranking; None: no op was ranked.
    """

    config: Config
    model: InferenceModel
    selection: Selection
    reader: Reader
    judge: Judge
    fp32: Optional[Evaluation]
    tried: Candidates
    held_out: HeldOut
    work: Path
    device: str
    progress: bool
    checkpoints: Checkpoints
    interruption: Interruption
    fp32_cached: bool = False
    ranks: Ranks = ALONE
    rankings: dict[str, Ranker] = field(default_factory=dict)
    analysis: Optional[dict[str, Any]] = None

    def say(self, line: str) -> None:
        """Print a line on stderr, if progress is shown."""
        if self.progress:
            print(line, file=sys.stderr)

    def folder(self, name: str) -> Path:
        """Return a new, empty folder in :attr:`work`, whose name ends with ``name``."""
        # Counted from the last one, because folders of candidates that are out of question are removed.
        numbers = [int(path.name.split("_")[0]) for path in self.work.glob("[0-9]*_*")]
        path = self.work / f"{max(numbers, default=-1) + 1:03d}_{name}"
        path.mkdir(parents=True)
        return path
