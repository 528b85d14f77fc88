"""What the importer, `ptq`, the export and the runtimes make of one model: the row of a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine
from act_pipeline.evaluation import agreement, evaluate
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx.verify import compare
from act_pipeline.onnx_export import lower

ENGINES = ("openvino", "onnxruntime", "int8_reference")
_THREADS = 2


@dataclass
class Row:
    """Measurements of one model; None: does not apply.

    Attributes:
        model: its name.
        nodes: nodes of the ONNX file.
        family: the detector family that was found.
        open_batch: whether the imported model takes any batch size.
        import_seconds, import_difference: of the import; the largest difference to ONNX Runtime on pictures.
        ptq_seconds: seconds of the compression without its evaluations.
        int8_ops, quantizable_ops: of convolutions and matmuls with weights.
        bytes_ratio: INT8 folder / float folder.
        export_difference: largest difference of the float model, exported to ONNX again, to the first file, both in
            ONNX Runtime.
        boxes: confident boxes (score above 0.3) of the float model on the evaluation pictures.
        found: engine -> share of them that INT8 finds in it (same class, IoU of at least 0.5).
        mean_iou: engine -> mean IoU of these.
        runtimes: engine -> share of the boxes of INT8 in `int8_reference` that INT8 finds in it.
        refused: engine -> why it does not run the INT8 model.
        error: why a step failed.
    """

    model: str
    nodes: int | None = None
    family: str | None = None
    open_batch: bool | None = None
    import_seconds: float | None = None
    import_difference: float | None = None
    ptq_seconds: float | None = None
    int8_ops: int | None = None
    quantizable_ops: int | None = None
    bytes_ratio: float | None = None
    export_difference: float | None = None
    boxes: int | None = None
    found: dict[str, float | None] = field(default_factory=dict)
    mean_iou: dict[str, float | None] = field(default_factory=dict)
    runtimes: dict[str, float | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the row as a mapping of its attributes."""
        return asdict(self)


def reader_file(folder: Path, pictures: Path, size: int, keep_ratio: bool, classes: int) -> Path:
    """Write the reader of a model and return its path.

    Args:
        folder: the folder to write to.
        pictures: a folder with ``train`` and ``val``, pictures without labels.
        size: height and width of the input.
        keep_ratio: whether pictures keep their ratio, on grey, as YOLOs want them.
        classes: number of classes.
    """
    steps: list[dict[str, Any]] = [
        {"Decode": {}},
        {"Resize": {"target_size": [size, size], "keep_ratio": keep_ratio, "interp": 1 if keep_ratio else 2}},
        {"NormalizeImage": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}},
        {"Permute": {}},
    ]
    if keep_ratio:
        steps.insert(2, {"Pad": {"size": [size, size], "pad_mode": 1, "fill_value": [114.0, 114.0, 114.0]}})
    lines = ["metric: COCO", f"num_classes: {classes}", "worker_num: 0"]
    for section, split in (("TrainDataset", "train"), ("EvalDataset", "val")):
        lines += [f"{section}:", "  !ImageFolder", f"    image_dir: {pictures / split}"]
    lines.append(yaml.safe_dump({"EvalReader": {"sample_transforms": steps, "batch_size": 1}}, sort_keys=False))
    path = folder / "reader.yml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def measure(
    row: Row,
    folder: Path,
    pictures: Path,
    size: int,
    *,
    keep_ratio: bool,
    classes: int,
    calib_images: int,
    onnx_file: Path | None = None,
    import_model: Callable[[Path], InferenceModel] | None = None,
) -> None:
    """Run all steps on one model and fill its row.

    Args:
        row: filled as far as the steps come.
        folder: of the model's files.
        pictures: see :func:`reader_file`.
        size, keep_ratio, classes: see :func:`reader_file`.
        calib_images: number of images for the calibration.
        onnx_file: the model as ONNX.
        import_model: instead, or in addition: writes the float model into a folder, in another way.

    Raises:
        UserError: a step refuses the model.
    """
    start = time.perf_counter()
    if import_model is not None:
        model = import_model(folder / "float")
    else:
        assert onnx_file is not None
        imported = import_onnx(onnx_file, folder / "float", images=pictures / "val")
        model, row.import_difference = imported.model, imported.max_difference
        row.open_batch = not imported.fixed_batch
    row.import_seconds = time.perf_counter() - start
    if onnx_file is not None:
        import onnx

        proto = onnx.load(onnx_file, load_external_data=False)
        row.nodes = len(proto.graph.node)
    if onnx_file is not None and import_model is None:
        again = lower(model, folder / "again.onnx").path
        row.export_difference = _difference(onnx_file, again, pictures / "val", size)
    reader = reader_file(folder, pictures, size, keep_ratio, classes)
    int8 = _compressed(row, folder, model, reader, calib_images)
    _detections(row, model, int8, reader)


