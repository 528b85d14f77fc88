"""What a bundle and a Triton repository have in common: the ONNX file for a target, and its preprocessing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.bundle.description import device_steps
from act_pipeline.bundle.spelling import spell_for
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.engines.tensorrt.targets import RTX, Target, Version, check_precision
from act_pipeline.families.registry import Decoder, decoder_of
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.onnx_export import Lowered, lower

# Families whose detections the device's scripts make of the outputs, and those that get their NMS into the file.
_DECODED, _WITH_NMS = ("rtdetr", "detr_raw", "end2end"), ("yolo", "ppyoloe")


@dataclass(frozen=True)
class DeviceModel:
    """A model that a device can run, and what its scripts need to know.

    Attributes:
        model: the model folder.
        quantized: whether it is an INT8 model.
        decoder: of its outputs.
        nms: what :func:`act_pipeline.onnx_export.lower` shall do about NMS.
        reader: the reader adapted to the model.
        steps: the preprocessing for the device.
        classes: the class names; empty: not known.
    """

    model: InferenceModel
    quantized: bool
    decoder: Decoder
    nms: str
    reader: Any
    steps: list[dict[str, Any]]
    classes: list[str]


def device_model(
    model: InferenceModel, target: Target, version: Version | None, reader_config: str | None, advice: str = ""
) -> DeviceModel:
    """Check that a device and its scripts can run a model, and return what they need.

    Args:
        model: the model.
        target: the device.
        version: its TensorRT; None: another runtime.
        reader_config: reader YAML; None: the preprocessing of the model's ``infer_cfg.yml``.
        advice: what to do if the sample's reader does not fit the model; empty: nothing can be advised.

    Raises:
        UserError: the device cannot run the model, the model is of a family that the scripts do not know, or its
            preprocessing is not told or unknown to them.
    """
    summary = inspect_model(model)
    where = str(model.directory)
    check_precision(target, summary.quantized, where)
    decoder = decoder_of(model, summary.output_shapes)
    nms = nms_mode(decoder, summary.op_counts, version)
    if nms is None:
        raise UserError(
            f"{where} is of the family {decoder.family.name}, expected one of {', '.join((*_DECODED, *_WITH_NMS))}: a "
            "bundle has no decoding for others; run it with deploy/infer_eval.py"
        )
    reader, steps, classes = _device_reader(model, reader_config, advice)
    return DeviceModel(model, summary.quantized, decoder, nms, reader, steps, classes)


def nms_mode(decoder: Decoder, ops: Any, version: Version | None) -> str | None:
    """Return what :func:`act_pipeline.onnx_export.lower` shall do about NMS.

    Args:
        decoder: of the model's outputs.
        ops: op types of the model's program.
        version: TensorRT on the device; None: another runtime.

    Returns:
        The mode; None: the device's scripts have no decoding for the model's family, and it has no NMS.
    """
    if decoder.family.name in _WITH_NMS or "multiclass_nms3" in ops:
        return "tensorrt" if version is not None and version.plugins else "onnx"
    return "none" if decoder.family.name in _DECODED else None


def write_onnx(
    model: InferenceModel,
    path: Path,
    target: Target,
    version: Version | None,
    batch: int | None,
    nms: str,
    runtime: str = "openvino",
) -> Lowered:
    """Write the ONNX file in the form that the device's runtime computes right.

    Args:
        model: the model.
        path: the file to write.
        target: the device.
        version: its TensorRT; None: another runtime.
        batch: the largest batch, which is fixed in the file for Jetsons and TensorRT-RTX; None: that of the device.
        nms: see :class:`DeviceModel`.
        runtime: what loads the file where there is no TensorRT: ``openvino`` or ``onnxruntime``.

    Raises:
        UserError: an op cannot be exported, or the version does not know it.
    """
    on_cpu = "onnxruntime" if runtime == "onnxruntime" else "cpu"
    spelling = on_cpu if version is None else "tensorrt_rtx" if version.name == RTX else "tensorrt"
    # Jetsons run one stream of pictures: a fixed batch gives TensorRT one shape to choose kernels for.
    fixed = (batch or target.batch) if target.jetpack or (version is not None and version.name == RTX) else None
    typed = version is not None and version.typed
    lowered = lower(model, path, spelling, batch=fixed, float16=typed, nms=nms)
    if version is not None:
        spell_for(path, version, str(model.directory))
    return lowered


def write_openvino(source: Path, target: Path) -> None:
    """Write a model in OpenVINO's own format, with FakeQuantize in place of Q/DQ pairs.

    Args:
        source: the ONNX file.
        target: the ``.xml`` to write; its ``.bin`` lies next to it.
    """
    from act_pipeline.engines.onnx_runtimes.openvino import import_openvino
    from act_pipeline.engines.onnx_runtimes.openvino_quantization import replace_qdq_with_fake_quantize

    openvino = import_openvino()
    model = openvino.Core().read_model(str(source))
    replace_qdq_with_fake_quantize(model)
    openvino.save_model(model, str(target), compress_to_fp16=False)


def _device_reader(
    model: InferenceModel, reader_config: str | None, advice: str = ""
) -> tuple[Any, list[dict[str, Any]], list[str]]:
    """Return the reader adapted to a model, its steps for the device, and the class names.

    Args:
        model: the model.
        reader_config: reader YAML; None: the preprocessing of the model's ``infer_cfg.yml``.
        advice: what to do if the sample's reader does not fit the model; empty: nothing can be advised.

    Raises:
        UserError: the model does not tell its preprocessing, or the device's scripts do not know it.
    """
    from act_pipeline.data import Reader
    from act_pipeline.data.model_fit import fit_reader, reader_of_model

    given = reader_config is not None
    reader = Reader.load(reader_config or find_shipped(DEFAULT_READER))
    if not given:
        if not model.infer_cfg().get("Preprocess"):
            raise UserError(
                f"{model.infer_cfg_path} has no Preprocess, expected the steps that make the model's input; give "
                "--reader_config, or export the model again"
            )
        reader = reader_of_model(model, reader)
    try:
        fitted = fit_reader(model, reader).reader
    except UserError as error:
        if given or not advice:
            raise
        raise UserError(f"{error}. That is the sample's reader: {advice}") from None
    classes = model.class_names()
    if not classes and given:
        with contextlib.suppress(UserError):
            classes = list(fitted.class_names)
    return fitted, device_steps(fitted), classes
