"""The runtimes: one file each, one interface, and what of it this machine can run.

No runtime is imported before it is asked for.
"""

from __future__ import annotations

from typing import Any

from act_pipeline.engines.base import DEVICES, PRECISIONS, Engine, EngineSupport
from act_pipeline.engines.host import Machine, machine
from act_pipeline.errors import UserError, suggest
from act_pipeline.model import InferenceModel

__all__ = [
    "DEVICES",
    "ENGINES",
    "PRECISIONS",
    "Engine",
    "EngineSupport",
    "Machine",
    "create_engine",
    "find_support",
    "machine",
    "support",
]

ENGINES = ("paddle", "paddle_onednn", "paddle_trt")

_GPU_PACKAGE = "install the GPU packages (requirements/gpu.txt) on a machine with an NVIDIA GPU"
_ON_CPU = "run with --device=CPU --use_trt=False"


def create_engine(
    name: str,
    model: InferenceModel,
    precision: str = "fp32",
    device: str = "CPU",
    threads: int | None = None,
    **options: Any,
) -> Engine:
    """Load ``model`` in a runtime.

    Args:
        name: ``paddle`` (its own kernels), ``paddle_onednn`` (oneDNN on the CPU) or ``paddle_trt`` (TensorRT).
        model: the model.
        precision: ``fp32``, ``fp16`` or ``int8``; an INT8 model is only run as ``int8``, so that no
            figure is mislabelled.
        device: ``CPU`` or ``GPU``.
        threads: CPU threads; None: all that this process may use.
        **options: for tests and tools that know better, ``inference`` and ``machine`` (stand-ins) and ``summary``; for
            ``paddle_trt``, ``batch_size``, ``dynamic_shape`` and ``calibrate``.

    Raises:
        UserError: unknown name, this machine cannot, precision and model do not fit, or the model is damaged.

    Example:
        >>> model = InferenceModel.load("output/sample/int8")  # doctest: +SKIP
        >>> engine = create_engine("paddle", model, precision="int8", threads=2)  # doctest: +SKIP
        >>> engine.run(batch)["bbox"]  # doctest: +SKIP
    """
    here = options.pop("machine", None) or machine()
    find_support(name, precision, device, here).require()
    from act_pipeline.engines.model_files import inspect_model

    summary = options.pop("summary", None) or inspect_model(model)
    if precision == "int8" and not summary.quantized and not options.get("calibrate"):
        raise UserError(
            f"{model.model_path} holds no INT8 scales, expected an INT8 model for --precision=int8; compress it with "
            "tools/compress.py, or run it with --precision=fp32"
        )
    if precision != "int8" and summary.quantized:
        raise UserError(
            f"{model.model_path} is an INT8 model, asked for {precision}; run it with --precision=int8, or give "
            "the float model's folder"
        )
    if name == "paddle_onednn" and precision == "int8" and summary.float_stored_weights:
        # oneDNN's weight pass of Paddle 2.6.2 takes them for int8 bytes and computes nonsense, without a word.
        weights = summary.float_stored_weights
        raise UserError(
            f"{model.params_path} holds {len(weights)} quantized weights in another type than int8 ({weights[0]}, "
            "...), which oneDNN computes wrong; save the model with int8 weights, or run it with --use_mkldnn=False"
        )
    if name == "paddle_trt":
        from act_pipeline.engines.paddle_trt import PaddleTensorRTEngine

        return PaddleTensorRTEngine(model, precision, threads, summary=summary, machine=here, **options)
    from act_pipeline.engines.paddle_native import PaddleEngine

    return PaddleEngine(model, precision, device, threads, onednn=name == "paddle_onednn", summary=summary, **options)


def find_support(name: str, precision: str, device: str, here: Machine | None = None) -> EngineSupport:
    """Return the entry of :func:`support` for one engine, precision and device.

    Raises:
        UserError: no such engine, or the engine has no such precision or device.
    """
    if name not in ENGINES:
        raise UserError(f"unknown engine {name!r}, expected one of {', '.join(ENGINES)}{suggest(name, ENGINES)}")
    entries = [entry for entry in support(here) if entry.engine == name]
    for entry in entries:
        if (entry.precision, entry.device) == (precision, device):
            return entry
    devices = {entry.device for entry in entries}
    if device not in devices:
        instead = "--use_mkldnn=False" if name == "paddle_onednn" else "--use_trt=False"
        only = " or ".join(sorted(devices))
        raise UserError(f"{name} runs on the {only} only; run with --device={only}, or on the {device} with {instead}")
    can = ", ".join(f"{entry.precision} on {entry.device}" for entry in entries)
    raise UserError(f"{name} has no {precision} on {device}; it has {can}")


