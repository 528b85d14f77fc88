"""The few calls of the CUDA runtime that running a plan takes, on one stream, through NVIDIA's ``cuda-bindings``.

``cuda-bindings`` carries its own CUDA runtime and needs nothing but the driver; it imports on a machine without one.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError

# Up to 12.6 `cuda-python` had it under the second name.
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
PACKAGE = 'pip install "act_pipeline[tensorrt-rtx]" (cuda-bindings)'


class CudaError(RuntimeError):
    """A call of the CUDA runtime that did not succeed."""


@dataclass(frozen=True)
class Gpu:
    """The GPU in use.

    Attributes:
        name: NVIDIA's.
        compute_capability: (major, minor).
    """

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}, compute capability {'.'.join(map(str, self.compute_capability))}"


def has_cudart() -> bool:
    """Return whether the package is installed; imports no more than ``cuda``, a folder without code."""
    return _is_there("cuda.bindings") or _is_there("cuda.cudart")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # no `cuda`, or one of another package's
        return False


class Cuda:
    """One CUDA stream, and memory for it."""

    def __init__(self, runtime: Any = None) -> None:
        """Take the first GPU that CUDA shows (``CUDA_VISIBLE_DEVICES``); the stream is made when it is first used.

        Args:
            runtime: ``cuda.bindings.runtime``, or a stand-in with its names.

        Raises:
            UserError: the package is missing.
        """
        self._runtime = runtime or _import_cudart()
        self._stream: Any = None
        self._freeing: dict[int, Any] = {}

    def call(self, name: str, *arguments: Any) -> Any:
        """Return what a function of the runtime gives beside its error code.

        Raises:
            CudaError: the code is not ``cudaSuccess``.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            raise CudaError(f"{name}: {getattr(error, 'name', error)}")
        return values[0] if values else None

    def gpu(self) -> Gpu | None:
        """Return the GPU, None if there is none, or no driver."""
        try:
            if self.call("cudaGetDeviceCount") == 0:
                return None
            found = self.call("cudaGetDeviceProperties", self.call("cudaGetDevice"))
        except (CudaError, RuntimeError):
            return None
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return Gpu(name.rstrip("\0"), (int(found.major), int(found.minor)))

    def version(self) -> str:
        """Return the version of the CUDA runtime, ``12.9``."""
        number = int(self.call("cudaRuntimeGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    @property
    def stream(self) -> int:
        """The stream's handle."""
        if self._stream is None:
            self._stream = self.call("cudaStreamCreate")
        return int(self._stream)

    def device_memory(self, size: int) -> int:
        """Return the address of ``size`` bytes on the GPU; freed by :meth:`free` or :meth:`close`."""
        address = int(self.call("cudaMalloc", max(size, 1)))
        self._freeing[address] = "cudaFree"
        return address

    def pinned_memory(self, size: int) -> np.ndarray:
        """Return ``size`` page-locked bytes of the host as uint8; freed by :meth:`close`."""
        address = int(self.call("cudaMallocHost", max(size, 1)))
        self._freeing[address] = "cudaFreeHost"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self, address: int) -> None:
        """Free what :meth:`device_memory` gave."""
        self.call(self._freeing.pop(address), address)

    def to_device(self, address: int, source: np.ndarray) -> None:
        """Copy pinned bytes to the GPU, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def to_host(self, target: np.ndarray, address: int) -> None:
        """Copy from the GPU to pinned bytes, in the stream's order; there after :meth:`synchronize`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def event(self) -> Any:
        """Return an event that measures time; lives until the process ends."""
        return self.call("cudaEventCreate")

    def record(self, event: Any) -> None:
        """Put an event into the stream."""
        self.call("cudaEventRecord", event, self._stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two events that have passed."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def synchronize(self) -> None:
        """Wait until all that was put into the stream is done."""
        self.call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free all memory and the stream; a second call does nothing."""
        while self._freeing:
            address, name = self._freeing.popitem()
            self.call(name, address)
        if self._stream is not None:
            stream, self._stream = self._stream, None
            self.call("cudaStreamDestroy", stream)


def _import_cudart() -> Any:
    for name in _MODULES:
        if _is_there(name):
            return importlib.import_module(name)
    raise UserError(f"cuda-bindings is not installed, which runs TensorRT's engines; install it: {PACKAGE}")


def current_gpu() -> Gpu | None:
    """Return the GPU that CUDA shows first, None if there is none or ``cuda-bindings`` is missing."""
    return Cuda().gpu() if has_cudart() else None
