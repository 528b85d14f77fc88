"""The records that a report is made from, and which of their rows belong to the reported models."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import (
    ACT_FILENAME,
    ACT_SCHEMA,
    ANALYSIS_FILENAME,
    ANALYSIS_SCHEMA,
    BENCHMARK_SCHEMA,
    read_record,
)
from act_pipeline.evaluation import DETECTIONS_FILENAME, EVAL_SCHEMA, Detections, load_detections

HALF_PRECISIONS = ("fp16", "bf16")

_ACT_KEYS = ("strategy", "fp32", "int8", "map_drop", "seconds")
_EVAL_KEYS = ("engine", "precision", "device", "map", "map50", "latency_ms", "model_bytes")


def _whole(path: str | os.PathLike[str], schema: str, keys: Sequence[str]) -> dict[str, Any]:
    record = read_record(path, schema)
    missing = [key for key in keys if key not in record]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, expected a whole {schema}; delete it and run again")
    return record


@dataclass
class Sources:
    """The records found.

    Attributes:
        artifact: the folder of the INT8 model.
        act: content of ``act.json``.
        evals: contents of ``eval.json`` files.
        benchmark: content of ``benchmark.json``, or None.
        analysis: content of ``analysis.json``, or None.
        detections: detections of ``fp32`` and ``int8``, or None.
        files: file names of the records.
    """

    artifact: Path
    act: dict[str, Any]
    evals: list[dict[str, Any]] = field(default_factory=list)
    benchmark: dict[str, Any] | None = None
    analysis: dict[str, Any] | None = None
    detections: Detections | None = None
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(
        cls,
        artifact: Path,
        evals: Sequence[str | os.PathLike[str]] = (),
        analysis: str | os.PathLike[str] | None = None,
        benchmark: str | os.PathLike[str] | None = None,
    ) -> Sources:
        """Read the records in a model's folder, and the given ones.

        Args:
            artifact: the folder of the INT8 model.
            evals: ``eval.json`` files.
            analysis: an ``analysis.json``; None for the one in the folder, if any.
            benchmark: a ``benchmark.json``; None for none.

        Raises:
            UserError: ``act.json`` or a given file is missing or has other content.
        """
        found = cls(artifact, _whole(artifact / ACT_FILENAME, ACT_SCHEMA, _ACT_KEYS), files=[ACT_FILENAME])
        for path in evals:
            found.evals.append(_whole(path, EVAL_SCHEMA, _EVAL_KEYS))
            found.files.append(Path(path).name)
        if benchmark is not None:
            found.benchmark = read_record(benchmark, BENCHMARK_SCHEMA)
            found.files.append(Path(benchmark).name)
        beside = artifact / ANALYSIS_FILENAME
        if analysis is not None or beside.is_file():
            found.analysis = read_record(analysis if analysis is not None else beside, ANALYSIS_SCHEMA)
            found.files.append(Path(analysis if analysis is not None else beside).name)
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

    def engine_rows(self) -> list[dict[str, Any]]:
        """Return a row for every measurement of an engine, benchmark rows first.

        Returns:
            dicts with ``engine``, ``precision``, ``device``, ``label``, ``own`` (one of the two reported models, not
            one of another tool), ``map``, ``map50``, ``stats``, ``bytes``, ``latency_ms`` (or None), ``speed_ratio``
            (to the same engine in FP32, or None), ``batch_size``, ``together`` (equal for rows timed in one run, None
            for evaluations) and ``failure``.
        """
        rows = [self._benchmark_row(row) for row in (self.benchmark or {}).get("rows", ())]
        seen = {(row["engine"], row["precision"], row["device"]) for row in rows if row["own"] and not row["failure"]}
        for record in self.evals:
            row = self._eval_row(record)
            timed = next((other for other in rows if _same(other, row) and other["own"] and row["own"]), None)
            if timed is not None and _same_key(row) in seen:
                # The benchmark's interleaved timings are preferred; the evaluation adds only missing scores.
                timed["stats"] = timed["stats"] or row["stats"]
                continue
            rows.append(row)
        for row in rows:
            if row["speed_ratio"] is None and row["together"] is None and row["latency_ms"]:
                base = next(
                    (
                        other for other in rows
                        if other["together"] is None and other["own"] and other["precision"] == "fp32"
                        and other["latency_ms"] and (other["engine"], other["device"], other["batch_size"])
                        == (row["engine"], row["device"], row["batch_size"])
                    ),
                    None,
                )  # fmt: skip
                if base is not None:
                    row["speed_ratio"] = round(base["latency_ms"]["p50"] / row["latency_ms"]["p50"], 4)
        return rows

    def timed_by_compression(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return FP32 and INT8 as timed by the compression in interleaved rounds with one image per run.

        The engines of the two differ if INT8's engine has no float precision.

        Returns:
            two rows as in :meth:`engine_rows`, without ``label``, ``map50``, ``stats`` and ``bytes``; None if
            ``act.json`` has no such timings.
        """
        timed, judged = self.act.get("latency"), self.act.get("evaluation") or {}
        if not timed:
            return None

        def row(precision: str, engine: str | None, ratio: float) -> dict[str, Any]:
            return {
                "engine": engine,
                "precision": precision,
                "device": judged.get("device"),
                "own": True,
                "map": (self.act.get(precision) or {}).get("map"),
                "latency_ms": {"p50": timed[precision]["p50_ms"], "p90": timed[precision]["p90_ms"]},
                "speed_ratio": ratio,
                "batch_size": 1,
                "together": 1,
                "failure": None,
            }

        engine = judged.get("engine")
        return row("fp32", judged.get("fp32_engine") or engine, 1.0), row("int8", engine, timed["ratio"])

    def _benchmark_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        precision = row["precision"]
        models = self.benchmark["models"] if self.benchmark else {}
        model = models.get("int8" if precision == "int8" else "fp32") or {}
        ratio = row.get("ratio_to_fp32")
        return {
            "engine": row["engine"],
            "precision": precision,
            "device": row["device"],
            "label": row["label"],
            "own": row["label"] == f"{row['engine']} {precision}" and self._is_own(model, precision, "path", "hash"),
            "map": row.get("map"),
            "map50": row.get("map50"),
            "stats": None,
            "bytes": row.get("model_bytes"),
            "latency_ms": row.get("latency_ms"),
            "speed_ratio": ratio["by_round"] if ratio else None,
            "batch_size": (self.benchmark or {}).get("settings", {}).get("batch_size"),
            "together": 0,
            "failure": row.get("failure"),
        }

    def _eval_row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        precision, own = record["precision"], self._is_own(record, record["precision"], "model", "model_hash")
        label = f"{record['engine']} {precision}"
        if not own and record.get("model"):
            label += f" ({os.path.basename(os.path.normpath(record['model']))})"
        return {
            "engine": record["engine"],
            "precision": precision,
            "device": record["device"],
            "label": label,
            "own": own,
            "map": record.get("map"),
            "map50": record.get("map50"),
            "stats": record.get("stats"),
            "bytes": record.get("model_bytes"),
            # Engines that ran in parallel are slower than a single one.
            "latency_ms": record.get("latency_ms") if record.get("shards", 1) == 1 else None,
            "speed_ratio": None,
            "batch_size": record.get("batch_size"),
            "together": None,
            "failure": None,
        }

    def _is_own(self, model: Mapping[str, Any], precision: str, path_key: str, hash_key: str) -> bool:
        """Return whether a record is of this INT8 model, or of the float model that it was made from.

        An exported ONNX file has its own hash; then the folder that it was exported from decides.
        """
        int8 = precision == "int8"
        expected = self.act.get("model_hash" if int8 else "source_hash")
        if model.get(hash_key) == expected and expected is not None:
            return True
        if path_key == "path" or model.get("artifact") == model.get("model"):
            return False  # the hash is of the model itself and differs
        directory = self.artifact if int8 else (self.act.get("config", {}).get("Global") or {}).get("model_dir")
        named = model.get(path_key)
        if not directory or not named:
            return False
        return Path(directory).resolve().name == Path(named).resolve().name


