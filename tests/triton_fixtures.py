"""Triton's protobuf definitions, and the models of a repository run in this process as its configs say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format

RECORDED = Path(__file__).parent / "data" / "triton"
NUMPY = {"TYPE_FP32": "float32", "TYPE_INT32": "int32", "TYPE_INT64": "int64", "TYPE_STRING": "object"}


def model_config_class() -> Any:
    """Return Triton's message ``ModelConfig``."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(descriptor_pb2.FileDescriptorProto.FromString((RECORDED / "model_config.pb").read_bytes()))
    found = pool.FindMessageTypeByName("inference.ModelConfig")
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(found)
    return message_factory.MessageFactory(pool).GetPrototype(found)  # protobuf 3


def configs_of(repository: Path) -> dict[str, Any]:
    """Return model name -> its parsed config; a field or value that Triton does not know is an error."""
    kind = model_config_class()
    return {
        path.parent.name: text_format.Parse(path.read_text(encoding="utf-8"), kind())
        for path in repository.glob("*/config.pbtxt")
    }


def as_json(config: Any) -> dict[str, Any]:
    """Return a config as the Python backend gives it to a model."""
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def data_type(value: Any) -> str:
    return value.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[value.data_type].name


class _Response(SimpleNamespace):
    def __init__(self, output_tensors: list, error: Any = None) -> None:
        super().__init__(tensors={tensor.name: tensor.as_numpy() for tensor in output_tensors}, error=error)


class _Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self.name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array


def python_backend() -> ModuleType:
    """Return a stand-in of ``triton_python_backend_utils``."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = _Tensor, _Response, str
    module.get_input_tensor_by_name = lambda request, name: request[name]
    return module


class Refusal(Exception):
    """An error of one request."""


class Server:
    """Runs one request at a time, with the checks of types and sizes that Triton does.

    Attributes:
        configs: model name -> parsed config.
    """

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", python_backend())
        monkeypatch.setattr(sys, "path", list(sys.path))
        self._folder, self.configs = repository, configs_of(repository)
        self._models = {name: self._load(name) for name, config in self.configs.items() if config.backend}

    def _load(self, name: str) -> Any:
        config, folder = self.configs[name], self._folder / name / "1"
        if config.backend == "python":
            spec = importlib.util.spec_from_file_location(f"model_of_{name}", folder / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            model = module.TritonPythonModel()
            model.initialize({"model_config": json.dumps(as_json(config))})
            return lambda inputs: _python(model, inputs)
        if config.backend == "openvino":
            return _OpenVINO(config, folder)
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(folder / config.default_model_filename))
        names = [value.name for value in config.output]
        return lambda inputs: dict(zip(names, session.run(names, inputs)))

    def run(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a model or of an ensemble."""
        config = self.configs[name]
        self._check(config, config.input, inputs)
        if config.platform == "ensemble":
            found = self._ensemble(config, inputs)
        else:
            found = self._models[name](inputs)
        self._check(config, config.output, found)
        return found

    def _ensemble(self, config: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = dict(inputs)
        for step in config.ensemble_scheduling.step:
            made = self.run(step.model_name, {name: tensors[tensor] for name, tensor in step.input_map.items()})
            tensors.update({tensor: made[name] for name, tensor in step.output_map.items()})
        return {value.name: tensors[value.name] for value in config.output}

    def _check(self, config: Any, stated: Any, arrays: dict[str, np.ndarray]) -> None:
        assert {value.name for value in stated} == set(arrays), config.name
        for value in stated:
            array = arrays[value.name]
            assert array.dtype == NUMPY[data_type(value)], (config.name, value.name, array.dtype)
            sizes = array.shape[1:] if config.max_batch_size else array.shape
            assert len(sizes) == len(value.dims), (config.name, value.name, array.shape)
            assert all(want in (-1, size) for want, size in zip(value.dims, sizes)), (config.name, value.name, sizes)


def _python(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    (response,) = model.execute([{name: _Tensor(name, np.ascontiguousarray(a)) for name, a in inputs.items()}])
    if response.error is not None:
        raise Refusal(response.error)
    return response.tensors


class _OpenVINO:
    """Compiles for ``max_batch_size``, compares the sizes of the outputs, and fills batches, as Triton's backend does."""

    def __init__(self, config: Any, folder: Path) -> None:
        import openvino

        model = openvino.Core().read_model(str(folder / config.default_model_filename))
        self._most = config.max_batch_size
        if self._most:
            for parameter in model.get_parameters():
                parameter.set_layout(openvino.Layout("N..."))
            openvino.set_batch(model, self._most)
        for value in config.output:
            shape = list(model.output(value.name).get_partial_shape())
            sizes = [size.get_length() if size.is_static else -1 for size in shape]
            assert list(value.dims) == (sizes[1:] if self._most else sizes), (value.name, value.dims, sizes)
        parameters = {key: value.string_value for key, value in config.parameters.items()}
        assert self._most < 2 or parameters["ENABLE_BATCH_PADDING"] == "YES"
        self._names = [value.name for value in config.output]
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(model, "CPU", hint)

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(next(iter(inputs.values())))
        fill = max(self._most - count, 0)
        filled = {
            name: np.concatenate([array, np.zeros_like(array[:1]).repeat(fill, 0)]) for name, array in inputs.items()
        }
        found = self._compiled(filled)
        rows = {name: np.array(found[name]) for name in self._names}
        return {name: array[:count] for name, array in rows.items()} if self._most else rows
