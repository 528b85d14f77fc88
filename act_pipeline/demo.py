"""The whole path on the built-in sample: data, export, compress, evaluate, a table, a report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from act_pipeline.compress import Compressed, compress
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.engines import Artifact, find_support
from act_pipeline.engines.registry import find_runtime
from act_pipeline.evaluation import EVAL_SCHEMA
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.evaluation.result import EvalRecord
from act_pipeline.export import export_model
from act_pipeline.inference import InferenceRequest, run_inference
from act_pipeline.onnx_export import lowered_onnx
from act_pipeline.report import REPORT_FILENAME, write_report

MODEL_CONFIG = CONFIGS / "rtdetr" / "rtdetr_sample.yml"
WEIGHTS = Path(__file__).resolve().parent / "data" / "rtdetr_sample.pdparams"
COMPRESS_CONFIG = CONFIGS / "sample.yml"
READER_CONFIG = CONFIGS / "readers" / "sample_reader.yml"
REFERENCE_LABEL = "INT8, every Q/DQ as it stands"
TRAIN_SCENES, VAL_SCENES, SCENE_SIZE = 300, 120, 256


@dataclass
class Demo:
    """What the demo made.

    Attributes:
        fp32: the exported float model.
        compressed: the INT8 model and its ``act.json``.
        evaluations: label -> its ``eval.json``, the float model's first.
    """

    fp32: InferenceModel
    compressed: Compressed
    evaluations: dict[str, EvalRecord]


def run_demo(
    data_dir: str | os.PathLike[str] = "dataset/sample",
    output_dir: str | os.PathLike[str] = "output",
    overrides: Sequence[str] = (),
    scenes: tuple[int, int] = (TRAIN_SCENES, VAL_SCENES),
) -> Demo:
    """Run every stage; what was made from the same by an earlier run is taken from it.

    Args:
        data_dir: where the sample is made.
        output_dir: where the models and records go.
        overrides: ``Section.key=value`` for the compression config.
        scenes: training and validation scenes.
    """
    output = Path(output_dir)
    _say(f"data: {scenes[0]} training and {scenes[1]} validation scenes in {data_dir}")
    make_sample(data_dir, *scenes, seed=0, size=SCENE_SIZE)
    _say(f"export: {MODEL_CONFIG.name} with its weights, to {output / MODEL_CONFIG.stem}")
    fp32 = export_model(MODEL_CONFIG, output, [f"weights={WEIGHTS}", "trt=True"], reuse=True)

    reader = [
        f"{name}.dataset_dir={Path(data_dir).resolve()}" for name in ("TrainDataset", "EvalDataset", "TestDataset")
    ]
    save_dir = output / f"{MODEL_CONFIG.stem}_int8"
    _say(f"compress: {COMPRESS_CONFIG.name}, to {save_dir}")
    config = load_config(COMPRESS_CONFIG, [f"Global.model_dir={fp32.directory}", *overrides])
    compressed = compress(config, save_dir, reuse=True, reader_overrides=reader)

    judged = ActRecord.from_json(compressed.record).evaluation
    assert judged.engine is not None and judged.fp32_engine is not None, "a compression records its engines"
    runs = {
        f"FP32, {judged.fp32_engine}": (fp32, "fp32", judged.fp32_engine),
        f"INT8, {judged.engine}": (compressed.model, "int8", judged.engine),
        REFERENCE_LABEL: (compressed.model, "int8", "int8_reference"),
    }
    evaluations, records = {}, []
    for label, (model, precision, engine) in runs.items():
        if not find_support(engine, precision, "CPU").available:
            continue
        json_file = output / f"eval_{precision}_{engine}.json"
        _say(f"evaluate: {label}, to {json_file}")
        evaluations[label] = _evaluate(model, precision, engine, json_file, reader)
        records.append(json_file)
    _say(f"report: {save_dir / REPORT_FILENAME}")
    write_report(save_dir, Reader.load(READER_CONFIG, reader), records)
    return Demo(fp32, compressed, evaluations)


def _evaluate(
    model: InferenceModel, precision: str, engine: str, json_file: Path, reader_overrides: Sequence[str]
) -> EvalRecord:
    reader = Reader.load(READER_CONFIG, reader_overrides)
    kept = _kept_evaluation(json_file, _loaded_by(engine, precision, model), reader)
    if kept is not None:
        return kept
    request = InferenceRequest(
        model_path=str(model.directory), device="CPU", precision=precision, engine=engine, json=str(json_file)
    )
    run_inference(request, reader=reader, say=lambda line: None)
    return EvalRecord.from_json(read_record(json_file, EVAL_SCHEMA))


def _loaded_by(engine: str, precision: str, model: InferenceModel) -> Artifact:
    """Return what an engine loads of a model on a CPU: the folder, or the ONNX file that it is lowered to."""
    runtime = find_runtime(engine)
    return lowered_onnx(model, runtime.target(precision)) if runtime.onnx else model


def _kept_evaluation(json_file: Path, model: Artifact, reader: Reader) -> EvalRecord | None:
    """Return the record of an earlier run, if it is of this model on these data."""
    try:
        record = EvalRecord.from_json(read_record(json_file, EVAL_SCHEMA))
    except UserError:
        return None
    same = record.model_hash == model.content_hash() and record.reader_hash == reader.fingerprint()
    return record if same else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
