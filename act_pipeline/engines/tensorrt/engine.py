"""TensorRT or TensorRT-RTX on an NVIDIA GPU: one plan, one stream, pinned host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from act_pipeline.core.artifacts import Artifact, PlanModel, location
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.package_versions import versions as package_versions
from act_pipeline.engines.arrays import InputCheck
from act_pipeline.engines.interface import refusals
from act_pipeline.engines.machine import Machine
from act_pipeline.engines.onnx_runtimes.onnx_files import decoder_of_file, inspect_onnx
from act_pipeline.engines.tensorrt.cudart import PACKAGE, Cuda, CudaError, Gpu, has_cudart
from act_pipeline.engines.tensorrt.module import (
    INSTALL,
    TensorRT,
    import_tensorrt,
    installed,
    installed_version,
    make_log,
    register_plugins,
)
from act_pipeline.families.registry import Decoder
from act_pipeline.onnx_export.graph_builder import ONNX_PACKAGE

if TYPE_CHECKING:
    from act_pipeline.engines.tensorrt.plan import Say

_ELSEWHERE = "deploy/build_engine.py builds engines without a GPU; to run the model here, --engine=auto"


def tensorrt_refusal(here: Machine) -> tuple[str, str] | None:
    """Return why TensorRT cannot run on a machine, and a remedy, without importing NVIDIA's modules.

    Args:
        here: the machine.

    Returns:
        The reason and the remedy, one line each; None if TensorRT can run.
    """
    if not installed():
        return "neither tensorrt nor tensorrt_rtx is installed", INSTALL
    if "onnx" not in here.packages:
        return "onnx is not installed", ONNX_PACKAGE
    if not here.nvidia_gpus:
        return here.absent.get("nvidia_gpus", "no NVIDIA GPU"), _ELSEWHERE
    if not has_cudart():
        return "cuda-bindings is not installed", PACKAGE
    return None


def tensorrt_versions() -> str:
    """Return the name and version of the installed module of NVIDIA, without importing it; empty if there is none."""
    return ", ".join(f"{flavour.title} {installed_version(flavour)}".rstrip() for flavour in installed()[:1])


class TensorRTEngine:
    """A TensorRT plan on a GPU as an :class:`act_pipeline.engines.interface.Engine`.

    The first load builds the plan, which takes seconds to minutes. It is cached in ``trt_cache/`` in the model's folder
    and reused as long as model, profile, options, version and GPU are the same.

    Attributes:
        last_device_ms: GPU time of the last run in ms, between events before and after the engine, without the copies
            of inputs and outputs; None before the first run.
        gpu: the GPU that runs the plan.
        plan_path: the plan on disk.
    """

    name = "tensorrt"

    def __init__(
        self,
        model: Artifact,
        precision: str = "fp32",
        device: str = "GPU",
        threads: int | None = None,
        *,
        batch_size: int = 1,
        float16_rest: bool = True,
        say: Say | None = None,
        tensorrt: TensorRT | None = None,
        cuda: Cuda | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Export the model to ONNX if it is a folder, build the plan unless it is cached, and load it.

        Args:
            model: float for ``fp32`` and ``fp16``, with Q/DQ for ``int8``; a folder, an ONNX file for TensorRT, or a
                plan, which is loaded as it is.
            precision: ``fp32``, ``fp16`` or ``int8``.
            device: ``GPU``.
            threads: recorded only, without effect on TensorRT; None: all CPUs that this process may use.
            batch_size: the largest batch, for which the plan is optimized.
            float16_rest: for ``int8``, compute what is not INT8 in FP16, except for the post-process in FP32;
                otherwise all of it in FP32.
            say: called with a line about why a plan is built; None: printed to stderr.
            tensorrt: NVIDIA's module or a stand-in; None: imported.
            cuda: the CUDA runtime or a stand-in; None: imported.
            decoder: turns the outputs into detections; None: chosen by the model's description and outputs.

        Raises:
            UserError: a package or the GPU is missing, the file is damaged or in the Q/DQ format of another runtime, or
                TensorRT cannot build or load it.
        """
        from act_pipeline.engines.tensorrt.build import BuildOptions, make_recipe, plan_source
        from act_pipeline.engines.tensorrt.plan import load_or_build, load_plan, print_to_stderr, source_of_plan

        if device != "GPU":
            raise UserError(f"tensorrt runs on the GPU only, found --device={device}; run with --device=GPU")
        self.precision, self.device, self.threads = precision, device, threads or available_cpus()
        self.last_device_ms: float | None = None
        self._cuda, self._trt = cuda or Cuda(), tensorrt or import_tensorrt()
        gpu = self._cuda.gpu()
        if gpu is None:
            raise UserError(f"{self._trt} cannot run here: CUDA finds no GPU, or no driver that fits; {_ELSEWHERE}")
        self.gpu: Gpu = gpu
        self._where = location(model)
        self._settings = {"module": self._trt.name, "gpu": str(gpu), "float16_rest": str(float16_rest)}
        log = make_log(self._trt.module)
        register_plugins(self._trt.module, log)
        self._runtime = self._trt.module.Runtime(log)
        self.artifact: Artifact
        if isinstance(model, PlanModel):
            summary = inspect_onnx(source_of_plan(model))
            engine, largest = load_plan(self._trt, model, batch_size, self._runtime.deserialize_cuda_engine, log)
            self.artifact, self.plan_path = model, model.path
            self._settings = {"module": self._trt.name, "gpu": str(gpu)}
        else:
            options = BuildOptions(float16_rest=float16_rest)
            self.artifact, summary = plan_source(model, precision, self._trt, float16_rest)
            recipe = make_recipe(
                self._trt, gpu, self.artifact, summary, precision=precision, batch_size=batch_size, options=options
            )
            engine, self.plan_path = load_or_build(
                self._trt, model, self.artifact, recipe, self._runtime.deserialize_cuda_engine, say or print_to_stderr
            )
            largest = {name: tuple(shapes[2]) for name, shapes in recipe.profile.items()}
        self._check = InputCheck(self._where, summary.inputs, batch_size, summary.input_dtypes)
        self._log, self._engine = log, engine
        self._decode = decoder_of_file(model, summary, decoder)
        self._outputs = summary.outputs
        with self._refusals("load"):
            self._context = engine.create_execution_context()
            if self._context is None:
                raise UserError(f"{self._trt} cannot load {self._where}: {log.first_error()}")
            self._inputs = {name: _Buffer(self._cuda, 4 * math.prod(shape)) for name, shape in largest.items()}
            for name, buffer in self._inputs.items():
                self._context.set_tensor_address(name, buffer.address)
            self._allocator = _output_allocator(self._trt.module, self._cuda)
            for name in self._output_names():
                self._context.set_output_allocator(name, self._allocator)
            self._start, self._end = self._cuda.event(), self._cuda.event()

    @property
    def settings(self) -> dict[str, str]:
        """Settings other than precision and device that affect results, for the records."""
        return dict(self._settings)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """See :meth:`act_pipeline.engines.interface.Engine.run`."""
        checked = self._check(inputs)
        cuda, context = self._cuda, self._context
        with self._refusals("run"):
            stream = cuda.stream
            for name, array in checked.items():
                context.set_input_shape(name, array.shape)
                cuda.to_device(self._inputs[name].address, self._inputs[name].fill(array))
            cuda.record(self._start)
            if not context.execute_async_v3(stream):
                raise UserError(f"{self._trt} cannot run {self._where}: {self._log.first_error()}")
            cuda.record(self._end)
            # TensorRT calls notify_shape before execute_async_v3 returns, so the shapes are known here.
            arrays = [self._allocator.fetch(name, self._dtype(name)) for name in self._outputs]
            cuda.synchronize()
            self.last_device_ms = cuda.elapsed_ms(self._start, self._end)
        # The next run overwrites the pinned memory.
        return self._decode({name: array.copy() for name, array in zip(self._outputs, arrays)}, inputs)

    def close(self) -> None:
        """Free the plan and its memory."""
        self._context = self._engine = self._runtime = None
        self._cuda.close()

    def versions(self) -> dict[str, str]:
        """Return the versions of TensorRT, CUDA and the packages that exported the model, by name."""
        return {**package_versions(), self._trt.name: self._trt.version, "cuda": self._cuda.version()}

    def _output_names(self) -> list[str]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        output = self._trt.module.TensorIOMode.OUTPUT
        return [name for name in names if self._engine.get_tensor_mode(name) == output]

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(self._trt.module.nptype(self._engine.get_tensor_dtype(name)))

    def _refusals(self, doing: str) -> Any:
        return refusals(f"{self._trt} cannot {doing} {self._where}", also=(CudaError,))


