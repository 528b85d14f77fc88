"""The requested benchmark, and which of its engines this machine can run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from act_pipeline.benchmark.worker import CreateEngine
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, PLAN_SUFFIXES, InferenceModel, PlanModel
from act_pipeline.core.command_names import name_commands
from act_pipeline.core.defaults import DEFAULT_MODELS, find_shipped
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.engines import ENGINES, PRECISIONS, Machine, create_engine, inspect_artifact, support
from act_pipeline.engines.device import engine_device
from act_pipeline.engines.interface import EngineSupport
from act_pipeline.graph.model_files import ModelSummary, inspect_model

MIN_REPEATS, QUICK_REPEATS = 50, 10
# With --throughput: a round has many runs of each engine.
MIN_BURSTS, QUICK_BURSTS = 10, 3
# Paddle Inference without TensorRT. Which of the two is faster depends on the model and the CPU. Ratios to "Paddle"
# refer to the faster one that ran, which is named.
PADDLE_INFERENCE = ("paddle", "paddle_onednn")
# Computes INT8 in float, to evaluate models; timed on request only.
NOT_DEPLOYED = ("int8_reference",)
PEERS = ("nncf", "nncf_accuracy_control")
BenchmarkedModel = Union[InferenceModel, PlanModel]


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to compare and how; the fields are the flags of ``deploy/benchmark.py``.

    Attributes:
        model_path: folder of the FP32 model, or a TensorRT plan; None for the sample's, unless ``int8_model_path`` is
            given.
        int8_model_path: folder of the INT8 model, or a plan; None for the sample's, unless ``model_path`` is given.
        model_filename: file name of the program in both.
        params_filename: file name of the parameters in both.
        reader_config: the reader YAML; None for the sample's.
        engines: engine names; None for all available ones.
        reference: whether to include ``int8_reference`` if ``engines`` is None.
        precisions: precision names; None for all that an engine supports.
        device: ``auto`` (a GPU if an engine can use one), ``CPU`` or ``GPU``.
        cpu_threads: CPU threads of every engine; None for all CPUs available to this process.
        batch_size: images per run.
        warmup: runs of each engine before the first round.
        repeats: number of rounds, in each of which every engine runs once; None for 50, or 10 with ``quick``. With
            ``throughput`` for each load: None for 10, or 3 with ``quick``.
        quick: allow fewer rounds.
        random: use random input instead of the data set's images.
        no_map: do not evaluate.
        limit: evaluate the first so many images of the data set; None for all.
        peer: ``nncf``: an additional row for NNCF's post-training INT8 of the FP32 model in OpenVINO;
            ``nncf_accuracy_control``: the same with ops reverted to float until the mAP drop on the eval split is
            within ``peer_max_drop``.
        peer_images: number of images of the train split for NNCF's calibration.
        peer_max_drop: the allowed mAP drop for ``nncf_accuracy_control``.
        work_dir: folder in which NNCF's model is kept; None to delete it.
        seed: of the order of the engines within the rounds.
        json: where to write the record.
        chart: where to draw the chart, ``.png``.
        throughput: measure images per second under load, at each of ``batches`` and ``requests``, instead of the
            latency of single runs; there is no mAP.
        batches: batch sizes; None for 1, 2, 4 and 8, or the model's if its batch is fixed.
        requests: numbers of parallel requests, ``AUTO_REQUESTS`` for the number that the runtime recommends; None for
            some from 1 to twice the number of threads. Engines that run one request at a time are measured at 1.
        burst_seconds: how long each engine runs in each round.
    """

    model_path: str | None = None
    int8_model_path: str | None = None
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME
    reader_config: str | None = None
    engines: tuple[str, ...] | None = None
    reference: bool = False
    precisions: tuple[str, ...] | None = None
    device: str = "auto"
    cpu_threads: int | None = None
    batch_size: int = 1
    warmup: int = 5
    repeats: int | None = None
    quick: bool = False
    random: bool = False
    no_map: bool = False
    limit: int | None = None
    peer: str | None = None
    peer_images: int = 200
    peer_max_drop: float = 0.005
    work_dir: str | None = None
    seed: int = 0
    json: str | None = None
    chart: str | None = None
    throughput: bool = False
    batches: tuple[int, ...] | None = None
    requests: tuple[int, ...] | None = None
    burst_seconds: float = 2.0

    @property
    def evaluated(self) -> bool:
        """Whether every row is evaluated for its mAP."""
        return not (self.no_map or self.throughput)

    @property
    def min_rounds(self) -> int:
        """The smallest number of rounds without ``quick``."""
        return MIN_BURSTS if self.throughput else MIN_REPEATS

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        quick = QUICK_BURSTS if self.throughput else QUICK_REPEATS
        return self.repeats or (quick if self.quick else self.min_rounds)

    def check(self) -> None:
        """Check the request before anything is loaded.

        Raises:
            UserError: a name is unknown, there are too few rounds, or ``chart`` is not a ``.png``.
        """
        for what, names, known in (("engine", self.engines, ENGINES), ("precision", self.precisions, PRECISIONS)):
            for name in names or ():
                if name not in known:
                    raise UserError(
                        f"unknown {what} {name!r}, expected some of {', '.join(known)}{suggest(name, known)}"
                    )
        if self.peer is not None and self.peer not in PEERS:
            raise UserError(f"unknown peer {self.peer!r}, expected {', '.join(PEERS)}{suggest(self.peer, PEERS)}")
        if self.rounds < self.min_rounds and not self.quick:
            raise UserError(
                f"--repeats={self.rounds} is too few for a figure to rely on, expected at least {self.min_rounds}; add "
                "--quick for a look"
            )
        if self.throughput and self.batch_size != 1:
            raise UserError(
                f"--batch_size={self.batch_size} is for latencies, --throughput takes --batches={self.batch_size}"
            )
        for flag, given in (("batches", self.batches), ("requests", self.requests)):
            if given is not None and not self.throughput:
                raise UserError(f"--{flag} is for --throughput, which is not given; add it, or leave --{flag} out")
        if self.chart is not None and Path(self.chart).suffix.lower() != ".png":
            raise UserError(f"--chart={self.chart}: expected a name that ends in .png")


