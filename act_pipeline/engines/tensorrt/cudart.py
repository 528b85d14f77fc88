"""The CUDA runtime calls that running a plan needs, on one stream, through NVIDIA's ``cuda-bindings``.

``cuda-bindings`` contains the CUDA runtime and needs only the driver; importing it works without a driver.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError

# `cuda-python` up to 12.6 uses the second name.
_MODULES = ("cuda.bindings.runtime", "cuda.cudart")
PACKAGE = 'pip install "act_pipeline[tensorrt-rtx]" (cuda-bindings)'


class CudaError(RuntimeError):
    """A CUDA runtime call failed."""


@dataclass(frozen=True)
class Gpu:
    """The GPU in use.

    Attributes:
        name: NVIDIA's product name.
        compute_capability: (major, minor).
    """

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name}, compute capability {'.'.join(map(str, self.compute_capability))}"


def has_cudart() -> bool:
    """Return whether ``cuda-bindings`` is installed; imports only ``cuda``, a package without code."""
    return _is_there("cuda.bindings") or _is_there("cuda.cudart")


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # there is no `cuda`, or another distribution's `cuda`
        return False


class Cuda:
    """One CUDA stream, and the memory used with it."""

    def __init__(self, runtime: Any = None) -> None:
        """Use the current CUDA device; the stream is created on first use.

        Args:
            runtime: ``cuda.bindings.runtime`` or a stand-in; None: imported.

        Raises:
            UserError: the package is missing.
        """
        self._runtime = runtime or _import_cudart()
        self._stream: Any = None
        self._freeing: dict[int, Any] = {}

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its first result after the error code.

        Args:
            name: the function, such as ``cudaMalloc``.
            *arguments: its arguments.

        Returns:
            The first result, None if the function returns an error code only.

        Raises:
            CudaError: the error code is not ``cudaSuccess``.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            raise CudaError(f"{name}: {getattr(error, 'name', error)}")
        return values[0] if values else None

    def gpu(self) -> Gpu | None:
        """Return the GPU; None if there is no GPU or no driver."""
        try:
            if self.call("cudaGetDeviceCount") == 0:
                return None
            found = self.call("cudaGetDeviceProperties", self.call("cudaGetDevice"))
        except (CudaError, RuntimeError):
            return None
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return Gpu(name.rstrip("\0"), (int(found.major), int(found.minor)))

    def version(self) -> str:
        """Return the version of the CUDA runtime, such as ``12.9``."""
        number = int(self.call("cudaRuntimeGetVersion"))
        return f"{number // 1000}.{number % 1000 // 10}"

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        if self._stream is None:
            self._stream = self.call("cudaStreamCreate")
        return int(self._stream)

    def device_memory(self, size: int) -> int:
        """Allocate ``size`` bytes on the GPU and return their address; :meth:`free` or :meth:`close` frees them."""
        address = int(self.call("cudaMalloc", max(size, 1)))
        self._freeing[address] = "cudaFree"
        return address

    def pinned_memory(self, size: int) -> np.ndarray:
        """Allocate page-locked host memory and return it as uint8 [``size``]; :meth:`close` frees it."""
        address = int(self.call("cudaMallocHost", max(size, 1)))
        self._freeing[address] = "cudaFreeHost"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free(self, address: int) -> None:
        """Free memory of :meth:`device_memory`."""
        self.call(self._freeing.pop(address), address)

    def to_device(self, address: int, source: np.ndarray) -> None:
        """Enqueue a copy of a pinned array to the GPU.

        Args:
            address: address on the GPU.
            source: array in pinned memory, which must not change before :meth:`synchronize`.
        """
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, kind, self._stream)

    def to_host(self, target: np.ndarray, address: int) -> None:
        """Enqueue a copy from the GPU to a pinned array.

        Args:
            target: array in pinned memory, valid after :meth:`synchronize`; its size determines the number of bytes.
            address: address on the GPU.
        """
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, kind, self._stream)

    def event(self) -> Any:
        """Create a timing event; it is never destroyed."""
        return self.call("cudaEventCreate")

    def record(self, event: Any) -> None:
        """Enqueue an event."""
        self.call("cudaEventRecord", event, self._stream)

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two completed events."""
        return float(self.call("cudaEventElapsedTime", start, end))

    def synchronize(self) -> None:
        """Wait until all enqueued work is done."""
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
    """Return the current CUDA device; None if there is no GPU or ``cuda-bindings`` is not installed."""
    return Cuda().gpu() if has_cudart() else None
