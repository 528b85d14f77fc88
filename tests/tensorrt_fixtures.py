"""Test doubles of NVIDIA's modules that record their calls, and an INT8 model with a bias."""

from __future__ import annotations

import ctypes
import enum
import json
from pathlib import Path
from types import SimpleNamespace

import inference_fixtures
import numpy as np
from inference_fixtures import OBJECT, export_tiny_model

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines.tensorrt.cudart import Cuda
from act_pipeline.engines.tensorrt.module import TensorRT


def export_biased_model(directory: Path, monkeypatch) -> InferenceModel:
    """Export the tiny INT8 model with a bias after its convolution and an observer pair, in ACT's format.

    ``data/paddle2onnx/int8_conv.onnx`` was converted from it by ``paddle2onnx --model_dir DIR --model_filename
    model.pdmodel --params_filename model.pdiparams --opset_version 16`` (1.2.11, onnx 1.17).
    """
    convolution = inference_fixtures._quantized_conv

    def biased_convolution(image):
        import paddle

        block = paddle.static.default_main_program().global_block()

        def constant(name, value):
            attr = paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(value))
            return paddle.static.create_parameter(list(value.shape), str(value.dtype), name, attr=attr)

        def append(kind, inputs, output, attrs):
            made = block.create_var(name=f"biased.{kind}", dtype="float32", shape=features.shape)
            block.append_op(type=kind, inputs=inputs, outputs={output: [made]}, attrs=attrs)
            return made

        features = convolution(image)
        bias = constant("bias", np.linspace(-1, 1, 8, dtype=np.float32))
        value = append("elementwise_add", {"X": [features], "Y": [bias]}, "Out", {"axis": 1})
        scale = {
            "Scale": [constant("biased@scale", np.float32([8]))],
            "ZeroPoint": [constant("biased@zero_point", np.int32([0]))],
        }
        attrs = {"quant_axis": -1, "bit_length": 8, "only_observer": True}
        for kind in ("quantize_linear", "dequantize_linear"):
            value = append(kind, {"X": [value], **scale}, "Y", attrs)
        return value

    monkeypatch.setattr(inference_fixtures, "_quantized_conv", biased_convolution)
    return export_tiny_model(directory, quantized=True)


