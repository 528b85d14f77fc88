"""Choose the engine that evaluates a compression, by default the fastest INT8 engine of this machine."""

from __future__ import annotations

import logging
from typing import Optional

from act_pipeline.compress.judging.judge import REFERENCE, Judge
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines import Machine, fastest_engine, find_support, machine, support
from act_pipeline.engines.onnx_runtimes.openvino import states_bf16
from act_pipeline.engines.registry import find_runtime
from act_pipeline.families.registry import Decoder, decoder_of
from act_pipeline.graph.model_files import inspect_model

_logger = logging.getLogger(__name__)


def choose_judge(
    asked: str,
    device: str,
    model: InferenceModel,
    here: Machine | None = None,
    *,
    decoder: Decoder | None = None,
) -> Judge:
    """Choose the engine that evaluates.

    Args:
        asked: ``Strategy.engine``: a name, or ``auto``: the engine that ``infer_eval --engine=auto`` chooses here for
            INT8, or the reference if that engine cannot run the model.
        device: ``CPU`` or ``GPU``, where the compression computes.
        model: the float model.
        here: the machine; None: this machine.
        decoder: turns the outputs of all models into detections; None: the float model's. The models that strategies
            write have no ``infer_cfg.yml``.

    Raises:
        UserError: the machine cannot run the engine.
    """
    here = here or machine()
    decoder = decoder or decoder_of(model, inspect_model(model).output_shapes)
    if asked == "auto":
        name, found, why = fastest_engine("int8", "auto" if device == "GPU" else "CPU", here)
        refusal = _refusal(name, model) if name != REFERENCE else None
        if refusal is None:
            return _judge(name, found, why, here, decoder, model)
        _logger.warning("evaluating in %s: %s does not accept the model: %s", REFERENCE, name, refusal)
        return _judge(REFERENCE, "CPU", f"{name} does not take the model", here, decoder, model)
    devices = [entry for entry in ("GPU", "CPU") if _available(asked, entry, here)]
    if not devices:  # raises the error that names what is missing
        rows = [entry for entry in support(here) if (entry.engine, entry.precision) == (asked, "int8")]
        (rows[-1] if rows else find_support(asked, "int8", "CPU", here)).require()
    return _judge(asked, device if device in devices else devices[0], "Strategy.engine names it", here, decoder, model)


def _judge(name: str, device: str, why: str, here: Machine, decoder: Decoder, model: InferenceModel) -> Judge:
    fp32 = name
    if name == REFERENCE:
        fp32 = "paddle_onednn" if find_support("paddle_onednn", "fp32", "CPU", here).available else "paddle"
    if name == "openvino" and states_bf16(model):
        why = f"{why.replace('; the rest f32', '')}; the rest bf16, as {model.infer_cfg_path.name} says"
        return Judge(name, fp32, device, why, decoder, rest_in_bf16=True)
    return Judge(name, fp32, device, why, decoder)


def _available(name: str, device: str, here: Machine) -> bool:
    try:
        return find_support(name, "int8", device, here).available
    except UserError:  # the engine does not support the device
        return False


def _refusal(name: str, model: InferenceModel) -> Optional[str]:
    """Return why an engine cannot run a model, as far as that is known without loading it; None: no reason."""
    from act_pipeline.onnx_export import lowered_onnx

    if not find_runtime(name).onnx:
        return None
    try:
        lowered_onnx(model, "cpu")
    except UserError as error:
        return str(error)
    return None