def _compressed(row: Row, folder: Path, model: InferenceModel, reader: Path, calib_images: int) -> InferenceModel:
    content = {
        "Global": {"reader_config": str(reader), "model_dir": str(model.directory), "Evaluation": "agreement"},
        "Strategy": {"name": "ptq", "min_agreement": 0.0},
        "QuantPost": {"calib_images": calib_images},
    }
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    compressed = compress(load_config(config), folder / "int8", "CPU", progress=False)
    record = compressed.record
    row.ptq_seconds = sum(value for stage, value in record["seconds"].items() if not stage.startswith("evaluate"))
    row.int8_ops, row.quantizable_ops = sum(record["quantized_ops"].values()), record["quantizable_ops"]
    row.bytes_ratio = record["bytes_ratio"]
    return compressed.model


def _detections(row: Row, model: InferenceModel, int8: InferenceModel, reader: Path) -> None:
    row.family = str(read_family(model))
    data = Reader.load(reader)

    def detected(engine: str, artifact: InferenceModel, precision: str) -> np.ndarray:
        running = create_engine(engine, artifact, precision, "CPU", _THREADS)
        try:
            return evaluate(running, data, progress=False).detections
        finally:
            running.close()

    reference = detected("onnxruntime", model, "fp32")
    found = {}
    for engine in ENGINES:
        try:
            found[engine] = detected(engine, int8, "int8")
        except UserError as error:  # the other runtimes are tried all the same
            row.refused[engine] = str(error)
    for engine, detections in found.items():
        agreed = agreement(reference, detections)
        row.boxes, row.found[engine], row.mean_iou[engine] = agreed.boxes, agreed.matched, agreed.mean_iou
        row.runtimes[engine] = agreement(found.get("int8_reference", detections), detections).matched


def read_family(model: InferenceModel) -> str:
    """Return the name of a model's detector family."""
    from act_pipeline.families.registry import decoder_of
    from act_pipeline.graph.model_files import inspect_model

    return decoder_of(model, inspect_model(model).output_shapes).family.name


def _difference(first: Path, second: Path, pictures: Path, size: int) -> float:
    """Return the largest difference of two ONNX files in ONNX Runtime on up to four pictures, see `verify.compare`."""
    from act_pipeline.importers.onnx.pictures import STRETCHED, Pictures, check_pictures

    largest, found = 0.0, Pictures.of(pictures)
    for index in range(min(len(check_pictures(pictures)), 4)):
        image = STRETCHED(found.take(index, size), (size, size))[None]
        outputs = [_run(each, image, size) for each in (first, second)]
        largest = max(largest, compare(*outputs))
    return largest


def _run(path: Path, image: np.ndarray, size: int) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = {"im_shape": np.full((1, 2), size, np.float32), "scale_factor": np.ones((1, 2), np.float32)}
    feed = {each.name: values.get(each.name, image) for each in session.get_inputs()}
    return [np.asarray(each) for each in session.run(None, feed)]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    head = (
        "| model | nodes | family | import: difference, s | `ptq` s | INT8 ops | file ratio | exported again | "
        + "boxes | " + " | ".join(f"found: {engine}" for engine in ENGINES) + " |"
    )  # fmt: skip
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for row in rows:
        if row.error is not None:
            lines.append(f"| {row.model} | {_shown(row.nodes)} | {row.error} |")
            continue
        cells = [
            row.model, _shown(row.nodes), row.family or "",
            f"{_shown(row.import_difference, '.1e')}, {_shown(row.import_seconds, '.0f')}",
            _shown(row.ptq_seconds, ".0f"), f"{row.int8_ops} of {row.quantizable_ops}", _shown(row.bytes_ratio, ".3f"),
            _shown(row.export_difference, ".1e"), _shown(row.boxes),
            *(_shares(row, engine) for engine in ENGINES),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shares(row: Row, engine: str) -> str:
    if engine in row.refused:
        return "does not run"
    return f"{_shown(row.found.get(engine), '.1%')}, IoU {_shown(row.mean_iou.get(engine), '.3f')}"


def _shown(value: float | None, form: str = "d") -> str:
    return "-" if value is None else format(value, form)
