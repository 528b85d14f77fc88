"""Selection of model, engine, precision and device from the flags of ``deploy/infer_eval.py``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from act_pipeline.core.artifacts import ModelFile, OnnxModel, PlanModel, open_model
from act_pipeline.core.defaults import DEFAULT_MODELS, find_shipped
from act_pipeline.core.errors import UserError
from act_pipeline.engines import Artifact, Machine, fastest_engine, support
from act_pipeline.engines.device import engine_device
from act_pipeline.inference.request import InferenceRequest

AUTO, ALL = "auto", "all"


@dataclass(frozen=True)
class Choice:
    """The selected engine.

    Attributes:
        name: a name in :data:`act_pipeline.engines.ENGINES`.
        precision: one of :data:`act_pipeline.engines.PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        why: one line with the reason if the engine was chosen automatically; otherwise empty.
    """

    name: str
    precision: str
    device: str
    why: str = ""


def load_model(request: InferenceRequest) -> Artifact:
    """Return the requested model, or the sample's if none is requested.

    Raises:
        UserError: it is missing or incomplete.
    """
    path: str | Path | None = request.model_path
    if path is None:
        default = DEFAULT_MODELS["int8" if request.precision in (None, "int8") else "float"]
        path = find_shipped(default)
        if not path.exists():
            raise UserError(
                f"model folder {default} does not exist; run `make demo`, which makes it, or give --model_path"
            )
    return open_model(path, request.model_filename, request.params_filename)


def choose_engine(request: InferenceRequest, model: Artifact, quantized: bool, here: Machine) -> Choice:
    """Return the engine that the flags name, or the fastest of this machine.

    Args:
        request: the flags.
        model: the model.
        quantized: whether it is an INT8 model.
        here: this machine.

    Raises:
        UserError: the flags contradict each other, or no engine of this machine runs the model.
    """
    precision = request.precision or ("int8" if quantized else "fp32")
    asked = _asked_engine(request)
    if request.collect_shape_only:
        return _for_collecting(request, model, precision, asked, here)
    if isinstance(model, PlanModel) and asked in (None, AUTO):
        return Choice("tensorrt", precision, _device(request, "tensorrt", precision, here))
    if asked == AUTO or (asked is None and isinstance(model, OnnxModel)):
        return _fastest(request, precision, isinstance(model, OnnxModel), here)
    name = asked or "paddle"
    return Choice(name, precision, _device(request, name, precision, here))


def _asked_engine(request: InferenceRequest) -> str | None:
    """Return the engine that the flags name, ``auto``, or None."""
    if request.use_mkldnn and request.device == "GPU":
        raise UserError("--use_mkldnn=True is for the CPU, --device is GPU; leave one of them out")
    # PaddleSlim's flags; TensorRT has priority if both are given, for compatibility.
    flags = [
        ("--use_trt=True", "paddle_trt", request.use_trt),
        ("--use_mkldnn=True", "paddle_onednn", request.use_mkldnn),
    ]
    meant = [(flag, name) for flag, name, given in flags if given]
    if request.engine is None:
        return meant[0][1] if meant else None
    for flag, name in meant:
        if name != request.engine:
            raise UserError(f"--engine={request.engine} contradicts {flag}, which means {name}; leave one of them out")
    return request.engine


def _device(request: InferenceRequest, name: str, precision: str, here: Machine) -> str:
    """Return the requested device; ``auto`` is the GPU if the engine supports it or supports nothing else."""
    if request.device != "auto":
        return request.device
    entries = [entry for entry in support(here) if entry.engine == name]
    devices = {entry.device for entry in entries}
    if len(devices) == 1:  # its own entry gives a better message than "no TensorRT on CPU"
        return devices.pop()
    # Paddle's own kernels are on both devices: a precision that they lack is refused on the device that would be used.
    return engine_device("auto", [entry for entry in entries if name == "paddle" or entry.precision == precision])


def _for_collecting(
    request: InferenceRequest, model: Artifact, precision: str, asked: str | None, here: Machine
) -> Choice:
    """Return Paddle's own kernels, which collect the shapes for TensorRT in Paddle, also on a CPU."""
    if asked not in (None, "paddle", "paddle_trt", "paddle_onednn"):
        raise UserError(
            f"--collect_shape_only collects what paddle_trt needs, --engine is {asked}; leave one of them out"
        )
    if isinstance(model, ModelFile):
        kind = "a TensorRT plan" if isinstance(model, PlanModel) else "an ONNX file"
        raise UserError(f"{model.path} is {kind}, expected a model folder to collect shapes of")
    return Choice("paddle", precision, _device(request, "paddle", precision, here))


def _fastest(request: InferenceRequest, precision: str, onnx_file: bool, here: Machine) -> Choice:
    name, device, why = fastest_engine(precision, request.device, here, onnx_file)
    return Choice(name, precision, device, why)
