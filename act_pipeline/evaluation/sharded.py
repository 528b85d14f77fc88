"""Evaluation distributed over processes or a Ray cluster, with the same batches, detections and scores."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, ModelFile, location
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.process_pool import run_work
from act_pipeline.core.progress import Progress
from act_pipeline.core.work import Work
from act_pipeline.data.dataset import Dataset, ImageRecord
from act_pipeline.data.loader import Loader
from act_pipeline.data.reader import Reader
from act_pipeline.data.reader_settings import ReaderSettings
from act_pipeline.engines import Artifact, Engine, create_engine
from act_pipeline.evaluation import Evaluation, GroundTruth, score
from act_pipeline.evaluation.batches import BatchRun, run_batches

# Images per work unit: few, so that all processes end together, but enough to outweigh the overhead of a message.
_UNIT_IMAGES = 64
_UNITS_EACH = 4


@dataclass(frozen=True)
class ShardTask:
    """The data that a process needs to evaluate images; the annotation file, which may be large, is not included.

    Attributes:
        model: the model, under a path that is valid in every process.
        model_hash: content hash of the artifact that the engine loads.
        versions: versions of the libraries that compute; other versions give other bits.
        engine: arguments of :func:`act_pipeline.engines.create_engine` except the model.
        batch_size: images per run.
        settings: the reader's settings, for the preprocessing.
        category_ids: the COCO category id of every class index.
        annotation_file: path of the annotation file, for messages.
        readers: prefetch threads in each process.
        key: identifies the task, so that a process does not reuse the engine of another one.
    """

    model: Artifact
    model_hash: str
    versions: Mapping[str, str]
    engine: Mapping[str, Any]
    batch_size: int
    settings: ReaderSettings
    category_ids: tuple[int, ...]
    annotation_file: str
    readers: int = 0
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class UnitRun:
    """The result of one work unit.

    Attributes:
        runs: results of its batches.
        skipped: (file, reason) of the images that could not be read.
        worker: host name and process id.
    """

    runs: list[BatchRun]
    skipped: list[tuple[str, str]]
    worker: str


@dataclass(frozen=True)
class ShardedEvaluation:
    """An evaluation and how it was distributed.

    Attributes:
        evaluation: its latencies are those of engines that ran in parallel; ``images_per_second`` is images /
            ``wall_seconds``.
        executor: ``local`` or ``ray``.
        shards: number of processes; on Ray without a requested number, how many took part.
        wall_seconds: from the start of the processes, including their imports and the loading of the model, to the last
            batch.
    """

    evaluation: Evaluation
    executor: str
    shards: int
    wall_seconds: float

    @property
    def more(self) -> dict[str, Any]:
        """The additional entries of ``eval.json``."""
        return {"executor": self.executor, "shards": self.shards, "wall_seconds": round(self.wall_seconds, 3)}


class ShardSession:
    """The engine and the preprocessing of a task in one process."""

    def __init__(self, task: ShardTask) -> None:
        """Load the engine.

        Raises:
            UserError: the model or a version differs from what was asked for.
        """
        host = socket.gethostname()
        if not location(task.model).exists():
            raise UserError(
                f"{location(task.model)} does not exist on {host}, expected the model under the same path on every "
                "machine; copy it there, or share its folder"
            )
        self.task = task
        self.engine = create_engine(model=task.model, **task.engine)
        self.warmup = 1
        found = self.engine.artifact.content_hash()
        if found != task.model_hash:
            raise UserError(f"{location(task.model)} on {host} is {found}, expected {task.model_hash}; copy it there")
        for name, version in task.versions.items():
            other = self.engine.versions().get(name)
            if other != version:
                raise UserError(
                    f"{host} has {name} {other}, expected {version} as where the evaluation was started: another "
                    "version computes other figures; install the same"
                )
        self.preprocess = Reader(task.settings).preprocessing()

    def __call__(self, unit: Sequence[ImageRecord]) -> UnitRun:
        """Evaluate a unit's images.

        Raises:
            UserError: as :func:`act_pipeline.evaluation.batches.run_batches`.
        """
        task = self.task
        images = _Images(unit, self.preprocess, task.annotation_file)
        loader = Loader(images, task.batch_size, False, False, task.readers, 0)
        runs = list(run_batches(self.engine, loader, task.category_ids, task.annotation_file, self.warmup))
        if runs:
            self.warmup = 0
        return UnitRun(runs, images.noted, f"{socket.gethostname()}:{os.getpid()}")

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()


class _Images(Dataset):
    """The images of one work unit; the parent process limits the share of unreadable images over all units."""

    def __init__(self, records: Sequence[ImageRecord], preprocess: Any, where: str) -> None:
        self.noted: list[tuple[str, str]] = []
        super().__init__(records, preprocess, 1.0, where)

    def skip(self, files: Sequence[str], reason: str) -> None:
        self.noted.extend((file, reason) for file in files)


def shard_threads(threads: int | None, executor: str, shards: int | None) -> int:
    """Return the number of CPU threads of each engine.

    Args:
        threads: the requested number; None or 0 for the default: 1 on Ray, otherwise this machine's CPUs divided by
            ``shards``.
        executor: ``local`` or ``ray``.
        shards: number of processes; None counts as 1.
    """
    return threads or (1 if executor == "ray" else max(available_cpus() // (shards or 1), 1))


def evaluate_in_shards(
    engine: Engine,
    model: Artifact,
    reader: Reader,
    shards: int | None,
    *,
    executor: str = "local",
    ray_address: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
) -> ShardedEvaluation:
    """Evaluate the eval split in several processes, with bit-identical detections and scores.

    Each process runs the same batches as a single process would. Where sums depend on the number of threads (Paddle's
    own kernels), the results are identical to those of an engine with the same number of threads.

    Args:
        engine: already loaded in this process, so that its files on disk (ONNX exports, TensorRT plans) exist; it
            defines what each process loads, and may be closed.
        model: the model that it was loaded from.
        reader: provides the images and the annotation file.
        shards: number of processes; on Ray None means as many as fit.
        executor, ray_address: see :func:`act_pipeline.core.process_pool.run_work`.
        limit, batch_size, progress: see :func:`act_pipeline.evaluation.evaluate`.
        options: further arguments that the engine was created with.

    Raises:
        UserError: see :func:`act_pipeline.evaluation.evaluate` and :func:`act_pipeline.core.process_pool.run_work`.
    """
    if reader.settings.prompts is not None and reader.settings.prompts.encoder is not None:
        raise UserError(
            f"{location(model)} takes one box of an image at a time, which --shards does not spread; leave it out"
        )
    truth = GroundTruth.load(reader, "eval")
    on_cpu = engine.device == "CPU"
    busy = on_cpu and (executor == "ray" or engine.threads * (shards or 1) >= available_cpus())
    task = ShardTask(
        _absolute(model),
        engine.artifact.content_hash(),
        engine.versions(),
        {
            "name": engine.name, "precision": engine.precision, "device": engine.device, "threads": engine.threads,
            "batch_size": batch_size, **(options or {}),
        },
        batch_size,
        reader.settings,
        tuple(truth.category_ids),
        str(truth.path),
        0 if busy else max(1, reader.settings.worker_num),
    )  # fmt: skip
    work = Work(
        ShardSession, task, task.key, "the evaluation", "--shards", cpus=engine.threads if on_cpu else 1,
        gpus=0 if on_cpu else 1,
    )  # fmt: skip
    start = time.perf_counter()
    runs, workers = _run(
        work,
        reader.dataset("eval"),
        shards=shards,
        executor=executor,
        ray_address=ray_address,
        limit=limit,
        batch_size=batch_size,
        progress=progress,
    )
    wall_seconds = time.perf_counter() - start
    evaluation = score(runs, truth, batch_size)
    evaluation = replace(evaluation, images_per_second=evaluation.images / max(wall_seconds, 1e-9))
    return ShardedEvaluation(evaluation, executor, shards or workers, wall_seconds)


def _run(
    work: Work,
    dataset: Dataset,
    *,
    shards: int | None,
    executor: str,
    ray_address: str | None,
    limit: int | None,
    batch_size: int,
    progress: bool,
) -> tuple[list[BatchRun], int]:
    """Return the results of all batches in order, and how many processes took part."""
    collected = _Collected(dataset)
    with Progress("evaluate", "image", shown=progress) as bar:
        while True:
            batches = _batches(dataset, limit, batch_size)
            missing = collected.missing(batches)
            if not missing:
                return collected.in_order(batches), len(collected.workers)
            units = list(_units(missing, batch_size, shards or 1))
            bar.total = bar.done + sum(map(len, units))
            skipped = len(dataset.skipped)
            with contextlib.closing(run_work(work, units, executor, shards, ray_address)) as results:
                for result in results:
                    bar.update(collected.add(result))
            # A single process replaces an unreadable image by the next one, which shifts all later batches. The
            # shifted batches are evaluated in another round.
            if len(dataset.skipped) == skipped and collected.missing(batches):
                raise RuntimeError("a process returned other images than it was given")


class _Collected:
    """The results of all processes so far.

    Attributes:
        workers: the processes that took part.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.workers: set[str] = set()
        self._dataset = dataset
        self._done: dict[tuple[int, ...], BatchRun] = {}

    def add(self, result: UnitRun) -> int:
        """Add the result of a work unit, and return its number of images, read or skipped."""
        for file, reason in result.skipped:
            self._dataset.skip([file], reason)
        self._done.update((run.image_ids, run) for run in result.runs)
        self.workers.add(result.worker)
        return sum(len(run.image_ids) for run in result.runs) + len(result.skipped)

    def missing(self, batches: Sequence[tuple[ImageRecord, ...]]) -> list[tuple[ImageRecord, ...]]:
        return [batch for batch in batches if _ids(batch) not in self._done]

    def in_order(self, batches: Sequence[tuple[ImageRecord, ...]]) -> list[BatchRun]:
        return [self._done[_ids(batch)] for batch in batches]


def _batches(dataset: Dataset, limit: int | None, batch_size: int) -> list[tuple[ImageRecord, ...]]:
    unreadable = set(dataset.skipped)
    records = [record for record in dataset.records if record.file not in unreadable][:limit]
    return [tuple(records[at : at + batch_size]) for at in range(0, len(records), batch_size)]


def _units(
    batches: Sequence[tuple[ImageRecord, ...]], batch_size: int, shards: int
) -> Iterator[tuple[ImageRecord, ...]]:
    """Group consecutive batches into work units and yield the records of each."""
    size = max(1, min(_UNIT_IMAGES // batch_size, len(batches) // (shards * _UNITS_EACH)))
    for at in range(0, len(batches), size):
        yield tuple(
            replace(record, file=os.path.abspath(record.file)) for batch in batches[at : at + size] for record in batch
        )


def _ids(batch: Sequence[ImageRecord]) -> tuple[int, ...]:
    return tuple(record.image_id for record in batch)


def _absolute(model: Artifact) -> Artifact:
    if isinstance(model, ModelFile):
        return replace(model, path=model.path.absolute())
    assert isinstance(model, InferenceModel)
    return replace(model, directory=model.directory.absolute())
