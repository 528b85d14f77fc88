"""Sensitivity of each op: the output error when this op alone computes in INT8.

PaddleSlim's ``AnalysisPTQ.statistical_analyse`` and ``metric_error_analyse`` write a model for each op. Here ops are
switched in one graph (`analysis.simulation`), and each figure is a sum over images, so that the work can be cut
anywhere: a unit is one op on one batch, measured by :class:`SensitivityRunner` in this process, in others, or on a
cluster (`analysis.executors`), and kept as soon as it is there (`analysis.ledger`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.analysis.simulation import Simulation
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.progress import each
from act_pipeline.data.reader_settings import ReaderSettings
from act_pipeline.evaluation import evaluate
from act_pipeline.evaluation.matching import agreement_of
from act_pipeline.graph.int8_rounding import sqnr_db
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.raw_outputs import RawOutputs, find_raw_outputs, signal_and_noise
from act_pipeline.graph.static_graph import StaticGraph, static_mode

# Changes when figures measured before are not comparable any more.
_VERSION = 1
_ATTENTION = re.compile(r"^(.*\.(?:self|cross)_attn)(?:\.|$)")
Unit = tuple[str, int]
# Batch index of a unit that measures mAP on the subset.
MAP = -1


@dataclass(frozen=True)
class Subset:
    """Images with ground truth on which mAP is measured.

    Attributes:
        reader: the reader's settings, fitted to the model.
        data_hash: hash of its eval split.
        images: number of images, the first ones of the eval split.
        sources: the model's input name -> the reader's name.
    """

    reader: ReaderSettings
    data_hash: str
    images: int
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """The data that a worker needs to measure sensitivities, in any process.

    Attributes:
        key: hash of what is measured; measurements with the same key are comparable.
        program: serialized program of the prepared float model.
        params: serialized parameters of this model.
        ops: the ops to be measured.
        thresholds: activation name -> threshold, for all activations of ``ops``.
        batches: dicts of the model's inputs, float32.
        device: ``CPU`` or ``GPU``.
        subset: images on which the mAP of each op is measured; None to not measure mAP.
    """

    key: str
    program: bytes = field(repr=False)
    params: bytes = field(repr=False)
    ops: tuple[QuantizableOp, ...] = field(repr=False)
    thresholds: Mapping[str, float] = field(repr=False)
    batches: tuple[Mapping[str, np.ndarray], ...] = field(repr=False)
    device: str = "CPU"
    subset: Optional[Subset] = None

    @classmethod
    def of(
        cls,
        model: InferenceModel,
        ops: Sequence[QuantizableOp],
        thresholds: Mapping[str, float],
        batches: Sequence[Mapping[str, np.ndarray]],
        device: str = "CPU",
        subset: Subset | None = None,
        source_hash: str | None = None,
    ) -> Task:
        """Return the task of measuring ``ops`` on ``batches``.

        Args:
            model: the prepared float model.
            ops, thresholds, batches, device, subset: see :class:`Task`.
            source_hash: content hash of the model that ``model`` was prepared from, used in the key; None for the hash
                of ``model``.
        """
        used = {name: float(thresholds[name]) for op in ops for name in op.activations}
        digest = hashlib.sha256()
        digest.update(repr((_VERSION, source_hash or model.content_hash(), device)).encode())
        digest.update(repr(sorted(used.items())).encode())
        digest.update(repr(subset and (subset.data_hash, subset.images)).encode())
        digest.update(repr([asdict(op) for op in ops]).encode())
        for batch in batches:
            for name in sorted(batch):
                digest.update(repr((name, batch[name].shape)).encode())
                digest.update(np.ascontiguousarray(batch[name]).data)
        return cls(
            f"sha256:{digest.hexdigest()}",
            model.model_path.read_bytes(),
            model.params_path.read_bytes(),
            tuple(ops),
            used,
            tuple(batches),
            device,
            subset,
        )

    @property
    def units(self) -> list[Unit]:
        """The units (op, batch), ordered by batch so that each is prepared once; batch :data:`MAP` measures mAP."""
        batches = [*range(len(self.batches)), *([MAP] if self.subset else [])]
        return [(op.name, batch) for batch in batches for op in self.ops]

    @property
    def images(self) -> int:
        """The number of images in all batches."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches)


@dataclass(frozen=True)
class OpSensitivity:
    """Output error of a model in which this op alone is in INT8.

    Attributes:
        name, type, module, group: see :class:`act_pipeline.graph.quantizable_ops.QuantizableOp`.
        sqnr_db: ``10 log10(signal / noise)`` of the outputs in dB, see
            :func:`act_pipeline.graph.raw_outputs.signal_and_noise`.
        error: noise / signal.
        share: share in the sum of all ops' errors, in [0, 1].
        detection_change: 1 - the mean agreement of the detections that reach a score of 0.3 with those of the float
            model, in [0, 1], see :mod:`act_pipeline.evaluation.matching`.
        map: mAP on the subset; None if not measured.
    """

    name: str
    type: str
    module: str
    group: str
    sqnr_db: float
    error: float
    share: float
    detection_change: float
    map: Optional[float] = None