class _Buffer:
    """A buffer on the GPU and one of the same size in pinned host memory."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.address, self.host = cuda.device_memory(size), cuda.pinned_memory(size)

    def fill(self, array: np.ndarray) -> np.ndarray:
        """Copy an array into the pinned memory, and return the bytes that it occupies there."""
        used = self.host[: array.nbytes]
        used.view(array.dtype).reshape(array.shape)[...] = array
        return used


def _output_allocator(module: Any, cuda: Cuda) -> Any:
    """Return an ``IOutputAllocator``: the sizes of the outputs ([K, 6]) are known only while TensorRT runs."""

    class Allocator(module.IOutputAllocator):
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)
            self._sizes: dict[str, int] = {}
            self._device: dict[str, int] = {}
            self._host: dict[str, np.ndarray] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            if name not in self._sizes or size > self._sizes[name]:
                if name in self._device:
                    cuda.free(self._device.pop(name))
                # cudaMalloc aligns to at least 256 bytes, the most that TensorRT requests.
                self._device[name], self._sizes[name] = cuda.device_memory(size), size
            return self._device[name]

        def reallocate_output_async(self, name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self._shapes[name] = tuple(int(length) for length in shape)

        def fetch(self, name: str, dtype: np.dtype) -> np.ndarray:
            """Enqueue the copy of an output to the host, and return the array that will hold it."""
            shape = self._shapes[name]
            size = dtype.itemsize * math.prod(shape)
            if name not in self._host or self._host[name].size < size:
                self._host[name] = cuda.pinned_memory(max(size, self._sizes[name]))
            used = self._host[name][:size]
            if size:
                cuda.to_host(used, self._device[name])
            return used.view(dtype).reshape(shape)

    return Allocator()
