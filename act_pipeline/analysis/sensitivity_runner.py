"""A task's model in this process, which measures single ops or blocks of ops in INT8."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.analysis.sensitivity import BlockError, OpSensitivity, summarize
from act_pipeline.analysis.sensitivity_task import MAP, Task, Unit
from act_pipeline.analysis.simulation import Simulation
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.progress import each
from act_pipeline.evaluation import evaluate
from act_pipeline.evaluation.matching import agreement_of
from act_pipeline.families.interface import Geometry
from act_pipeline.families.registry import Decoder
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.raw_outputs import RawOutputs, find_raw_outputs, signal_and_noise
from act_pipeline.graph.static_graph import StaticGraph, static_mode


class SensitivityRunner:
    """A task's model, loaded in this process, to measure single ops or blocks of ops on its batches.

    Example::

        with contextlib.closing(SensitivityRunner(task)) as runner:
            errors = runner.block_errors(blocks)
            found = runner.measure_ops(blocks[0])
    """

    def __init__(self, task: Task) -> None:
        """Load the model; :meth:`close` frees it.

        Raises:
            UserError: the files are damaged.
        """
        self.task = task
        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="act_pipeline_")))
        (folder / MODEL_FILENAME).write_bytes(task.program)
        (folder / PARAMS_FILENAME).write_bytes(task.params)
        model = InferenceModel(folder)
        with static_mode(), contextlib.closing(StaticGraph.load(model)) as graph:
            self.raw: RawOutputs | None = find_raw_outputs(graph)
        self.simulation = Simulation(model, task.ops, task.device, self.raw.names if self.raw else ())
        self._stack.callback(self.simulation.close)
        self.simulation.set_thresholds(task.thresholds)
        self._reader: Any = None
        self.held: int | None = None
        self.exact: dict[str, np.ndarray] = {}

    def measure_ops(self, ops: Sequence[QuantizableOp], progress: bool = True) -> list[OpSensitivity]:
        """Measure ops of the task on every batch, each quantized alone.

        Args:
            ops: ops of the task.
            progress: show a progress bar on stderr.

        Returns:
            the sensitivities in the order of ``ops``; ``share`` is relative to the sum of their errors.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        units = [(op.name, batch) for batch in range(len(self.task.batches)) for op in ops]
        return summarize(ops, [self.measure(*unit) for unit in each(units, "sensitivity", "op", shown=progress)])

    def block_errors(self, blocks: Sequence[Sequence[QuantizableOp]], progress: bool = True) -> list[BlockError]:
        """Measure blocks of the task's ops on every batch, each block quantized alone.

        Args:
            blocks: ops of the task, by block.
            progress: show a progress bar on stderr.

        Returns:
            the errors in the order of ``blocks``.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        sums = np.zeros((len(blocks), 2))
        units = [(index, batch) for batch in range(len(self.task.batches)) for index in range(len(blocks))]
        for index, batch in each(units, "blocks", "block", shown=progress):
            sums[index] += self.signal_and_noise([op.name for op in blocks[index]], batch)[:2]
        return [
            BlockError(block[0].group, len(block), noise / signal if signal else 0.0)
            for block, (signal, noise) in zip(blocks, sums)
        ]

    def __call__(self, unit: Unit) -> dict[str, Any]:
        """Measure a unit of the task: see :meth:`measure`."""
        return self.measure(*unit)

    def measure(self, name: str, batch: int) -> dict[str, Any]:
        """Measure one op on one batch.

        Returns:
            ``op``, ``batch``, ``signal``, ``noise``, ``agreement``, ``objects``: sums over the batch; for the batch
            :data:`MAP`, ``op``, ``batch`` and ``map``.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        if batch == MAP:
            return {"op": name, "batch": MAP, "map": self._map(name)}
        signal, noise, found = self.signal_and_noise([name], batch)
        ours, theirs = (self._detections(outputs, batch) for outputs in (self.exact, found))
        agreement, objects = agreement_of(ours, theirs) if _detects(theirs) else (0.0, 0)
        return {
            "op": name,
            "batch": batch,
            "signal": signal,
            "noise": noise,
            "agreement": agreement,
            "objects": objects,
        }

    def weight_error(self, name: str) -> float:
        """Return the output error when only the weight of an op is in INT8, on all batches.

        Args:
            name: an op of the task.

        Returns:
            noise / signal of the outputs; 0 if the op has no weight.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        powers = [self.signal_and_noise([], batch, weight_only=[name])[:2] for batch in range(len(self.task.batches))]
        signal, noise = (sum(each) for each in zip(*powers))
        return noise / signal if signal else 0.0

    def signal_and_noise(
        self, names: Collection[str], batch: int, weight_only: Collection[str] = ()
    ) -> tuple[float, float, dict[str, np.ndarray]]:
        """Run a batch with some ops in INT8 and compare the outputs with the float model's.

        Args:
            names: names of the ops.
            batch: index of the batch.
            weight_only: names of other ops of which only the weight is in INT8.

        Returns:
            signal power, noise power, and the outputs with these ops in INT8.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        feed = self.task.batches[batch]
        if self.held != batch:
            self.exact, self.held = self.simulation.hold(feed), batch
        found = self.simulation.run(feed, set(names), set(weight_only))
        signal, noise = self._powers(found, feed)
        if not (math.isfinite(signal) and math.isfinite(noise)):
            some = ", ".join([*names, *weight_only][:3])
            raise UserError(
                f"the outputs are not finite with {some} in INT8, or in the float model; its weights or the images are "
                "damaged: evaluate the float model, and export it again"
            )
        return signal, noise, found

    def _powers(self, found: Mapping[str, np.ndarray], feed: Mapping[str, np.ndarray]) -> tuple[float, float]:
        """Return the signal power, and the noise power of outputs."""
        decoder = self.task.decoder
        if self.raw is None and decoder is not None:
            geometry = Geometry.of(feed, len(next(iter(feed.values()))))
            one, other = (
                decoder.family.comparable(self.simulation.outputs_of(outputs), geometry)
                for outputs in (self.exact, found)
            )
            if one is not None and other is not None:
                return float((one**2).sum()), float(((one - other) ** 2).sum())
        return signal_and_noise(self.exact, found, self.raw)

    def _detections(self, outputs: dict[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
        decoder = self.task.decoder
        return outputs if decoder is None else decoder(self.simulation.outputs_of(outputs), self.task.batches[batch])

    def _map(self, name: str) -> float:
        from act_pipeline.data import Reader

        subset = self.task.subset
        assert subset is not None
        if self._reader is None:
            self._reader = Reader(subset.reader)
        engine = _OneOp(self.simulation, name, subset.sources, self.task.device, self.task.decoder)
        return evaluate(engine, self._reader, limit=subset.images, progress=False, batch_size=1, warmup=0).map

    def close(self) -> None:
        """Free the model."""
        self._stack.close()


class _OneOp:
    """A simulation with one op in INT8, as an engine for :func:`act_pipeline.evaluation.evaluate`."""

    def __init__(
        self, simulation: Simulation, op: str, sources: Mapping[str, str], device: str, decoder: Decoder | None
    ) -> None:
        self._decoder = decoder
        self.name, self.precision, self.device, self.threads = "simulation", "int8", device, available_cpus()
        self._simulation, self._op, self._sources = simulation, op, sources

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = self._simulation.run({name: inputs[source] for name, source in self._sources.items()}, {self._op})
        return outputs if self._decoder is None else self._decoder(self._simulation.outputs_of(outputs), inputs)


def _detects(outputs: Mapping[str, np.ndarray]) -> bool:
    return "bbox_num" in outputs and outputs["bbox"].ndim == 2 and outputs["bbox"].shape[1] == 6
