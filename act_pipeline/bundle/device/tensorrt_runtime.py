"""A plan of TensorRT or TensorRT-RTX on the GPU: one stream, pinned memory, the CUDA runtime by ctypes."""

import ctypes
import ctypes.util
import glob
import importlib
import os
import sys

import numpy as np
from preprocess import Refused, one_line

TYPES = {"FLOAT": "f4", "HALF": "f2", "INT32": "i4", "INT64": "i8", "INT8": "i1", "UINT8": "u1", "BOOL": "?"}
TO_DEVICE, TO_HOST = 1, 2


class Cuda:
    """The calls of the CUDA runtime that a plan needs; ``library`` is libcudart or a stand-in."""

    def __init__(self, library=None):
        self._library = library or _libcudart()
        self.stream = ctypes.c_void_p()
        self.call("cudaStreamCreate", ctypes.byref(self.stream))

    def call(self, name, *arguments):
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            raise Refused("CUDA: %s fails with error %d; check the driver (nvidia-smi)" % (name, code))

    def device(self, size):
        """Allocate bytes on the GPU and return their address."""
        address = ctypes.c_void_p()
        self.call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def pinned(self, size):
        """Allocate page-locked memory of the host, and return it as uint8 [size]."""
        address = ctypes.c_void_p()
        self.call("cudaMallocHost", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * max(size, 1)).from_address(address.value))

    def free(self, address):
        self.call("cudaFree", ctypes.c_void_p(address))

    def copy(self, target, source, size, kind):
        pointers = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self.call("cudaMemcpyAsync", pointers[0], pointers[1], ctypes.c_size_t(size), kind, self.stream)

    def wait(self):
        self.call("cudaStreamSynchronize", self.stream)


class Buffer:
    """Memory on the GPU, and as much page-locked memory of the host; both grow on demand."""

    def __init__(self, cuda):
        self._cuda, self.size, self.address, self.host = cuda, -1, 0, None

    def grow(self, size):
        if size > self.size:
            if self.address:
                self._cuda.free(self.address)
            self.address, self.host, self.size = self._cuda.device(size), self._cuda.pinned(size), size
        return self.address

    def send(self, array):
        self.grow(array.nbytes)
        self.host[: array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        self._cuda.copy(self.address, self.host.ctypes.data, array.nbytes, TO_DEVICE)

    def fetch(self, size):
        if size:
            self._cuda.copy(self.host.ctypes.data, self.address, size, TO_HOST)


class TensorRT:
    """A plan; ``module`` and ``cuda`` are stand-ins for tests."""

    def __init__(self, bundle, path, module=None, cuda=None):
        trt = module or import_module(bundle)
        self.title, self._trt, self._cuda = "TensorRT " + trt.__version__, trt, cuda or Cuda()
        self._logger = trt.Logger(trt.Logger.ERROR)
        if hasattr(trt, "init_libnvinfer_plugins"):
            trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime = trt.Runtime(self._logger)
        with open(path, "rb") as file:
            self._engine = self._runtime.deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise Refused("%s does not load %s: run ./build.sh again on this machine" % (self.title, path))
        self._context = self._engine.create_execution_context()
        self._names = bundle["outputs"]
        self._buffers = {name: Buffer(self._cuda) for name in list(bundle["inputs"]) + self._names}
        self._by_name = hasattr(self._engine, "num_io_tensors")  # from 8.5 on
        self._shapes = {}
        if self._by_name:
            self._allocator = _allocator(trt, self._buffers, self._shapes)
            for name in self._names:
                self._context.set_output_allocator(name, self._allocator)

    def run(self, inputs):
        return self._run_by_name(inputs) if self._by_name else self._run_by_place(inputs)

    def _run_by_name(self, inputs):
        for name, array in inputs.items():
            self._context.set_input_shape(name, array.shape)
            self._buffers[name].send(array)
            self._context.set_tensor_address(name, self._buffers[name].address)
        if not self._context.execute_async_v3(self._cuda.stream.value or 0):
            raise Refused("TensorRT fails to run the plan, see its message above")
        types = {name: _dtype(self._engine.get_tensor_dtype(name)) for name in self._names}
        return self._fetch(types, self._shapes)

    def _run_by_place(self, inputs):
        """Run with TensorRT 8.2 to 8.4, whose outputs have sizes that are known beforehand."""
        engine, context = self._engine, self._context
        places = {engine.get_binding_name(place): place for place in range(engine.num_bindings)}
        for name, array in inputs.items():
            context.set_binding_shape(places[name], array.shape)
            self._buffers[name].send(array)
        types = {name: _dtype(engine.get_binding_dtype(places[name])) for name in self._names}
        shapes = {name: tuple(context.get_binding_shape(places[name])) for name in self._names}
        for name, shape in shapes.items():
            self._buffers[name].grow(types[name].itemsize * int(np.prod(shape)))
        addresses = [0] * engine.num_bindings
        for name, place in places.items():
            addresses[place] = self._buffers[name].address
        if not context.execute_async_v2(addresses, self._cuda.stream.value or 0):
            raise Refused("TensorRT fails to run the plan, see its message above")
        return self._fetch(types, shapes)

    def _fetch(self, types, shapes):
        sizes = {name: types[name].itemsize * int(np.prod(shapes[name])) for name in self._names}
        for name, size in sizes.items():
            self._buffers[name].fetch(size)
        self._cuda.wait()
        hosts = {name: self._buffers[name].host for name in self._names}
        return [hosts[name][: sizes[name]].view(types[name]).reshape(shapes[name]).copy() for name in self._names]


def _allocator(trt, buffers, shapes):
    class Allocator(trt.IOutputAllocator):
        def __init__(self):
            trt.IOutputAllocator.__init__(self)

        def reallocate_output(self, name, memory, size, alignment):
            return buffers[name].grow(size)

        def reallocate_output_async(self, name, memory, size, alignment, stream):
            return buffers[name].grow(size)

        def notify_shape(self, name, shape):
            shapes[name] = tuple(int(length) for length in shape)

    return Allocator()


def _dtype(dtype):
    return np.dtype(TYPES[dtype.name])


def import_module(bundle):
    names = ["tensorrt_rtx", "tensorrt_rtx_bindings"] if bundle["target"] == "rtx" else ["tensorrt"]
    problems = []
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            problems.append("%s: %s" % (name, one_line(error)))
    raise Refused("cannot import %s" % problems[0])


def _libcudart():
    """Return the CUDA runtime of JetPack, of a CUDA installation, or of NVIDIA's wheels."""
    found = [ctypes.util.find_library("cudart"), "libcudart.so"]
    found += sorted(glob.glob("/usr/local/cuda*/lib64/libcudart.so*"), reverse=True)
    for folder in sys.path:
        for inside in ("cuda_runtime", "cu*"):
            found += glob.glob(os.path.join(folder, "nvidia", inside, "lib", "libcudart.so*"))
    for name in filter(None, found):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Refused("libcudart is missing: install CUDA's runtime (JetPack has it; else pip install nvidia-cuda-runtime)")