@dataclass(frozen=True)
class Models:
    """The two compared models, of which at least one is present.

    Attributes:
        float_: the model for ``fp32``, ``fp16`` and ``bf16``.
        int8: the model for ``int8``.
        note: what is missing and why, or None.
        summaries: ``float`` or ``int8`` -> summary of the model's files.
    """

    float_: BenchmarkedModel | None
    int8: BenchmarkedModel | None
    note: str | None = None
    summaries: Mapping[str, ModelSummary] = field(default_factory=dict)

    @classmethod
    def of(cls, request: BenchmarkRequest) -> Models:
        """Open the models of a request, or the sample's two if it names none.

        Raises:
            UserError: a named folder is missing, the sample was not made, or the models do not fit their roles or each
                other.
        """

        def load(path: str | Path | None) -> BenchmarkedModel | None:
            if path is not None and Path(path).suffix in PLAN_SUFFIXES:
                return PlanModel.load(path)
            return None if path is None else InferenceModel.load(path, request.model_filename, request.params_filename)

        if request.model_path is None and request.int8_model_path is None:
            folders = {kind: find_shipped(path) for kind, path in DEFAULT_MODELS.items()}
            missing = [kind for kind, path in folders.items() if not path.exists()]
            if "float" in missing:
                raise UserError(
                    f"model folder {DEFAULT_MODELS['float']} does not exist; run `make demo`, which makes it, or give "
                    "--model_path (and --int8_model_path)"
                )
            note = None
            if missing:
                note = name_commands(f"{DEFAULT_MODELS['int8']} does not exist: no int8 rows; `make demo` makes it")
            return cls._inspected(load(folders["float"]), None if missing else load(folders["int8"]), note)
        note = None
        if request.int8_model_path is None:
            note = "no --int8_model_path: float rows only"
        elif request.model_path is None:
            note = "no --model_path: int8 rows only, and no ratios to fp32"
        return cls._inspected(load(request.model_path), load(request.int8_model_path), note)

    @classmethod
    def _inspected(cls, float_: BenchmarkedModel | None, int8: BenchmarkedModel | None, note: str | None) -> Models:
        given = {name: model for name, model in (("float", float_), ("int8", int8)) if model is not None}
        found: dict[str, Any] = {
            name: inspect_artifact(model) if isinstance(model, PlanModel) else inspect_model(model)
            for name, model in given.items()
        }
        if float_ is not None and found["float"].quantized:
            raise UserError(f"{float_.directory} is an INT8 model, expected an FP32 one; give it as --int8_model_path")
        if int8 is not None and not found["int8"].quantized:
            raise UserError(
                f"{int8.directory} holds no INT8 scales, expected an INT8 model; compress it with tools/compress.py, "
                "or give it as --model_path"
            )
        sizes = {name: summary.input_size for name, summary in found.items()}
        if float_ is not None and int8 is not None and sizes["float"] != sizes["int8"]:
            raise UserError(
                f"{float_.directory} takes images of {sizes['float']}, {int8.directory} of {sizes['int8']} (height, "
                "width); expected the INT8 model that was made of the FP32 one"
            )
        return cls(float_, int8, note, found)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the input in pixels; None if dynamic."""
        return next(iter(self.summaries.values())).input_size

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the models take; None if it is dynamic."""
        shape = next(iter(self.summaries.values())).inputs.get("image", ())
        return shape[0] if shape and shape[0] > 0 else None

    def for_precision(self, precision: str) -> BenchmarkedModel | None:
        """Return the model that runs at a precision; None if it was not given."""
        return self.int8 if precision == "int8" else self.float_

    def summary_for(self, precision: str) -> ModelSummary | None:
        """Return the summary of the model that runs at a precision; None if it was not given."""
        return self.summaries.get("int8" if precision == "int8" else "float")


