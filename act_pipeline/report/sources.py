"""The records that a report is made from, and which of their rows belong to the reported models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from act_pipeline.benchmark.rows import BenchmarkRecord, Row
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import (
    ACT_FILENAME,
    ACT_SCHEMA,
    ANALYSIS_FILENAME,
    ANALYSIS_SCHEMA,
    BENCHMARK_SCHEMA,
    SEARCH_FILENAME,
    SEARCH_SCHEMA,
    read_record,
)
from act_pipeline.evaluation import DETECTIONS_FILENAME, EVAL_SCHEMA, Detections, load_detections
from act_pipeline.evaluation.act_candidates import ModelFigures
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.act_measurements import ImageLatency
from act_pipeline.evaluation.result import EvalRecord

HALF_PRECISIONS = ("fp16", "bf16")

_ACT_KEYS = ("strategy", "fp32", "int8", "map_drop", "seconds")
_EVAL_KEYS = ("engine", "precision", "device", "map", "map50", "latency_ms", "model_bytes")


def _whole(path: str | os.PathLike[str], schema: str, keys: Sequence[str]) -> dict[str, Any]:
    record = read_record(path, schema)
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, expected a whole {schema}; delete it and run again")
    return record


@dataclass(frozen=True)
class EngineRow:
    """A measurement of an engine; what was not measured is None.

    Attributes:
        label: name of the row.
        engine, precision, device: of the engine.
        own: whether it ran one of the two reported models, not one of another tool or run.
        map, map50, stats: scores, see :class:`act_pipeline.evaluation.result.Evaluation`.
        bytes: size of what the engine loaded.
        latency_ms: percentiles, at least ``p50``.
        speed_ratio: how many times as fast as the same engine in FP32.
        batch_size: images per run.
        together: equal for rows that were timed in one run; None for evaluations.
        failure: why the engine did not run.
    """

    label: str
    engine: str | None
    precision: str
    device: str | None
    own: bool
    map: float | None = None
    map50: float | None = None
    stats: Mapping[str, float | None] | None = None
    bytes: int | None = None
    latency_ms: Mapping[str, float] | None = None
    speed_ratio: float | None = None
    batch_size: int | None = None
    together: int | None = None
    failure: str | None = None

    @property
    def p50(self) -> float | None:
        """The median latency in ms."""
        return self.latency_ms["p50"] if self.latency_ms else None

    def measures(self, other: EngineRow) -> bool:
        """Return whether both are of the same engine, precision and device."""
        return (self.engine, self.precision, self.device) == (other.engine, other.precision, other.device)

    def same_setting(self, other: EngineRow) -> bool:
        """Return whether both are of the same engine, device and batch size."""
        return (self.engine, self.device, self.batch_size) == (other.engine, other.device, other.batch_size)


# FP32 and INT8, timed in the same way.
EnginePair = tuple[EngineRow, EngineRow]


@dataclass
class Sources:
    """The records found.

    Attributes:
        artifact: the folder of the INT8 model.
        act: ``act.json``.
        evals: the given ``eval.json`` files.
        benchmark: the given ``benchmark.json``, or None.
        analysis: content of ``analysis.json``, or None.
        search: content of ``search.json``, or None.
        detections: detections of ``fp32`` and ``int8``, or None.
        files: file names of the records.
    """

    artifact: Path
    act: ActRecord
    evals: list[EvalRecord] = field(default_factory=list)
    benchmark: BenchmarkRecord | None = None
    analysis: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    detections: Detections | None = None
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        artifact: Path,
        evals: Sequence[str | os.PathLike[str]] = (),
        analysis: str | os.PathLike[str] | None = None,
        benchmark: str | os.PathLike[str] | None = None,
        search: str | os.PathLike[str] | None = None,
    ) -> Sources:
        """Read the records in a model's folder, and the given ones.

        Args:
            artifact: the folder of the INT8 model.
            evals: ``eval.json`` files.
            analysis: an ``analysis.json``; None for the one in the folder, if any.
            benchmark: a ``benchmark.json``; None for none.
            search: a ``search.json``; None for the one in the folder, if any.

        Raises:
            UserError: ``act.json`` or a given file is missing or has other content, or the search was of another model.
        """
        found = cls(
            artifact,
            ActRecord.from_json(_whole(artifact / ACT_FILENAME, ACT_SCHEMA, _ACT_KEYS)),
            files=[ACT_FILENAME],
        )
        for path in evals:
            found.evals.append(EvalRecord.from_json(_whole(path, EVAL_SCHEMA, _EVAL_KEYS)))
            found.files.append(Path(path).name)
        if benchmark is not None:
            found.benchmark = BenchmarkRecord.from_json(read_record(benchmark, BENCHMARK_SCHEMA))
            found.files.append(Path(benchmark).name)
        beside = artifact / ANALYSIS_FILENAME
        if analysis is not None or beside.is_file():
            found.analysis = read_record(analysis if analysis is not None else beside, ANALYSIS_SCHEMA)
            found.files.append(Path(analysis if analysis is not None else beside).name)
        searched = search if search is not None else artifact / SEARCH_FILENAME
        if search is not None or Path(searched).is_file():
            found.search = read_record(searched, SEARCH_SCHEMA)
            found.files.append(Path(searched).name)
            if found.act.source_hash is not None and found.search.get("model_hash") != found.act.source_hash:
                raise UserError(
                    f"{searched} is of the float model {found.search.get('model')}, expected the one that {artifact} "
                    "was made from; search again with the config of its compression"
                )
        if (artifact / DETECTIONS_FILENAME).is_file():
            detections = load_detections(artifact / DETECTIONS_FILENAME)
            missing = [name for name in ("fp32", "int8") if name not in detections.rows]
            if missing:
                raise UserError(
                    f"{artifact / DETECTIONS_FILENAME} lacks {' and '.join(missing)}, expected fp32 and int8; "
                    "delete it and compress again"
                )
            found.detections = detections
            found.files.append(DETECTIONS_FILENAME)
        return found

    def engine_rows(self) -> list[EngineRow]:
        """Return a row for every measurement of an engine, benchmark rows first."""
        rows = [self._benchmark_row(row, self.benchmark) for row in self.benchmark.rows] if self.benchmark else []
        benchmarked = [row for row in rows if row.own and not row.failure]
        for evaluation in self.evals:
            row = self._eval_row(evaluation)
            timed = next((other for other in rows if other.measures(row) and other.own and row.own), None)
            if timed is not None and any(other.measures(row) for other in benchmarked):
                # The benchmark's interleaved timings are preferred; the evaluation adds only missing scores.
                rows[rows.index(timed)] = replace(timed, stats=timed.stats or row.stats)
                continue
            rows.append(row)
        return [replace(row, speed_ratio=_speed_ratio(row, rows)) for row in rows]

    def timed_by_compression(self) -> EnginePair | None:
        """Return FP32 and INT8 as timed by the compression in interleaved rounds with one image per run.

        The engines of the two differ if INT8's engine has no float precision.

        Returns:
            two rows; None if ``act.json`` has no such timings.
        """
        timed, evaluated = self.act.latency, self.act.evaluation
        if timed is None:
            return None

        def row(precision: str, engine: str | None, model: ModelFigures, one: ImageLatency, ratio: float) -> EngineRow:
            return EngineRow(
                label=f"{engine} {precision}",
                engine=engine,
                precision=precision,
                device=evaluated.device,
                own=True,
                map=model.map,
                latency_ms={"p50": one.p50_ms, "p90": one.p90_ms},
                speed_ratio=ratio,
                batch_size=1,
                together=1,
            )

        return (
            row("fp32", evaluated.fp32_engine or evaluated.engine, self.act.fp32, timed.fp32, 1.0),
            row("int8", evaluated.engine, self.act.int8, timed.int8, timed.ratio),
        )

    def _benchmark_row(self, row: Row, benchmark: BenchmarkRecord) -> EngineRow:
        model = benchmark.int8 if row.precision == "int8" else benchmark.fp32
        ratio = row.ratio_to_fp32
        of_this_package = row.label == f"{row.engine} {row.precision}"
        return EngineRow(
            label=row.label,
            engine=row.engine,
            precision=row.precision,
            device=row.device,
            own=of_this_package and model is not None and self._has_hash(model.hash, row.precision),
            map=row.map,
            map50=row.map50,
            bytes=row.model_bytes,
            latency_ms=row.latency_ms,
            speed_ratio=ratio.by_round if ratio else None,
            batch_size=benchmark.settings.batch_size,
            together=0,
            failure=row.failure,
        )

    def _eval_row(self, found: EvalRecord) -> EngineRow:
        own, label = self._is_own(found), f"{found.engine} {found.precision}"
        if not own and found.model:
            label += f" ({os.path.basename(os.path.normpath(found.model))})"
        return EngineRow(
            label=label,
            engine=found.engine,
            precision=found.precision,
            device=found.device,
            own=own,
            map=found.map,
            map50=found.map50,
            stats=found.stats,
            bytes=found.model_bytes,
            # Engines that ran in parallel are slower than a single one.
            latency_ms=found.latency_ms if found.shards == 1 else None,
            batch_size=found.batch_size,
        )

    def _has_hash(self, content_hash: str | None, precision: str) -> bool:
        expected = self.act.model_hash if precision == "int8" else self.act.source_hash
        return expected is not None and content_hash == expected

    def _is_own(self, found: EvalRecord) -> bool:
        """Return whether an evaluation is of this INT8 model, or of the float model that it was made from.

        An exported ONNX file has its own hash; then the folder that it was exported from decides.
        """
        if self._has_hash(found.model_hash, found.precision):
            return True
        if found.artifact == found.model:
            return False  # the hash is of the model itself and differs
        float_folder = (self.act.config.get("Global") or {}).get("model_dir")
        directory = self.artifact if found.precision == "int8" else float_folder
        if not directory or not found.model:
            return False
        return Path(directory).resolve().name == Path(found.model).resolve().name


def _speed_ratio(row: EngineRow, rows: Sequence[EngineRow]) -> float | None:
    """Return the row's speed ratio; of an evaluation, that to the same engine's FP32 evaluation, if there is one."""
    if row.speed_ratio is not None or row.together is not None or not row.latency_ms:
        return row.speed_ratio
    for other in rows:
        is_float = other.together is None and other.own and other.precision == "fp32"
        if is_float and other.latency_ms and other.same_setting(row):
            return round(other.latency_ms["p50"] / row.latency_ms["p50"], 4)
    return None


def fastest_pair(rows: Sequence[EngineRow], compression: EnginePair | None = None) -> EnginePair | None:
    """Return FP32 and INT8 in the engine that runs INT8 fastest, of those that timed both in the same way; or None.

    Args:
        rows: the output of :meth:`Sources.engine_rows`.
        compression: the output of :meth:`Sources.timed_by_compression`. In the same engine, a benchmark with its larger
            number of rounds has priority over it, and it has priority over two evaluations, which ran at different
            times.
    """
    timed = [row for row in rows if row.own and row.latency_ms and not row.failure]
    pairs = [
        (fp32, int8)
        for int8 in timed if int8.precision == "int8" and int8.speed_ratio is not None
        for fp32 in timed if fp32.precision == "fp32" and fp32.together == int8.together and fp32.same_setting(int8)
    ]  # fmt: skip
    if compression is not None:
        same = [pair for pair in pairs if pair[1].measures(compression[1])]
        if all(pair[1].together is None for pair in same):
            pairs = [*(pair for pair in pairs if pair not in same), compression]
    return min(pairs, key=lambda pair: pair[1].p50 or 0.0, default=None)
