"""The runtimes: one file each, one interface, and what of it this machine can run.

No runtime is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.arrays import require_outputs
from act_pipeline.engines.interface import DEVICES, PRECISIONS, Artifact, Engine, EngineSupport
from act_pipeline.engines.machine import Machine, machine
from act_pipeline.engines.ranking import best_engine, fastest_engine
from act_pipeline.engines.registry import REGISTRY, find_runtime, find_support, paddle_refusal, support

__all__ = [
    "DEVICES",
    "ENGINES",
    "PRECISIONS",
    "Artifact",
    "Engine",
    "EngineSupport",
    "Machine",
    "best_engine",
    "create_engine",
    "fastest_engine",
    "find_support",
    "inspect_artifact",
    "machine",
    "support",
]

ENGINES = tuple(REGISTRY)


def create_engine(
    name: str,
    model: Artifact,
    precision: str = "fp32",
    device: str = "CPU",
    threads: int | None = None,
    **options: Any,
) -> Engine:
    """Load ``model`` in a runtime.

    Args:
        name: one of :data:`ENGINES`: ``paddle`` (its own kernels), ``paddle_onednn`` (oneDNN on the CPU),
            ``int8_reference`` (INT8 as ``paddle`` computes it, by oneDNN), ``paddle_trt`` (Paddle with TensorRT),
            ``openvino``, ``onnxruntime`` or ``tensorrt``.
        model: a model's folder, which the last three lower to ONNX, or for these an ONNX file.
        precision: one of :data:`PRECISIONS`; an INT8 model is only run as ``int8``, so that no figure is mislabelled.
        device: ``CPU`` or ``GPU``.
        threads: CPU threads; None: all that this process may use.
        **options: ``batch_size``, the largest batch (1; for Paddle without TensorRT any); for ``openvino``
            ``float_precision``; for ``onnxruntime`` ``provider``; for ``paddle_trt`` ``dynamic_shape`` and
            ``calibrate``; for tests and tools that know better ``inference`` and ``machine`` (stand-ins) and
            ``summary``.

    Raises:
        UserError: unknown name, this machine cannot, precision and model do not fit, or the model is damaged.

    Example:
        >>> model = InferenceModel.load("output/rtdetr_sample_int8")  # doctest: +SKIP
        >>> engine = create_engine("openvino", model, precision="int8", threads=2)  # doctest: +SKIP
        >>> engine.run(batch)["bbox"]  # doctest: +SKIP
    """
    here = options.pop("machine", None) or machine()
    find_support(name, precision, device, here).require()
    runtime = find_runtime(name)
    if isinstance(model, OnnxModel) and not runtime.onnx:
        takers = ", ".join(key for key, entry in REGISTRY.items() if entry.onnx)
        raise UserError(
            f"{model.path} is an ONNX file, {name} takes a model folder; run it with one of {takers} (--engine), or "
            "give the folder it was lowered from"
        )
    summary = options.pop("summary", None) or inspect_artifact(model, here)
    where = model.path if isinstance(model, OnnxModel) else model.model_path
    require_outputs(summary.output_shapes, where)
    if precision == "int8" and not summary.quantized and not options.get("calibrate"):
        raise UserError(
            f"{where} holds no INT8 scales, expected an INT8 model for --precision=int8; compress it with "
            "tools/compress.py, or run it with --precision=fp32"
        )
    if precision != "int8" and summary.quantized:
        raise UserError(
            f"{where} is an INT8 model, asked for {precision}; run it with --precision=int8, or give "
            "the float model's folder"
        )
    onednn_int8 = name == "paddle_onednn" and precision == "int8"
    if onednn_int8 and isinstance(model, InferenceModel) and summary.float_stored_weights:
        # oneDNN's weight pass of Paddle 2.6.2 takes them for int8 bytes and computes nonsense, without a word.
        weights = summary.float_stored_weights
        raise UserError(
            f"{model.params_path} holds {len(weights)} quantized weights in another type than int8 ({weights[0]}, "
            "...), which oneDNN computes wrong; save the model with int8 weights, or run it with --use_mkldnn=False"
        )
    known = {"summary": summary, "inference": options.pop("inference", None), "machine": here}
    stand_ins = {key: known[key] for key in runtime.stand_ins}
    engine_class = getattr(import_module(f"act_pipeline.engines.{runtime.module}"), runtime.class_name)
    return engine_class(model, precision, device, threads, **runtime.fixed, **stand_ins, **options)


def inspect_artifact(model: Artifact, here: Machine | None = None) -> Any:
    """Return what a model holds, from its headers: ``inputs``, ``outputs``, ``quantized``, ``input_size``.

    Raises:
        UserError: a file is damaged, or the package that reads it is missing.
    """
    if isinstance(model, OnnxModel):
        from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx

        return inspect_onnx(model)
    refusal = paddle_refusal(here or machine())
    if refusal is not None:
        why, remedy = refusal
        raise UserError(f"{model.directory} is a Paddle model, which cannot be read: {why}; {remedy}")
    from act_pipeline.graph.model_files import inspect_model

    return inspect_model(model)
