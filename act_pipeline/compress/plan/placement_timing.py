"""Measure variants of an INT8 model in interleaved rounds, each in a process of its own (`benchmark.worker`)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from act_pipeline.benchmark.plan import Candidate as Planned
from act_pipeline.benchmark.runs import Run, closing, load
from act_pipeline.benchmark.timing import rounds
from act_pipeline.benchmark.worker import WorkerFailed
from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.plan.placement import Variant
from act_pipeline.core.artifacts import InferenceModel, copy_infer_cfg
from act_pipeline.core.errors import UserError
from act_pipeline.engines import create_engine, machine
from act_pipeline.engines.registry import find_runtime
from act_pipeline.families.registry import Decoder
from act_pipeline.onnx_export import lowered_onnx

ROUNDS = 15
_WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Timer:
    """Measures variants of an INT8 model: a :data:`act_pipeline.compress.plan.placement.Measure`.

    Attributes:
        model: the INT8 model.
        source: the float model that it was quantized from; None: it was trained, and reverted ops keep INT8 weights.
        float_model: the float model to compare with.
        engine: ``openvino`` or ``onnxruntime``.
        threads: CPU threads.
        feeds: inputs of one image each.
        work: an existing folder for the variants.
        decoder: turns outputs into detections.
        say: is called with one line for each measurement.
    """

    model: InferenceModel
    source: InferenceModel | None
    float_model: InferenceModel
    engine: str
    threads: int
    feeds: Sequence[Mapping[str, np.ndarray]]
    work: Path
    decoder: Decoder | None
    say: Callable[[str], None]

    def __call__(self, models: Mapping[str, Variant]) -> dict[str, list[float]]:
        """Return label -> seconds of each round.

        Raises:
            UserError: a variant cannot run.
        """
        self.say(f"placement: timing {len(models)} models in {self.engine}: {'; '.join(models)}")
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            inputs = Path(folder, "inputs.npz")
            np.savez(inputs, **{name: np.stack([feed[name] for feed in self.feeds]) for name in self.feeds[0]})
            runs = [Run(self._planned(label, of, Path(folder, f"{n}"))) for n, (label, of) in enumerate(models.items())]
            with closing(runs):
                load(runs, inputs, lambda line: None, twice=False)
                self._time(runs)
        return {run.label: run.seconds for run in runs}

    def _planned(self, label: str, of: Variant, folder: Path) -> Planned:
        precision = of if isinstance(of, str) else "int8"
        model = self.float_model if isinstance(of, str) else self.model
        folder.mkdir()
        if of and not isinstance(of, str):
            model = revert_to_float(self.model, of, folder, self.source)
            copy_infer_cfg(self.float_model, folder)
        # Exported here, since the process would import Paddle for it.
        file = lowered_onnx(model, find_runtime(self.engine).target(precision))
        create = functools.partial(
            create_engine, self.engine, file, precision, "CPU", self.threads, decoder=self.decoder, machine=machine()
        )
        return Planned(label, self.engine, precision, "CPU", file, create=create)

    def _time(self, runs: Sequence[Run]) -> None:
        try:
            for run in runs:
                if run.failure is not None:
                    raise UserError(f"placement: {run.label} cannot run in {self.engine}: {run.failure}")
                run.running.warm_up(_WARM_UP_RUNS)
            by_label = {run.label: run for run in runs}
            for index, turn in enumerate(rounds(list(by_label), ROUNDS, 0)):
                for label in turn:
                    by_label[label].seconds.append(by_label[label].running.timed_run(index).seconds)
        except WorkerFailed as error:
            raise UserError(f"placement: {self.engine} failed: {error}") from None