@dataclass(frozen=True)
class Candidate:
    """A planned row of the benchmark.

    Attributes:
        label: ``<engine> <precision>``.
        engine, precision, device: of the engine.
        model: the model that the engine loads.
        how: how the engine computes.
        refusal: why it cannot run; None if it is tried.
        create: creates the engine in another process.
        made_seconds: duration of making the model, for those of another tool.
    """

    label: str
    engine: str
    precision: str
    device: str
    model: Any
    how: str = ""
    refusal: str | None = None
    create: CreateEngine | None = None
    made_seconds: float | None = None


def _loads(entry: EngineSupport, model: BenchmarkedModel | None) -> bool:
    """Return whether an engine can load a model: only TensorRT loads plans."""
    return entry.engine == "tensorrt" or not isinstance(model, PlanModel)


def _by_default(entry: EngineSupport, request: BenchmarkRequest) -> bool:
    return request.reference or entry.engine not in NOT_DEPLOYED


def candidates(
    request: BenchmarkRequest, models: Models, threads: int, here: Machine, create: Any = create_engine
) -> tuple[list[Candidate], list[str]]:
    """Return the planned rows, and notes on what is left out and why.

    A requested engine that cannot run becomes a row with the reason; one that was not requested becomes a note.

    Args:
        request: the request.
        models: the models.
        threads: number of CPU threads.
        here: this machine, or a substitute for tests.
        create: a function with the signature of :func:`act_pipeline.engines.create_engine`.

    Raises:
        UserError: nothing that was requested can run on this machine.
    """
    entries = support(here)
    requested = (entry for entry in entries if request.engines is None or entry.engine in request.engines)
    device = engine_device(request.device, requested)
    wanted = [
        entry
        for entry in entries
        if entry.device == device
        and (entry.engine in request.engines if request.engines is not None else _by_default(entry, request))
        and (request.precisions is None or entry.precision in request.precisions)
        and models.for_precision(entry.precision) is not None
        and _loads(entry, models.for_precision(entry.precision))
    ]
    found = []
    absent: dict[str, list[EngineSupport]] = {}
    for entry in wanted:
        if not entry.available and request.engines is None:
            absent.setdefault(f"{entry.engine}: {entry.why}; {entry.remedy}", []).append(entry)
            continue
        model = models.for_precision(entry.precision)
        found.append(
            Candidate(
                label=f"{entry.engine} {entry.precision}",
                engine=entry.engine,
                precision=entry.precision,
                device=device,
                model=model,
                how=entry.why if entry.available else "",
                refusal=None if entry.available else f"{entry.why}; {entry.remedy}",
                create=functools.partial(
                    create,
                    entry.engine,
                    model,
                    entry.precision,
                    device,
                    threads,
                    # Passed on, since detecting these again would import Paddle in every engine's process.
                    batch_size=request.batch_size,
                    machine=here,
                    summary=models.summary_for(entry.precision),
                ),
            )
        )
    if not any(candidate.refusal is None for candidate in found):
        raise UserError(_nothing_runs(request, models, device, found, list(absent)))
    notes = [f"not here: {' and '.join(entry.precision for entry in rows)} in {why}" for why, rows in absent.items()]
    for name in request.engines or ():
        if not any(candidate.engine == name for candidate in found):
            has = sorted({f"{entry.precision} on {entry.device}" for entry in entries if entry.engine == name})
            notes.append(f"{name} has none of what is asked for on the {device}; it has {', '.join(has)}")
    return found, notes


def _nothing_runs(
    request: BenchmarkRequest, models: Models, device: str, refused: Sequence[Candidate], absent: Sequence[str]
) -> str:
    reasons = [f"{candidate.label}: {candidate.refusal}" for candidate in refused] or list(absent)
    if reasons:
        return f"no engine can run here on the {device}: {reasons[0]}"
    if request.precisions == ("int8",) and models.int8 is None:
        return "no INT8 model to run: give --int8_model_path, or leave --precisions out"
    asked = " ".join(
        f"--{name}={','.join(values)}"
        for name, values in (("engines", request.engines), ("precisions", request.precisions))
        if values
    )
    return f"no engine has what is asked for on the {device} ({asked}); `make doctor` lists what runs here"