@dataclass(frozen=True)
class BlockError:
    """Output error of a model in which a block of ops alone is in INT8.

    Attributes:
        group: group of the block's first op.
        ops: number of ops in the block.
        error: noise / signal of the outputs, see :func:`act_pipeline.graph.raw_outputs.signal_and_noise`.
    """

    group: str
    ops: int
    error: float


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
        agreement, objects = agreement_of(self.exact, found) if _detects(found) else (0.0, 0)
        return {
            "op": name,
            "batch": batch,
            "signal": signal,
            "noise": noise,
            "agreement": agreement,
            "objects": objects,
        }

    def signal_and_noise(self, names: Collection[str], batch: int) -> tuple[float, float, dict[str, np.ndarray]]:
        """Run a batch with some ops in INT8 and compare the outputs with the float model's.

        Args:
            names: names of the ops.
            batch: index of the batch.

        Returns:
            signal power, noise power, and the outputs with these ops in INT8.

        Raises:
            UserError: the outputs are not finite, or memory does not suffice.
        """
        feed = self.task.batches[batch]
        if self.held != batch:
            self.exact, self.held = self.simulation.hold(feed), batch
        found = self.simulation.run(feed, set(names))
        signal, noise = signal_and_noise(self.exact, found, self.raw)
        if not (math.isfinite(signal) and math.isfinite(noise)):
            some = ", ".join(list(names)[:3])
            raise UserError(
                f"the outputs are not finite with {some} in INT8, or in the float model; its weights or the images are "
                "damaged: evaluate the float model, and export it again"
            )
        return signal, noise, found

    def _map(self, name: str) -> float:
        from act_pipeline.data import Reader

        subset = self.task.subset
        assert subset is not None
        if self._reader is None:
            self._reader = Reader(subset.reader)
        engine = _OneOp(self.simulation, name, subset.sources, self.task.device)
        return evaluate(engine, self._reader, limit=subset.images, progress=False, batch_size=1, warmup=0).map

    def close(self) -> None:
        """Free the model."""
        self._stack.close()


class _OneOp:
    """A simulation with one op in INT8, as an engine for :func:`act_pipeline.evaluation.evaluate`."""

    def __init__(self, simulation: Simulation, op: str, sources: Mapping[str, str], device: str) -> None:
        self.name, self.precision, self.device, self.threads = "simulation", "int8", device, available_cpus()
        self._simulation, self._op, self._sources = simulation, op, sources

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._simulation.run({name: inputs[source] for name, source in self._sources.items()}, {self._op})


def summarize(ops: Sequence[QuantizableOp], measurements: Iterable[Mapping[str, Any]]) -> list[OpSensitivity]:
    """Sum the measurements of all units per op.

    Args:
        ops: of the task.
        measurements: of :meth:`SensitivityRunner.measure`.
    """
    sums: dict[str, dict[str, float]] = {}
    maps: dict[str, float] = {}
    for found in measurements:
        if found["batch"] == MAP:
            maps[found["op"]] = found["map"]
            continue
        into = sums.setdefault(found["op"], dict.fromkeys(("signal", "noise", "agreement", "objects"), 0.0))
        for key in into:
            into[key] += found[key]
    errors = {name: found["noise"] / found["signal"] if found["signal"] else 0.0 for name, found in sums.items()}
    total = sum(errors.values())
    return [
        OpSensitivity(
            op.name,
            op.type,
            op.module,
            op.group,
            sqnr_db(errors[op.name]),
            errors[op.name],
            errors[op.name] / total if total else 0.0,
            1 - sums[op.name]["agreement"] / sums[op.name]["objects"] if sums[op.name]["objects"] else 0.0,
            maps.get(op.name),
        )
        for op in ops
    ]


def ranked(sensitivities: Collection[OpSensitivity]) -> list[OpSensitivity]:
    """Sort sensitivities in descending order of error, then of detection change."""
    return sorted(sensitivities, key=lambda op: (-op.error, -op.detection_change))


def group_shares(sensitivities: Sequence[OpSensitivity]) -> list[dict[str, Any]]:
    """Return ``name``, number of ``ops`` and ``share`` of the total error for each group; the shares add up to 1."""
    return _shares(sensitivities, lambda op: op.group)


def attention_shares(sensitivities: Sequence[OpSensitivity]) -> list[dict[str, Any]]:
    """Return ``name``, number of ``ops`` and ``share`` of the total error for each attention module.

    An attention module, e.g. ``transformer.decoder.layers.0.self_attn``, is part of its group.
    """

    def attention(op: OpSensitivity) -> str | None:
        found = _ATTENTION.match(op.module)
        return found.group(1) if found else None

    return _shares(sensitivities, attention)


def _shares(
    sensitivities: Sequence[OpSensitivity], name_of: Callable[[OpSensitivity], Optional[str]]
) -> list[dict[str, Any]]:
    shares: dict[str, dict[str, Any]] = {}
    for op in sensitivities:
        name = name_of(op)
        if name is not None:
            entry = shares.setdefault(name, {"name": name, "ops": 0, "share": 0.0})
            entry["ops"] += 1
            entry["share"] += op.share
    return list(shares.values())


def _detects(outputs: Mapping[str, np.ndarray]) -> bool:
    return "bbox_num" in outputs and outputs["bbox"].ndim == 2 and outputs["bbox"].shape[1] == 6
