"""``config.pbtxt`` of each model of a repository: preprocessing, detector, postprocessing, and the ensemble of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from act_pipeline.triton.pbtxt import Word, entries

# Triton's names of the element types of ONNX, by their NumPy names.
TYPES = {"float32": "FP32", "float16": "FP16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}
# Made by preprocess.py besides the inputs of the detector, and needed to move its boxes to the original picture.
GEOMETRY = ("im_shape", "scale_factor", "pad_offset")
_GPU_BACKEND = "tensorrt"
# OpenVINO would compute float ops in BF16 on CPUs with AMX; Triton's backend has no parameter against it.
_AS_EVALUATED = {"INFERENCE_PRECISION_HINT": "f32"}
MODEL_FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml", "tensorrt": "model.plan"}


@dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Attributes:
        name: its name.
        dtype: NumPy's name of its type; ``bytes`` for texts.
        shape: its shape with the batch, -1 for a size that may vary.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What the configs are made from.

    Attributes:
        name: name of the ensemble, and the first part of the others' names.
        backend: a key of :data:`MODEL_FILES`.
        max_batch: the largest batch that the server makes of requests; 0: the batch is fixed inside the graph.
        instances: number of copies of the detector.
        queue_delay_us: how long a request waits for others, microseconds.
        inputs, outputs: of the detector, as its file has them.
        classes: names of the classes.
        min_score: detections with lower scores are not answered.
    """

    name: str
    backend: str
    max_batch: int
    instances: int
    queue_delay_us: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    classes: tuple[str, ...]
    min_score: float

    def part(self, kind: str) -> str:
        """Return the name of the model ``preprocess``, ``detector`` or ``postprocess``."""
        return f"{self.name}_{kind}"

    @property
    def batch(self) -> int:
        """The first size of tensors of the models before and after the detector; -1: any."""
        return -1 if self.max_batch else self.inputs[0].shape[0]

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """Outputs of the preprocessing: inputs of the detector, and the geometry that its boxes are moved with."""
        names = {tensor.name for tensor in self.inputs}
        further = [Tensor(name, "float32", (self.batch, 2)) for name in GEOMETRY if name not in names]
        return (*self.inputs, *further)

    @property
    def geometry(self) -> tuple[Tensor, ...]:
        """Outputs of the preprocessing that the postprocessing takes."""
        return tuple(tensor for tensor in self.prepared if tensor.name in GEOMETRY)

    @property
    def answered(self) -> tuple[Tensor, ...]:
        """Outputs of the ensemble."""
        return (
            Tensor("boxes", "float32", (self.batch, -1, 4)),
            Tensor("scores", "float32", (self.batch, -1)),
            Tensor("labels", "int32", (self.batch, -1)),
            Tensor("count", "int32", (self.batch, 1)),
        )

    @property
    def pictures(self) -> tuple[Tensor, ...]:
        """Inputs of the ensemble."""
        return (Tensor("picture", "bytes", (self.batch, 1)),)


def detector_config(plan: Plan) -> dict[str, Any]:
    """Return the config of the detector, in its backend."""
    gpu = plan.backend == _GPU_BACKEND
    return {
        **_head(plan, "detector", plan.backend, plan.inputs, plan.outputs),
        "default_model_filename": MODEL_FILES[plan.backend],
        "instance_group": [{"count": plan.instances, "kind": Word("KIND_GPU" if gpu else "KIND_CPU")}],
        "dynamic_batching": _batching(plan),
        "parameters": entries(_parameters(plan), "string_value") or None,
        "model_warmup": _warmup(plan),
    }


def python_config(plan: Plan, kind: str) -> dict[str, Any]:
    """Return the config of ``preprocess`` or ``postprocess``, in the Python backend."""
    if kind == "preprocess":
        inputs, outputs, parameters = plan.pictures, plan.prepared, {"max_bytes": str(32 << 20)}
    else:
        inputs, outputs = (*plan.outputs, *plan.geometry), plan.answered
        parameters = {"min_score": f"{plan.min_score:g}"}
    return {
        **_head(plan, kind, "python", inputs, outputs),
        "instance_group": [{"count": max(2, plan.instances), "kind": Word("KIND_CPU")}],
        "parameters": entries(parameters, "string_value"),
    }


