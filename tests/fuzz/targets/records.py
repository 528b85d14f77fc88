"""Records: ``records.read_record``, and those who ask a record whether what lies beside it can be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from act_pipeline.compress.result.saved_result import current_result
from act_pipeline.core.artifacts import INFER_CFG_FILENAME, ONNX_SCHEMA, InferenceModel, OnnxModel
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, ANALYSIS_SCHEMA, SEARCH_SCHEMA, read_record
from act_pipeline.data import builtin_sample
from act_pipeline.demo import _kept_evaluation
from act_pipeline.evaluation import EVAL_SCHEMA
from act_pipeline.export import EXPORT_SCHEMA, _is_current
from act_pipeline.export import RECORD_FILENAME as EXPORT_FILENAME
from act_pipeline.report.variants import variants
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files, raw

_HASH = f"sha256:{'0' * 64}"


class _Reader:
    def fingerprint(self) -> str:
        return _HASH


def _examples(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    for name in ("model.pdmodel", "model.pdiparams", "model.onnx"):
        (folder / name).write_bytes(b"model")
    (folder / INFER_CFG_FILENAME).write_text("label_list: [a]\n")
    names = (EVAL_SCHEMA, ACT_SCHEMA, ANALYSIS_SCHEMA, EXPORT_SCHEMA, ONNX_SCHEMA, SEARCH_SCHEMA, builtin_sample.SCHEMA)
    body = {
        "model_hash": InferenceModel(folder).content_hash(),
        "reader_hash": _HASH,
        "source_hash": _HASH,
        "bytes": 5,
        "map": 0.5,
        "latency_ms": {"p50": 1.0},
        "parameters": {"train": 1},
        "hash": _HASH,
        "versions": {"python": "3"},
        "steps": [{"name": "ptq", "map": 0.5, "chosen": True}],
        "ops": [{"name": "conv", "sensitivity": 0.1}],
        "rows": [
            {"name": "v", "size": [64, 64], "images": 9, "latency_ms": 1.0, "ratio": 1.0, "map": 0.5, "map_drop": 0.1}
        ],
        "chosen": {"name": "v", "precision": "int8"},
        "max_drop": 0.005,
    }
    seeds = {schema: {"schema": schema, **body} for schema in names}
    return st.sampled_from(names).flatmap(
        lambda schema: st.tuples(
            st.just(schema), st.one_of(json_files([seeds[schema]]), raw([json.dumps(seeds[schema]).encode()]))
        )
    )


def _read(folder: Path, example: tuple[str, bytes]) -> None:
    schema, content = example
    model = InferenceModel(folder)
    names: dict[str, Any] = {
        EXPORT_SCHEMA: EXPORT_FILENAME,
        ACT_SCHEMA: ACT_FILENAME,
        builtin_sample.SCHEMA: builtin_sample.RECORD,
        ONNX_SCHEMA: "model.json",
    }
    path = folder / names.get(schema, "record.json")
    path.write_bytes(content)
    if schema == EVAL_SCHEMA:
        _kept_evaluation(path, model, _Reader())
    elif schema == ACT_SCHEMA:
        current_result(folder, {"source_hash": _HASH})
    elif schema == EXPORT_SCHEMA:
        _is_current(folder, {"source_hash": _HASH})
    elif schema == builtin_sample.SCHEMA:
        builtin_sample.is_made(folder, 1, 1, 0, 64)
    elif schema == ONNX_SCHEMA:
        OnnxModel(folder / "model.onnx").record()
    elif schema == SEARCH_SCHEMA:
        variants(read_record(path, schema))
    read_record(path, schema)


RECORDS = Target("records", _examples, _read)
