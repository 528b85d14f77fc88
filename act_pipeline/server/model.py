"""A model for a worker: prepared once, with whatever that needs, then loaded by its runtime alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np

from act_pipeline.core.artifacts import Artifact, InferenceModel, PlanModel
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
from act_pipeline.engines import Engine, Machine, create_engine, fastest_engine, inspect_artifact, machine
from act_pipeline.engines.interface import AUTO_REQUESTS, parallel_requests
from act_pipeline.engines.registry import find_runtime, find_support
from act_pipeline.server.items import Found, Item, Outcome, Prepared, Refused
from act_pipeline.server.network_inputs import batch_of, prepared_item
from act_pipeline.server.pictures import BadPicture
from act_pipeline.server.settings import Limits
from act_pipeline.serving.version import PLAN_FILENAME


@dataclass(frozen=True)
class ServedModel:
    """What a worker needs to load and feed a model.

    Attributes:
        artifact: what the runtime loads.
        engine, precision, device: the engine, as ``--engine=auto`` chooses it here.
        why: the reason for it, one line.
        input_size: height and width of the network's input, pixels.
        steps: the preprocessing of pictures.
        classes: names by class index; empty: not known.
        constants: inputs that are the same for every image, name -> [1, ...].
        fixed_batch: the batch that the graph has; None: any.
        here: what this machine has, so that a worker need not look, which would load Paddle.
    """

    artifact: Artifact
    engine: str
    precision: str
    device: str
    why: str
    here: Machine
    input_size: tuple[int, int]
    steps: Sequence[dict[str, Any]]
    classes: Sequence[str] = ()
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    fixed_batch: Optional[int] = None

    def load(self, threads: int, max_batch: int, limits: Limits) -> LoadedModel:
        """Load it into this process; for the arguments and errors see :class:`LoadedModel`."""
        return LoadedModel(self, threads, max_batch, limits)


def served_model(folder: str | Path) -> ServedModel:
    """Choose the engine of a model, export what it loads, and read its preprocessing; imports Paddle where needed.

    Args:
        folder: a model folder, float or INT8.

    Raises:
        UserError: the model is damaged, nothing here can run it, it needs more than a picture, or its preprocessing is
            not recorded.
    """
    from act_pipeline.bundle.description import device_steps
    from act_pipeline.data.model_fit import constant_inputs, prompts_of

    model = InferenceModel.load(folder)
    summary = inspect_artifact(model)
    if prompts_of(model) is not None:
        raise UserError(
            f"{model.directory} segments what is in a box, expected a detector: its input is a picture alone"
        )
    precision = "int8" if summary.quantized else "fp32"
    here = machine()
    engine, device, why = fastest_engine(precision, here=here)
    chosen: Artifact = model
    kept = model.directory / PLAN_FILENAME
    if kept.is_file():
        runs = find_support("tensorrt", precision, "GPU", here)
        if runs.available:
            chosen, engine, device, why = PlanModel.load(kept), "tensorrt", "GPU", "the plan of the version"
        else:
            why = f"{why}; its plan is left aside: {runs.why}"
    reader = recorded_reader(model)
    if summary.input_size is not None and tuple(reader.input_size) != tuple(summary.input_size):
        reader = reader.with_input_size(*summary.input_size)
    described = summary if chosen is model else None
    with contextlib.closing(create_engine(engine, chosen, precision, device, 1, summary=described)) as loaded:
        artifact = loaded.artifact
    batch = inspect_artifact(artifact).inputs["image"][0]
    return ServedModel(
        artifact=artifact,
        engine=engine,
        precision=precision,
        device=device,
        why=why,
        here=here,
        input_size=(int(reader.input_size[0]), int(reader.input_size[1])),
        steps=device_steps(reader),
        classes=model.class_names(),
        constants=constant_inputs(model),
        fixed_batch=int(batch) if batch > 0 else None,
    )


def recorded_reader(model: InferenceModel) -> Any:
    """Return the reader that is recorded with a model: in its infer_cfg.yml, otherwise named in its act.json."""
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import reader_of_model

    if model.infer_cfg().get("Preprocess"):
        return reader_of_model(model, Reader.load(find_shipped(DEFAULT_READER)))
    with contextlib.suppress(UserError, KeyError, TypeError):
        return Reader.load(read_record(model.directory / ACT_FILENAME, ACT_SCHEMA)["config"]["Global"]["reader_config"])
    raise UserError(
        f"{model.infer_cfg_path} has no Preprocess, and {ACT_FILENAME} names no reader that is there: how to prepare a "
        "picture is not known; export the model again"
    )


class LoadedModel:
    """A model in its engine, for batches of any size; several threads may call :meth:`run`.

    On a CPU a batch in one tensor is no faster than its images one by one (RT-DETR-R18, OpenVINO), and each size takes
    memory of its own. Where the runtime computes several requests at the same time, the images of a batch are such
    requests; a single image gets all threads. Other runtimes get the batch.

    Attributes:
        sizes: the batch sizes that are computed, the largest first; :meth:`warm` adds the larger ones.
        parallel: how many images of a batch are computed at the same time; 1 until :meth:`warm` has ended.
    """

    def __init__(self, model: ServedModel, threads: int, max_batch: int, limits: Limits) -> None:
        """Load the model for the smallest batch.

        Args:
            model: the model.
            threads: number of CPU threads.
            max_batch: the largest batch.
            limits: what is refused.

        Raises:
            UserError: the runtime refuses the model.
        """
        self._model, self._limits = model, limits
        self._threads, self._max_batch = threads, max_batch
        self.sizes = batch_sizes(max_batch, model.fixed_batch)[-1:]
        self.parallel = 1
        self._lock = threading.Lock()
        self._engine = self._load(self.sizes)
        self._streams: Optional[Engine] = None
        self._pool: Optional[ThreadPoolExecutor] = None

    def warm(self) -> None:
        """Load the model for the larger batches too, which may take seconds; :meth:`run` goes on meanwhile.

        Raises:
            UserError: the runtime refuses it; images are computed one by one then.
        """
        model, largest = self._model, batch_sizes(self._max_batch, self._model.fixed_batch)
        if self._max_batch == 1 or self._streams is not None:
            return
        if find_runtime(model.engine).requests and model.device == "CPU" and model.fixed_batch in (None, 1):
            engine = self._load([1], requests=AUTO_REQUESTS)
            self.parallel = parallel_requests(engine)
            # While these compute, the pictures of others are decoded.
            self._pool = ThreadPoolExecutor(2 * self.parallel, thread_name_prefix="images")
            self._streams = engine
            return
        if self.sizes == largest:
            return
        engine = self._load(largest)
        with self._lock:
            before, self._engine, self.sizes = self._engine, engine, largest
        before.close()

    def run(self, items: Sequence[Item]) -> list[Outcome]:
        """Detect objects on images; a wrong one is refused and does not concern the others."""
        if len(items) > 1 and self._streams is not None and self._pool is not None:
            return list(self._pool.map(self._run_alone, items))
        outcomes: list[Outcome] = [Refused("")] * len(items)
        ready: list[tuple[int, tuple[Prepared, np.ndarray]]] = []
        for place, item in enumerate(items):
            try:
                ready.append((place, prepared_item(self._model, item, self._limits)))
            except BadPicture as error:
                outcomes[place] = Refused(str(error))
        start = 0
        with self._lock:
            for size in chunks(len(ready), self.sizes):
                part = ready[start : start + size]
                start += len(part)
                found = self._detect(self._engine, [sample for _, sample in part], size)
                for (place, _), outcome in zip(part, found):
                    outcomes[place] = outcome
        return outcomes

    def close(self) -> None:
        """Free the model."""
        if self._pool is not None:
            self._pool.shutdown()
        with self._lock:
            self._engine.close()
            if self._streams is not None:
                self._streams.close()

    def _run_alone(self, item: Item) -> Outcome:
        assert self._streams is not None
        try:
            return self._detect(self._streams, [prepared_item(self._model, item, self._limits)], 1)[0]
        except BadPicture as error:
            return Refused(str(error))

    def _load(self, sizes: Sequence[int], **options: Any) -> Engine:
        """Return the engine, which has run once at each of the batch sizes: some compile a size when it first comes."""
        model, blank = self._model, Prepared(np.zeros((3, *self._model.input_size), np.float32))
        engine = create_engine(
            model.engine,
            model.artifact,
            model.precision,
            model.device,
            self._threads,
            batch_size=sizes[0],
            machine=model.here,
            **options,
        )
        for size in sizes:
            engine.run(batch_of(model, [(blank, np.zeros(2, np.float32))] * size))
        return engine

    def _detect(self, engine: Engine, samples: list[tuple[Prepared, np.ndarray]], size: int) -> list[Outcome]:
        blank = [samples[-1]] * (size - len(samples))  # a fixed batch is filled up
        batch = batch_of(self._model, [*samples, *blank])
        started = time.perf_counter()
        try:
            outputs = engine.run(batch)
        except UserError as error:
            return [Refused(str(error), by_client=False)] * len(samples)
        taken = (time.perf_counter() - started) * 1000
        ends = np.cumsum(outputs["bbox_num"])[: len(samples)]
        rows = np.split(outputs["bbox"], ends)[: len(samples)]
        return [Found(np.asarray(part, np.float32), taken / len(samples)) for part in rows]


def batch_sizes(largest: int, fixed: Optional[int]) -> list[int]:
    """Return the batch sizes that are computed, the largest first: powers of 2, so that each is compiled at the start.

    Args:
        largest: the largest batch.
        fixed: the only batch of the graph; None: any.
    """
    if fixed is not None:
        return [fixed]
    return sorted(
        {largest, *(1 << power for power in range(largest.bit_length()) if 1 << power <= largest)}, reverse=True
    )


def chunks(count: int, sizes: Sequence[int]) -> list[int]:
    """Return the batch sizes in which ``count`` images are computed; only the last may be filled up."""
    found = []
    while count > 0:
        size = next((size for size in sizes if size <= count), sizes[-1])
        found.append(size)
        count -= size
    return found