def support(here: Machine | None = None) -> list[EngineSupport]:
    """Return for every engine, precision and device whether this machine can run it, and if not, what to do."""
    here = here or machine()
    cpu = _cpu_refusal(here)
    onednn = cpu or (
        None if here.paddle_onednn else ("this Paddle was built without oneDNN", "run with --use_mkldnn=False")
    )
    gpu = _gpu_refusal(here)
    trt = _trt_refusal(here)
    int8_kernels = (
        "with 8-bit dot products (AVX512-VNNI)" if here.avx512_vnni else "without AVX512-VNNI: slower than float"
    )
    rows = [
        ("paddle", "fp32", "CPU", cpu, "Paddle's own kernels"),
        ("paddle", "int8", "CPU", cpu, "every Q/DQ computed in float: exact, slower than fp32"),
        ("paddle_onednn", "fp32", "CPU", onednn, "oneDNN"),
        ("paddle_onednn", "int8", "CPU", onednn, f"convolutions in INT8 by oneDNN, {int8_kernels}; the rest float"),
        ("paddle", "fp32", "GPU", gpu, "Paddle's own kernels"),
        ("paddle", "fp16", "GPU", gpu, "Paddle's own kernels, mixed precision"),
        ("paddle", "int8", "GPU", gpu, "every Q/DQ computed in float: exact, slower than fp32"),
        *(("paddle_trt", precision, "GPU", trt, _trt_versions(here)) for precision in PRECISIONS),
    ]
    return [
        EngineSupport(engine, precision, device, refusal is None, *(refusal or (how, "")))
        for engine, precision, device, refusal, how in rows
    ]


def _cpu_refusal(here: Machine) -> tuple[str, str] | None:
    if here.paddle is None:
        return here.absent.get("paddle", "paddlepaddle is missing"), "run `make demo`, or install requirements/cpu.txt"
    return None


def _gpu_refusal(here: Machine) -> tuple[str, str] | None:
    if here.paddle is None:
        return _cpu_refusal(here)
    if here.cuda is None:
        return here.absent.get("cuda", "paddlepaddle is the CPU package"), f"{_GPU_PACKAGE}, or {_ON_CPU}"
    if not here.gpus:
        return here.absent.get("gpus", "no NVIDIA GPU"), f"check `nvidia-smi` and the driver, or {_ON_CPU}"
    return None


def _trt_refusal(here: Machine) -> tuple[str, str] | None:
    refusal = _gpu_refusal(here)
    if refusal is not None:
        return refusal
    without = "run with --use_trt=False"
    if here.tensorrt_compiled is None:
        why = here.absent.get("tensorrt_compiled", "this Paddle was built without TensorRT")
        return why, f"install a paddlepaddle-gpu that has it (requirements/gpu.txt), or {without}"
    wanted = ".".join(map(str, here.tensorrt_compiled))
    major = here.tensorrt_compiled[0]
    if here.tensorrt_runtime is None:
        why = here.absent.get("tensorrt_runtime", "libnvinfer was not found")
        return (
            f"TensorRT is missing ({why})",
            f"install TensorRT {wanted} and put the folder of its libnvinfer.so.{major} into LD_LIBRARY_PATH, "
            f"or {without}",
        )
    if here.tensorrt_runtime[0] != major:
        found = ".".join(map(str, here.tensorrt_runtime))
        return (
            f"TensorRT {found} was found, Paddle was built with {wanted}",
            f"install TensorRT {major}.x, or {without}",
        )
    return None


def _trt_versions(here: Machine) -> str:
    compiled = ".".join(map(str, here.tensorrt_compiled or ()))
    runtime = ".".join(map(str, here.tensorrt_runtime or ()))
    return f"TensorRT {runtime}" if runtime == compiled else f"TensorRT {runtime}, built with {compiled}"