def _same_key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["engine"], row["precision"], row["device"]


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return _same_key(first) == _same_key(second)


def fastest_pair(
    rows: Sequence[Mapping[str, Any]], compression: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Return FP32 and INT8 in the engine that runs INT8 fastest, of those that timed both in the same way; or None.

    Args:
        rows: the output of :meth:`Sources.engine_rows`.
        compression: the output of :meth:`Sources.timed_by_compression`. In the same engine, a benchmark with its larger
            number of rounds has priority over it, and it has priority over two evaluations, which ran at different
            times.
    """
    timed = [row for row in rows if row["own"] and row["latency_ms"] and not row["failure"]]
    pairs = [
        (fp32, int8)
        for int8 in timed if int8["precision"] == "int8" and int8["speed_ratio"] is not None
        for fp32 in timed if fp32["precision"] == "fp32" and fp32["together"] == int8["together"]
        and (fp32["engine"], fp32["device"], fp32["batch_size"])
        == (int8["engine"], int8["device"], int8["batch_size"])
    ]  # fmt: skip
    if compression is not None:
        same = [pair for pair in pairs if _same(pair[1], compression[1])]
        if all(pair[1]["together"] is None for pair in same):
            pairs = [*(pair for pair in pairs if pair not in same), compression]
    return min(pairs, key=lambda pair: pair[1]["latency_ms"]["p50"], default=None)
