"""Registry of the runtimes: the module of each, and which precisions and devices a machine can run.

Importing this module imports no runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from act_pipeline.core.errors import UserError, suggest
from act_pipeline.engines.interface import EngineSupport
from act_pipeline.engines.machine import Machine, machine
from act_pipeline.engines.tensorrt.engine import tensorrt_refusal, tensorrt_versions

# Why the machine cannot run an engine, and what the user can do; None: it can.
Refusal = Optional[tuple[str, str]]
# Precision, device, refusal, version and kernels.
Row = tuple[str, str, Refusal, str]

_GPU_PACKAGE = "install the GPU packages (requirements/gpu.txt) on a machine with an NVIDIA GPU"
_ON_CPU = "run with --device=CPU --use_trt=False"
_CHECK_GPU = "check `nvidia-smi` and the driver"


@dataclass(frozen=True)
class Runtime:
    """An entry of the registry.

    Attributes:
        module: name of the module, relative to ``act_pipeline.engines``.
        class_name: the class in it, an :class:`act_pipeline.engines.interface.Engine`.
        rows: returns for each precision and device whether a machine can run it.
        onnx: whether it loads ONNX files, and exports folders to ONNX; otherwise it loads folders only.
        otherwise: the command-line flag that selects another engine, for messages.
        fixed: constructor arguments that the engine's name implies.
        stand_ins: the options ``summary``, ``inference`` and ``machine`` that the constructor takes.
        slow_start: what makes the first start slow, for a message; empty: nothing does.
        shapes: whether it needs collected shapes, and takes the options ``dynamic_shape`` and ``calibrate``.
        int8_note: what to know of its INT8, for a message; empty: nothing.
        int8_weights: whether it computes INT8 from weights that are stored as int8 only.
        requests: whether it takes the option ``requests``: several threads may call ``run`` at the same time.
        int8_target: Q/DQ format that it exports an INT8 model folder in on a CPU, where ``onnx`` is set.
    """

    module: str
    class_name: str
    rows: Callable[[Machine], Iterable[Row]]
    onnx: bool = False
    otherwise: str = "--engine=auto"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    stand_ins: tuple[str, ...] = ()
    slow_start: str = ""
    shapes: bool = False
    int8_note: str = ""
    int8_weights: bool = False
    requests: bool = False
    int8_target: str = "cpu"

    def target(self, precision: str) -> str:
        """Return the Q/DQ format that it exports a model folder in on a CPU, where ``onnx`` is set."""
        return self.int8_target if precision == "int8" else "cpu"


def support(here: Machine | None = None) -> list[EngineSupport]:
    """Return for every engine, precision and device whether a machine can run it.

    Args:
        here: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.

    Returns:
        One entry for each combination that an engine has, available or not, in the order of :data:`REGISTRY`.
    """
    here = here or machine()
    return [entry for name in REGISTRY for entry in _entries(name, here)]


def find_support(name: str, precision: str, device: str, here: Machine | None = None) -> EngineSupport:
    """Return the entry of :func:`support` for one engine, precision and device.

    Args:
        name: a key of :data:`REGISTRY`.
        precision: one of :data:`act_pipeline.engines.PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        here: this machine, or a stand-in; None: :func:`act_pipeline.engines.machine.machine`.

    Raises:
        UserError: there is no such engine, or the engine does not have the precision on the device.
    """
    runtime = find_runtime(name)
    entries = _entries(name, here or machine())
    for entry in entries:
        if (entry.precision, entry.device) == (precision, device):
            return entry
    devices = {entry.device for entry in entries}
    if device not in devices:
        only = " or ".join(sorted(devices))
        raise UserError(
            f"{name} runs on the {only} only; run with --device={only}, or on the {device} with {runtime.otherwise}"
        )
    can = ", ".join(f"{entry.precision} on {entry.device}" for entry in entries)
    others = [entry.engine for entry in support(here) if (entry.precision, entry.device) == (precision, device)]
    instead = f"; {', '.join(others)} has {precision} on {device} (--engine={others[0]})" if others else ""
    raise UserError(f"{name} has no {precision} on {device}; it has {can}{instead}")


def find_runtime(name: str) -> Runtime:
    """Return the registry entry of an engine.

    Raises:
        UserError: there is no such engine; the message suggests a similar name.
    """
    if name not in REGISTRY:
        raise UserError(f"unknown engine {name!r}, expected one of {', '.join(REGISTRY)}{suggest(name, REGISTRY)}")
    return REGISTRY[name]


def _entries(name: str, here: Machine) -> list[EngineSupport]:
    return [
        EngineSupport(name, precision, device, refusal is None, *(refusal or (how, "")))
        for precision, device, refusal, how in REGISTRY[name].rows(here)
    ]


def _paddle_rows(here: Machine) -> list[Row]:
    cpu, gpu = paddle_refusal(here), _paddle_gpu_refusal(here)
    own, exact = "Paddle's own kernels", "every Q/DQ computed in float: exact, slower than fp32"
    return [
        ("fp32", "CPU", cpu, own),
        ("int8", "CPU", cpu, exact),
        ("fp32", "GPU", gpu, own),
        ("fp16", "GPU", gpu, f"{own}, mixed precision"),
        ("int8", "GPU", gpu, exact),
    ]


def _onednn_rows(here: Machine) -> list[Row]:
    refusal = paddle_refusal(here)
    if refusal is None and not here.paddle_onednn:
        refusal = ("this Paddle was built without oneDNN", "run with --use_mkldnn=False")
    how = f"convolutions in INT8 by oneDNN, {_int8_kernels(here)}; the rest float"
    return [("fp32", "CPU", refusal, "oneDNN"), ("int8", "CPU", refusal, how)]


def _simulated_rows(here: Machine) -> list[Row]:
    refusal = paddle_refusal(here)
    if refusal is None and not here.paddle_onednn:
        refusal = ("this Paddle was built without oneDNN", "run with --engine=paddle")
    return [("int8", "CPU", refusal, "every Q/DQ op computed as written, by oneDNN: the results of paddle, sooner")]


def _paddle_trt_rows(here: Machine) -> list[Row]:
    refusal, how = _paddle_trt_refusal(here), _paddle_trt_versions(here)
    return [(precision, "GPU", refusal, how) for precision in ("fp32", "fp16", "int8")]


def _openvino_rows(here: Machine) -> list[Row]:
    refusal = _package_refusal(here, "openvino")
    version = f"OpenVINO {here.packages.get('openvino', '')}"
    no_bf16 = ("this CPU has no bf16 (AVX512-BF16 or AMX)", "run it as fp32")
    return [
        ("fp32", "CPU", refusal, version),
        ("bf16", "CPU", refusal or (None if here.bf16 else no_bf16), f"{version}, bf16 kernels"),
        ("int8", "CPU", refusal, f"{version}, INT8 kernels {_int8_kernels(here)}; the rest f32"),
    ]


def _onnxruntime_rows(here: Machine) -> list[Row]:
    refusal = _package_refusal(here, "onnxruntime")
    version = f"ONNX Runtime {here.packages.get('onnxruntime', '')}"
    gpu = refusal
    if gpu is None and "onnxruntime-gpu" not in here.packages:
        gpu = ("onnxruntime is the CPU package", "pip install onnxruntime-gpu instead of it, or run with --device=CPU")
    elif gpu is None and not here.nvidia_gpus:
        gpu = (here.absent.get("nvidia_gpus", "no NVIDIA GPU"), f"{_CHECK_GPU}, or run with --device=CPU")
    return [
        ("fp32", "CPU", refusal, version),
        ("int8", "CPU", refusal, f"{version}, INT8 kernels {_int8_kernels(here)}; the rest f32"),
        ("fp32", "GPU", gpu, f"{version}, CUDA"),
        ("fp16", "GPU", gpu, f"{version}, CUDA"),
        ("int8", "GPU", gpu, f"{version}, TensorRT"),
    ]


def _tensorrt_rows(here: Machine) -> list[Row]:
    refusal = tensorrt_refusal(here)
    how = "" if refusal else tensorrt_versions()
    return [(precision, "GPU", refusal, how) for precision in ("fp32", "fp16", "int8")]


def paddle_refusal(here: Machine) -> Refusal:
    """Return why Paddle can neither run on the CPU nor read a model folder, and a remedy; None if it can."""
    if here.paddle is None:
        return here.absent.get("paddle", "paddlepaddle is missing"), "run `make demo`, or install requirements/cpu.txt"
    return None


def _paddle_gpu_refusal(here: Machine) -> Refusal:
    if here.paddle is None:
        return paddle_refusal(here)
    if here.cuda is None:
        return here.absent.get("cuda", "paddlepaddle is the CPU package"), f"{_GPU_PACKAGE}, or {_ON_CPU}"
    if not here.gpus:
        return here.absent.get("gpus", "no NVIDIA GPU"), f"{_CHECK_GPU}, or {_ON_CPU}"
    return None


def _paddle_trt_refusal(here: Machine) -> Refusal:
    refusal = _paddle_gpu_refusal(here)
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


def _paddle_trt_versions(here: Machine) -> str:
    compiled = ".".join(map(str, here.tensorrt_compiled or ()))
    runtime = ".".join(map(str, here.tensorrt_runtime or ()))
    return f"TensorRT {runtime}" if runtime == compiled else f"TensorRT {runtime}, built with {compiled}"


def _package_refusal(here: Machine, name: str) -> Refusal:
    """Return which of a runtime's package and ``onnx``, which reads and writes the file, are not installed."""
    missing = [package for package in (name, "onnx") if package not in here.packages]
    if missing:
        remedy = f'pip install "act_pipeline[{name}]", or -r requirements/{name}.txt'
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed", remedy
    return None


def _int8_kernels(here: Machine) -> str:
    if here.avx512_vnni:
        return "with 8-bit dot products (AVX512-VNNI)"
    return "without AVX512-VNNI: slower than float"


_BUILDS = "the first time its TensorRT engine is built, which takes minutes"
REGISTRY: dict[str, Runtime] = {
    "paddle": Runtime(
        "paddle.native",
        "PaddleEngine",
        _paddle_rows,
        stand_ins=("summary", "inference"),
        int8_note="int8 in Paddle's own kernels computes every Q/DQ in float: the accuracy is what the model was made "
        "for, the latency is not what INT8 kernels reach; --engine=auto takes the engine that is fastest here",
    ),
    "paddle_onednn": Runtime(
        "paddle.native",
        "PaddleEngine",
        _onednn_rows,
        otherwise="--use_mkldnn=False",
        fixed={"onednn": True},
        stand_ins=("summary", "inference"),
        # oneDNN's weight pass of Paddle 2.6.2 reads others as int8 bytes: wrong results, and no error.
        int8_weights=True,
    ),  # fmt: skip
    "int8_reference": Runtime(
        "paddle.int8_reference", "Int8ReferenceEngine", _simulated_rows, stand_ins=("summary", "inference", "machine")
    ),  # fmt: skip
    "paddle_trt": Runtime(
        "paddle.tensorrt",
        "PaddleTensorRTEngine",
        _paddle_trt_rows,
        otherwise="--use_trt=False",
        stand_ins=("summary", "inference", "machine"),
        slow_start=_BUILDS,
        shapes=True,
    ),  # fmt: skip
    "openvino": Runtime("onnx_runtimes.openvino", "OpenVINOEngine", _openvino_rows, onnx=True, requests=True),
    "onnxruntime": Runtime(
        "onnx_runtimes.onnxruntime",
        "OnnxRuntimeEngine",
        _onnxruntime_rows,
        onnx=True,
        requests=True,
        int8_target="onnxruntime",
    ),
    "tensorrt": Runtime("tensorrt.engine", "TensorRTEngine", _tensorrt_rows, onnx=True, slow_start=_BUILDS),
}
