"""Inference runtimes behind one interface, and which of them this machine can run.

A runtime's package is imported only when an engine of that runtime is created.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from act_pipeline.core.artifacts import Artifact, InferenceModel, ModelFile, OnnxModel, PlanModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import DEVICES, PRECISIONS, Engine, EngineSupport
from act_pipeline.engines.machine import Machine, machine
from act_pipeline.engines.ranking import best_engine, fastest_engine
from act_pipeline.engines.registry import REGISTRY, find_runtime, find_support, paddle_refusal, support
from act_pipeline.engines.second_stage import with_second_stage
from act_pipeline.families.registry import decoder_of

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
    """Load a model in a runtime.

    Args:
        name: one of :data:`ENGINES`: ``paddle`` (Paddle's own kernels), ``paddle_onednn`` (oneDNN on the CPU),
            ``int8_reference`` (the arithmetic of ``paddle`` in INT8, computed by oneDNN), ``paddle_trt`` (Paddle
            Inference with TensorRT), ``openvino``, ``onnxruntime`` or ``tensorrt``.
        model: a Paddle model folder; ``openvino``, ``onnxruntime`` and ``tensorrt`` export it to ONNX and also take an
            ONNX file; ``tensorrt`` takes a plan, too.
        precision: one of :data:`PRECISIONS`. An INT8 model runs as ``int8`` only, so that no figure is mislabelled.
        device: ``CPU`` or ``GPU``.
        threads: number of CPU threads; None: all CPUs that this process may use.
        **options: ``batch_size``: the largest batch (default 1; unlimited for Paddle without TensorRT); ``decoder``:
            turns the outputs into detections (default: as the model's ``infer_cfg.yml`` and its outputs say);
            ``requests`` for ``openvino`` and ``onnxruntime``: the number of threads that may call ``run`` at the same
            time (default 1; :data:`act_pipeline.engines.interface.AUTO_REQUESTS`: as the runtime recommends);
            ``float_precision`` for ``openvino``; ``provider`` for ``onnxruntime``; ``dynamic_shape`` and
            ``calibrate`` for ``paddle_trt``. Tests and tools may pass ``inference`` and ``machine`` (stand-ins) and
            ``summary`` (the result of :func:`inspect_artifact`).

    Returns:
        The engine, loaded and ready to run.

    Raises:
        UserError: the name is unknown, this machine cannot run the engine, the precision does not match the model, or
            the model is damaged.

    Example:
        >>> model = InferenceModel.load("output/rtdetr_sample_int8")  # doctest: +SKIP
        >>> engine = create_engine("openvino", model, precision="int8", threads=2)  # doctest: +SKIP
        >>> engine.run(batch)["bbox"]  # doctest: +SKIP
    """
    here = options.pop("machine", None) or machine()
    find_support(name, precision, device, here).require()
    runtime = find_runtime(name)
    if isinstance(model, PlanModel) and name != "tensorrt":
        raise UserError(
            f"{model.path} is a TensorRT plan, which {name} does not run; run it with --engine=tensorrt on the GPU "
            "that it was built for"
        )
    if isinstance(model, OnnxModel) and not runtime.onnx:
        takers = ", ".join(key for key, entry in REGISTRY.items() if entry.onnx)
        raise UserError(
            f"{model.path} is an ONNX file, {name} takes a model folder; run it with one of {takers} (--engine), or "
            "give the folder it was exported from"
        )
    if not runtime.requests and options.pop("requests", 1) != 1:
        takers = ", ".join(key for key, entry in REGISTRY.items() if entry.requests)
        raise UserError(
            f"{name} runs one request at a time, expected one of {takers} for several (requests); leave it at 1, and "
            "raise the batch size"
        )
    summary = options.pop("summary", None) or inspect_artifact(model, here)
    where = model.path if isinstance(model, ModelFile) else model.model_path
    stated = getattr(summary, "decoder", None)  # of an ONNX file
    decoder = stated or options.pop("decoder", None) or decoder_of(model, summary.output_shapes)
    decoder = with_second_stage(decoder, create_engine, name, device, threads, here)
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
    int8_weights = runtime.int8_weights and precision == "int8"
    if int8_weights and isinstance(model, InferenceModel) and summary.float_stored_weights:
        weights = summary.float_stored_weights
        raise UserError(
            f"{model.params_path} holds {len(weights)} quantized weights in another type than int8 ({weights[0]}, "
            f"...), which {name} computes wrong; save the model with int8 weights, or run it with {runtime.otherwise}"
        )
    known = {"summary": summary, "inference": options.pop("inference", None), "machine": here}
    stand_ins = {key: known[key] for key in runtime.stand_ins}
    engine_class = getattr(import_module(f"act_pipeline.engines.{runtime.module}"), runtime.class_name)
    return engine_class(model, precision, device, threads, decoder=decoder, **runtime.fixed, **stand_ins, **options)


def inspect_artifact(model: Artifact, here: Machine | None = None) -> Any:
    """Return a summary of a model: ``inputs``, ``outputs``, ``quantized``, ``input_size`` and more.

    Args:
        model: a Paddle model folder, an ONNX file, or a TensorRT plan, which the ONNX file that it was built from
            describes.
        here: this machine, or a stand-in; None: :func:`machine`.

    Returns:
        An ``OnnxSummary`` for an ONNX file, a ``ModelSummary`` for a Paddle model.

    Raises:
        UserError: a file is damaged, or the package that reads it is missing.
    """
    if isinstance(model, ModelFile):
        from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
        from act_pipeline.engines.tensorrt.plan import source_of_plan

        return inspect_onnx(source_of_plan(model) if isinstance(model, PlanModel) else model)
    refusal = paddle_refusal(here or machine())
    if refusal is not None:
        why, remedy = refusal
        raise UserError(f"{model.directory} is a Paddle model, which cannot be read: {why}; {remedy}")
    from act_pipeline.graph.model_files import inspect_model

    return inspect_model(model)
