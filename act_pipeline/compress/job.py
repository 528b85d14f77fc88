"""What a strategy is given, and what it makes: INT8 models with what they scored."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from act_pipeline.analysis.sensitivity import OpSensitivity
from act_pipeline.compress.baseline import cached_evaluation
from act_pipeline.compress.checkpoint import Checkpoints
from act_pipeline.compress.interrupt import Interruption
from act_pipeline.compress.inventory import OpInventory
from act_pipeline.compress.ranks import ALONE, Ranks
from act_pipeline.compress.selection import Selection
from act_pipeline.config import Config
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine, find_support
from act_pipeline.engines.base import available_cpus
from act_pipeline.engines.deformable_attention import samples_by_rows, with_attention_by_rows
from act_pipeline.engines.program_desc import parsed
from act_pipeline.evaluation import Evaluation, evaluate_beside
from act_pipeline.model import InferenceModel
from act_pipeline.static_graph import StaticGraph

# Each takes the memory of an inference, about 1 GB for RT-DETR at 640.
_MOST_ENGINES = 4


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
        fp32: the float model's evaluation; None: no evaluation is wanted.
        work: a folder for what strategies write.
        device: ``CPU`` or ``GPU``.
        progress: whether to show progress bars.
        checkpoints: of the training.
        interruption: signals.
        tried: every candidate, in the order of the trial.
        sensitivities: candidate -> what each of its ops costs alone, where that was measured.
        analysis: the last of these as ``analysis.json`` has it.
        fp32_cached: ``fp32`` is that of an earlier run.
        ranks: the processes that train together; this one leads.
    """

    config: Config
    model: InferenceModel
    selection: Selection
    reader: Reader
    fp32: Optional[Evaluation]
    work: Path
    device: str
    progress: bool
    checkpoints: Checkpoints
    interruption: Interruption
    tried: list[Candidate] = field(default_factory=list)
    sensitivities: dict[str, list[OpSensitivity]] = field(default_factory=dict)
    analysis: Optional[dict[str, Any]] = None
    fp32_cached: bool = False
    ranks: Ranks = ALONE

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

    def meets(self, candidate: Candidate) -> bool:
        """Return whether a candidate is within ``max_drop``."""
        # The two figures are means of the same numbers; a drop of just max_drop is within it.
        return self.max_drop is None or self.drop(candidate) <= self.max_drop + 1e-9

    def best(self) -> Candidate:
        """Return the candidate of the highest mAP, of equal ones the first."""
        return max(self.tried, key=lambda candidate: candidate.map)

    def add(self, candidate: Candidate) -> Candidate:
        """Evaluate a candidate, unless that is done, and note it."""
        if self.fp32 is not None and candidate.evaluation is None:
            with timed(candidate.seconds, "evaluate_int8"):
                candidate.evaluation = evaluate_model(candidate.model, "int8", self.device, self.reader, self.progress)
        candidate.bytes = candidate.model.bytes
        self.tried.append(candidate)
        return candidate


def engine_name(precision: str, device: str) -> str:
    """Return the engine that :func:`evaluate_model` takes: what computes the model as it stands, soonest."""
    if device != "CPU":
        return "paddle"
    name = "paddle_onednn" if precision == "fp32" else "int8_reference"
    return name if find_support(name, precision, device).available else "paddle"


def engines_beside(device: str) -> tuple[int, int]:
    """Return how many engines :func:`evaluate_model` runs beside each other, and the CPU threads of each."""
    cpus = available_cpus()
    count = min(cpus, _MOST_ENGINES) if device == "CPU" else 1
    return count, cpus // count


def evaluate_model(
    model: InferenceModel, precision: str, device: str, reader: Reader, progress: bool
) -> Evaluation:
    """Evaluate a model in Paddle Inference, ``precision`` being ``fp32`` or ``int8``."""
    count, threads = engines_beside(device)
    name = engine_name(precision, device)
    with contextlib.ExitStack() as stack:
        if name == "paddle_onednn":  # the other quick engine does so itself
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="act_pipeline_float_"))
            model = with_attention_by_rows(model, Path(folder))
        engine: Any = create_engine(name, model, precision, device, threads)
        engines = [engine, *(engine.clone() for _ in range(count - 1))]
        for each in engines:
            stack.enter_context(contextlib.closing(each))
        return evaluate_beside(engines, reader, progress=progress)


def evaluation_survives_nan(graph: StaticGraph, device: str) -> bool:
    """Say whether :func:`evaluate_model` comes back from an INT8 graph whatever its numbers are.

    Paddle 2.6.2's ``grid_sampler`` on the CPU reads beyond its input where a grid is NaN, and ends the process; the quick
    engine has none where it knows the attention.
    """
    if engine_name("int8", device) != "int8_reference":
        return False
    return samples_by_rows(parsed(graph.program.desc.serialize_to_string()))


def evaluate_baseline(model: InferenceModel, device: str, reader: Reader, progress: bool) -> tuple[Evaluation, bool]:
    """Evaluate the float model, unless the user's cache holds that; say whether it did."""
    return cached_evaluation(
        model.content_hash(),
        reader.fingerprint("eval"),
        engine_name("fp32", device),
        device,
        engines_beside(device)[1],
        lambda: evaluate_model(model, "fp32", device, reader, progress),
    )


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that the block takes to ``seconds[stage]``."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