def ensemble_config(plan: Plan) -> dict[str, Any]:
    """Return the config of the ensemble: the content of a picture file in, detections out."""
    # An output of the detector may have the name of one of the ensemble, such as `boxes`.
    raw = {tensor.name: f"detector_{tensor.name}" for tensor in plan.outputs}

    def own(tensors: Sequence[Tensor]) -> dict[str, str]:
        return {tensor.name: tensor.name for tensor in tensors}

    def step(kind: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
        maps = {"input_map": entries(inputs), "output_map": entries(outputs)}
        return {"model_name": plan.part(kind), "model_version": -1, **maps}

    return {
        "name": plan.name,
        "platform": "ensemble",
        "max_batch_size": plan.max_batch,
        "input": [_tensor(tensor, plan.max_batch) for tensor in plan.pictures],
        "output": [_tensor(tensor, plan.max_batch) for tensor in plan.answered],
        "version_policy": _latest(),
        "parameters": entries({"classes": json.dumps(plan.classes, ensure_ascii=False)}, "string_value"),
        "ensemble_scheduling": {
            "step": [
                step("preprocess", own(plan.pictures), own(plan.prepared)),
                step("detector", own(plan.inputs), raw),
                step("postprocess", {**raw, **own(plan.geometry)}, own(plan.answered)),
            ]
        },
    }


def openvino_server_config(plan: Plan) -> dict[str, Any]:
    """Return the ``config.json`` of OpenVINO Model Server, which serves the detector alone.

    It is for the repository mounted at ``/models``.
    """
    hint = "LATENCY" if plan.instances == 1 else "THROUGHPUT"
    config = {
        "name": plan.name,
        "base_path": f"/models/{plan.part('detector')}",
        "target_device": "CPU",
        "nireq": plan.instances,
        "model_version_policy": {"latest": {"num_versions": 1}},
        "plugin_config": {"PERFORMANCE_HINT": hint, "NUM_STREAMS": str(plan.instances), **_AS_EVALUATED},
    }
    return {"model_config_list": [{"config": config}]}


def warmup_files(plan: Plan) -> dict[str, bytes]:
    """Return the files of the folder ``warmup`` of the detector: zeros as a scale would give boxes that are not finite.

    Returns:
        Name -> float32 values of one batch of the request.
    """
    import numpy as np

    image = next(tensor for tensor in plan.inputs if tensor.name == "image")
    repeat = 1 if plan.max_batch else plan.batch
    values = {"im_shape": image.shape[2:], "scale_factor": (1, 1)}
    return {
        tensor.name: np.tile(np.array(values[tensor.name], np.float32), repeat).tobytes()
        for tensor in plan.inputs
        if tensor.name in values
    }


def _head(plan: Plan, kind: str, backend: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> dict[str, Any]:
    return {
        "name": plan.part(kind),
        "backend": backend,
        "max_batch_size": plan.max_batch,
        "input": [_tensor(tensor, plan.max_batch) for tensor in inputs],
        "output": [_tensor(tensor, plan.max_batch) for tensor in outputs],
        "version_policy": _latest(),
    }


def _latest() -> dict[str, Any]:
    return {"latest": {"num_versions": 1}}


def _tensor(tensor: Tensor, max_batch: int) -> dict[str, Any]:
    """Return an entry of ``input`` or ``output``; with a ``max_batch_size`` its sizes are those of one picture."""
    kind = "STRING" if tensor.dtype == "bytes" else TYPES[tensor.dtype]
    sizes = tensor.shape[1:] if max_batch else tensor.shape
    return {"name": tensor.name, "data_type": Word(f"TYPE_{kind}"), "dims": list(sizes)}


def _batching(plan: Plan) -> dict[str, Any] | None:
    if plan.max_batch < 2:
        return None
    return {
        "preferred_batch_size": [plan.max_batch],
        "max_queue_delay_microseconds": plan.queue_delay_us,
        # A server that cannot follow answers with an error instead of keeping requests for minutes.
        "default_queue_policy": {"max_queue_size": 64 * plan.max_batch},
    }


def _parameters(plan: Plan) -> Mapping[str, str]:
    if plan.backend != "openvino":
        return {}
    found = {"NUM_STREAMS": str(plan.instances), "PERFORMANCE_HINT": "LATENCY" if plan.instances == 1 else "THROUGHPUT"}
    # The backend compiles the model for max_batch_size and refuses other batches unless it may fill them.
    return {**found, "ENABLE_BATCH_PADDING": "YES"} if plan.max_batch > 1 else found


def _warmup(plan: Plan) -> list[dict[str, Any]]:
    files = warmup_files(plan)
    inputs = [
        {
            "key": tensor.name,
            "value": {
                "data_type": Word(f"TYPE_{TYPES[tensor.dtype]}"),
                "dims": list(tensor.shape[1:] if plan.max_batch else tensor.shape),
                "zero_data": None if tensor.name in files else True,
                "input_data_file": tensor.name if tensor.name in files else None,
            },
        }
        for tensor in plan.inputs
    ]
    sizes = sorted({1, max(plan.max_batch, 1)})
    return [{"name": f"batch_{size}", "batch_size": size, "inputs": inputs} for size in sizes]