class _Error(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815  (NVIDIA's names, here and below)
    cudaErrorNoDevice = 100  # noqa: N815


class FakeCudaRuntime:
    """A test double of ``cuda.bindings.runtime`` in host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self, name: str | None = "Test GPU", compute_capability: tuple[int, int] = (8, 6)):
        self.name, self.compute_capability = name, compute_capability
        self.memory: dict[int, ctypes.Array] = {}
        self.streams = 0

    def __getattr__(self, name):
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *arguments: (_Error.cudaSuccess, 1)  # events, recording, synchronizing

    def cudaGetDeviceCount(self):  # noqa: N802
        return (_Error.cudaSuccess, 1) if self.name else (_Error.cudaErrorNoDevice, None)

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        major, minor = self.compute_capability
        return _Error.cudaSuccess, SimpleNamespace(name=self.name.encode(), major=major, minor=minor)

    def cudaRuntimeGetVersion(self):  # noqa: N802
        return _Error.cudaSuccess, 12090

    def cudaMalloc(self, size):  # noqa: N802
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return _Error.cudaSuccess, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address):  # noqa: N802
        del self.memory[address]
        return (_Error.cudaSuccess,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaStreamCreate(self):  # noqa: N802
        self.streams += 1
        return _Error.cudaSuccess, 7

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.streams -= 1
        return (_Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        ctypes.memmove(target, source, size)
        return (_Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):  # noqa: N802
        return _Error.cudaSuccess, 1.25


def fake_cuda(**options) -> Cuda:
    return Cuda(FakeCudaRuntime(**options))


def fake_tensorrt(version: str = "10.9.0", name: str = "tensorrt", **options) -> TensorRT:
    title = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[name]
    return TensorRT(FakeModule(version, **options), name, title)


class FakeModule:
    """A test double of the parts of ``tensorrt`` that the engine uses; a plan is JSON of the builder's settings.

    Attributes:
        builds: number of engines built.
        refuse: a parser error: node's number, name, op, message.
        loads: whether a built plan can be loaded.
    """

    def __init__(self, version: str, refuse: tuple | None = None, loads: bool = True):
        self.__version__ = version
        self.refuse, self.loads, self.builds, self.loaded = refuse, loads, 0, 0
        typed = int(version.split(".")[0]) >= 10 or version.startswith("1.")
        self.NetworkDefinitionCreationFlag = SimpleNamespace(
            **({"STRONGLY_TYPED": 1} if typed else {"EXPLICIT_BATCH": 0})
        )
        self.BuilderFlag = SimpleNamespace(**({} if typed else {"INT8": "INT8", "FP16": "FP16"}))
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed", LAYER_NAMES_ONLY="names")
        self.ComputeCapability = SimpleNamespace(SM75="SM75", SM89="SM89", SM120="SM120")
        self.LayerType = SimpleNamespace(CONVOLUTION=0, MATRIX_MULTIPLY=1, DEQUANTIZE=2, SHUFFLE=3)
        self.TensorIOMode = SimpleNamespace(INPUT="in", OUTPUT="out")
        self.ILogger = _Logger
        self.IOutputAllocator = type("IOutputAllocator", (), {})
        self.nptype = lambda dtype: dtype

    def Builder(self, log):  # noqa: N802
        return _Builder(self)

    def OnnxParser(self, network, log):  # noqa: N802
        return _Parser(self, network)

    def Runtime(self, log):  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def _load(self, plan: bytes):
        self.loaded += 1
        told = json.loads(plan)
        return _Engine() if self.loads and told["version"] == self.__version__ else None


class _Logger:
    Severity = SimpleNamespace(INTERNAL_ERROR="internal", ERROR="error", WARNING="warning")


class _Builder:
    def __init__(self, module):
        self._module = module

    def create_network(self, flags):
        return SimpleNamespace(flags=flags, num_layers=0, num_inputs=0)

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        shapes = {}
        return SimpleNamespace(shapes=shapes, set_shape=lambda name, *sizes: shapes.__setitem__(name, sizes))

    def build_serialized_network(self, network, config):
        self._module.builds += 1
        told = {"version": self._module.__version__, "network_flags": network.flags, **config.told}
        return json.dumps(told).encode()


class _Config:
    def __init__(self):
        object.__setattr__(self, "told", {"flags": []})

    def __setattr__(self, name, value):
        self.told[name] = value

    def set_flag(self, flag):
        self.told["flags"].append(flag)

    def set_memory_pool_limit(self, pool, size):
        self.told[pool] = size

    def add_optimization_profile(self, profile):
        self.told["profile"] = profile.shapes

    def set_compute_capability(self, capability, index):
        self.told["capability"] = capability

    def create_timing_cache(self, content):
        return SimpleNamespace(serialize=lambda: content + b"t")

    def set_timing_cache(self, cache, ignore_mismatch):
        self.told["timings"] = len(cache.serialize())


class _Parser:
    def __init__(self, module, network):
        self._module, self.num_errors = module, int(module.refuse is not None)

    def parse(self, content):
        return self._module.refuse is None

    def get_error(self, index):
        number, node, op, said = self._module.refuse
        error = {"node": lambda: number, "desc": lambda: said}
        if op is not None:
            error.update(node_name=lambda: node, node_operator=lambda: op)
        return SimpleNamespace(**error)


class _Engine:
    """An engine that detects ``OBJECT`` once per image, twice in the second; the row count is known after the run."""

    _TYPES = {"image": np.float32, "im_shape": np.float32, "scale_factor": np.float32,
              "bbox": np.float32, "bbox_num": np.int32}  # fmt: skip
    num_io_tensors = len(_TYPES)

    def get_tensor_name(self, index):
        return list(self._TYPES)[index]

    def get_tensor_mode(self, name):
        return "out" if name.startswith("bbox") else "in"

    def get_tensor_dtype(self, name):
        return self._TYPES[name]

    def get_tensor_profile_shape(self, name, index):
        shapes = {"image": (3, 32, 32), "im_shape": (2,), "scale_factor": (2,)}[name]
        return [(batch, *shapes) for batch in (1, 4, 4)]

    def create_execution_context(self):
        return _Context()


class _Context:
    def __init__(self):
        self._addresses, self._shapes, self._allocators = {}, {}, {}

    def set_tensor_address(self, name, address):
        self._addresses[name] = address

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape

    def set_output_allocator(self, name, allocator):
        self._allocators[name] = allocator

    def _input(self, name):
        count = int(np.prod(self._shapes[name]))
        values = (ctypes.c_float * count).from_address(self._addresses[name])
        return np.ctypeslib.as_array(values).reshape(self._shapes[name])

    def execute_async_v3(self, stream):
        counts = np.ones(len(self._input("image")), np.int32)
        counts[1:2] = 2
        original = np.repeat(self._input("im_shape") / self._input("scale_factor"), counts, 0)
        sides = original[:, [1, 0, 1, 0]] * np.float32(OBJECT)
        score = np.repeat(self._input("image").max((1, 2, 3)), counts)[:, None]
        outputs = {"bbox": np.hstack([score * 0, score, sides]).astype(np.float32), "bbox_num": counts}
        for name, array in outputs.items():
            array = np.ascontiguousarray(array)
            allocator = self._allocators[name]
            address = allocator.reallocate_output_async(name, 0, array.nbytes, 256, stream)
            ctypes.memmove(address, array.ctypes.data, array.nbytes)
            allocator.notify_shape(name, array.shape)
        return True
