"""From a model folder to a repository for Triton: models, their configs, and the scripts of the Python backend."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.bundle.build_script import build_script
from act_pipeline.bundle.content import device_model, write_onnx, write_openvino
from act_pipeline.bundle.description import describe
from act_pipeline.bundle.make import DEVICE_FILES
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.output_folders import new_artifact, require_replaceable
from act_pipeline.core.records import write_record
from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
from act_pipeline.engines.tensorrt.build import make_profile
from act_pipeline.engines.tensorrt.targets import RTX, Target, Version, find_target
from act_pipeline.triton.by_picture import detections_by_picture, shapes_at_batch
from act_pipeline.triton.guide import guide
from act_pipeline.triton.model_configs import (
    MODEL_FILES,
    Plan,
    Tensor,
    detector_config,
    ensemble_config,
    openvino_server_config,
    python_config,
    warmup_files,
)
from act_pipeline.triton.pbtxt import text_of

BACKENDS = tuple(MODEL_FILES)
RECORD, SCHEMA = "repository.json", "act_pipeline.triton/1"
PYTHON_MODELS = Path(__file__).parent / "python_models"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_PLUGIN = "EfficientNMS_TRT"
_SERVED = ("cpu", "t4", "a10", "orin", "xavier")

Say = Callable[[str], None]


@dataclass(frozen=True)
class RepositoryRequest:
    """What to put into a repository.

    Attributes:
        model_path: the model's folder.
        output: the repository's folder.
        backend: one of :data:`BACKENDS`; None: by the target.
        target: name of the device, a key of :data:`act_pipeline.engines.tensorrt.targets.TARGETS`.
        tensorrt: version of TensorRT in the server, such as ``10``; None: the usual one of the target.
        name: name of the ensemble.
        max_batch: the largest batch that the server makes of requests; None: by the backend and the target.
        instances: number of copies of the detector.
        queue_delay_us: how long a request waits for others, microseconds.
        min_score: detections with lower scores are not answered, in [0, 1].
        reader_config: reader YAML; None: the preprocessing of the model's ``infer_cfg.yml``.
        model_filename, params_filename: files in the model's folder.
    """

    model_path: str
    output: str
    backend: str | None = None
    target: str = "cpu"
    tensorrt: str | None = None
    name: str = "detect"
    max_batch: int | None = None
    instances: int = 1
    queue_delay_us: int = 2000
    min_score: float = 0.3
    reader_config: str | None = None
    model_filename: str = "model.pdmodel"
    params_filename: str = "model.pdiparams"


@dataclass(frozen=True)
class TritonRepository:
    """A repository on disk.

    Attributes:
        path: its folder.
        plan: what its configs were made from.
        built_there: whether the engine has to be built on the server's machine first.
    """

    path: Path
    plan: Plan
    built_there: bool

    def summary(self) -> str:
        """Return a description for users, of a few lines."""
        plan = self.plan
        batches = f"batches of up to {plan.max_batch}" if plan.max_batch else f"batches of {plan.batch}, fixed inside"
        lines = [
            f"repository for Triton: {self.path}, ensemble {plan.name}",
            f"{plan.backend}, {batches}, {plan.instances} instance{'s' if plan.instances > 1 else ''}",
        ]
        if plan.backend == "openvino" and plan.max_batch > 1:
            lines.append(
                f"the OpenVINO backend computes every batch as one of {plan.max_batch}: a single picture costs as much"
            )
        if self.built_there:
            lines.append(f"there, first: ./build.sh, which writes {plan.part('detector')}/1/model.plan")
        return "\n".join([*lines, f"there: tritonserver --model-repository={self.path.name}; less README.md"])


def make_repository(request: RepositoryRequest, say: Say = lambda line: None) -> TritonRepository:
    """Make a repository.

    Args:
        request: what to put into it.
        say: called with a progress line.

    Returns:
        The repository; it is complete or absent.

    Raises:
        UserError: an argument is wrong, the output folder holds something else, the server cannot run the model, or its
            preprocessing or family is unknown to the scripts.
    """
    target, backend, version = _place(request)
    _check(request)
    output = Path(request.output)
    require_replaceable(output, RECORD, "--output")
    model = InferenceModel.load(request.model_path, request.model_filename, request.params_filename)
    known = device_model(model, target, version, request.reader_config, "give --reader_config")
    wanted = request.max_batch or (1 if backend == "openvino" else target.batch)
    with tempfile.TemporaryDirectory(prefix="act-triton-") as made, new_artifact(output) as folder:
        say(f"writing the ONNX file for {target.device}")
        path = Path(made) / "model.onnx"
        lowered = write_onnx(model, path, target, version, wanted, known.nms, backend)
        onnx_summary = inspect_onnx(OnnxModel(path))
        description = describe(
            target, version, lowered, onnx_summary, known.decoder, steps=known.steps, classes=known.classes, files={},
            profile=None, batch=lowered.batch or wanted, source_hash=model.content_hash(),
        )  # fmt: skip
        by_picture = lowered.batch is None and onnx_summary.outputs == ("bbox", "bbox_num")
        if by_picture:
            detections_by_picture(path, str(model.directory), fixed_only=backend == "tensorrt")
        file = _write_detector(path, folder / f"{request.name}_detector" / "1", backend)
        max_batch = wanted if lowered.batch is None else 0
        plan = Plan(
            name=request.name,
            backend=backend,
            max_batch=max_batch,
            instances=request.instances,
            queue_delay_us=request.queue_delay_us,
            inputs=_tensors(path, "input"),
            outputs=_outputs(path, file, max_batch),
            classes=tuple(known.classes),
            min_score=request.min_score,
        )
        _write_models(folder, plan, {**description, "by_picture": by_picture})
        if version is not None:
            profile = make_profile(OnnxModel(path), onnx_summary, wanted) if max_batch else None
            _write_build(folder, path, plan, target, version, lowered.precision == "int8", profile)
        elif backend == "openvino":
            (folder / "config.json").write_text(json.dumps(openvino_server_config(plan), indent=2) + "\n", "utf-8")
        record = {key: description[key] for key in ("target", "tensorrt", "precision", "family", "source_hash")}
        write_record(folder / RECORD, SCHEMA, {"backend": backend, "max_batch": max_batch, **record})
        (folder / "README.md").write_text(guide(plan, target, version), encoding="utf-8")
    return TritonRepository(output, plan, backend == "tensorrt")


def _place(request: RepositoryRequest) -> tuple[Target, str, Version | None]:
    """Return the device, the backend, and TensorRT's version; None: another backend."""
    target = find_target(request.target)
    if target.name not in _SERVED:
        why = "Triton has no backend for TensorRT-RTX" if target.name == RTX else f"{target.device} is too small"
        raise UserError(f"--target is {target.name!r}, but {why}, expected one of {', '.join(_SERVED)}")
    backend = request.backend or ("tensorrt" if target.versions else "openvino")
    if backend not in BACKENDS:
        raise UserError(f"--backend is {backend!r}, expected one of {', '.join(BACKENDS)}{suggest(backend, BACKENDS)}")
    if (backend == "tensorrt") != bool(target.versions):
        fits = f"one of {', '.join(_SERVED[1:])}" if backend == "tensorrt" else "cpu"
        raise UserError(f"--backend={backend} contradicts --target={target.name}, expected --target={fits}")
    return target, backend, target.version(request.tensorrt)


def _check(request: RepositoryRequest) -> None:
    if not _NAME.fullmatch(request.name):
        raise UserError(f"--name is {request.name!r}, expected letters, digits, '_' and '-'")
    if not 0 <= request.min_score <= 1:
        raise UserError(f"--min_score is {request.min_score:g}, expected 0 to 1")
    for flag, least in (("max_batch", 1), ("instances", 1), ("queue_delay_us", 0)):
        value = getattr(request, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} is {value}, expected at least {least}")


def _write_detector(path: Path, folder: Path, backend: str) -> Path:
    """Write the file that the backend runs into a version's folder, and return it.

    Nothing is written for TensorRT, whose engine is built on the server's machine: returns what it is built from.
    """
    folder.mkdir(parents=True)
    if backend == "tensorrt":
        return path
    file = folder / MODEL_FILES[backend]
    if backend == "openvino":
        write_openvino(path, file)
    else:
        shutil.copyfile(path, file)
    return file


def _write_build(
    folder: Path, path: Path, plan: Plan, target: Target, version: Version, quantized: bool, profile: Any
) -> None:
    """Write the ONNX file and the script that builds the engine on the server's machine."""
    shutil.copyfile(path, folder / "model.onnx")
    script = build_script(
        target,
        version,
        "model.onnx",
        quantized=quantized,
        profile=profile,
        engine=f"{plan.part('detector')}/1/{MODEL_FILES[plan.backend]}",
        next_step="tritonserver --model-repository=.",
        by_python=False,
    )
    (folder / "build.sh").write_text(script, encoding="utf-8")
    (folder / "build.sh").chmod(0o755)


def _write_models(folder: Path, plan: Plan, description: dict[str, Any]) -> None:
    """Write the configs, the scripts of the Python backend, and the files of the warm-up."""
    configs = {
        plan.name: ensemble_config(plan),
        plan.part("detector"): detector_config(plan),
        **{plan.part(kind): python_config(plan, kind) for kind in ("preprocess", "postprocess")},
    }
    for name, config in configs.items():
        (folder / name / "1").mkdir(parents=True, exist_ok=True)
        (folder / name / "config.pbtxt").write_text(text_of(config), encoding="utf-8")
    for kind in ("preprocess", "postprocess"):
        inside = folder / plan.part(kind) / "1"
        shutil.copyfile(PYTHON_MODELS / f"{kind}_model.py", inside / "model.py")
        for script in ("preprocess.py", "run.py"):
            shutil.copyfile(DEVICE_FILES / script, inside / script)
        text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False)
        (inside / "bundle.json").write_text(text + "\n", encoding="utf-8")
    warmup = folder / plan.part("detector") / "warmup"
    warmup.mkdir()
    for name, content in warmup_files(plan).items():
        (warmup / name).write_bytes(content)


def _outputs(path: Path, file: Path, max_batch: int) -> tuple[Tensor, ...]:
    """Return the outputs, with the sizes that the file leaves open as OpenVINO infers them: Triton compares them."""
    found = _tensors(path, "output")
    if _has_plugin(path) or (file == path and all(-1 not in tensor.shape[1:] for tensor in found)):
        return found
    shapes = shapes_at_batch(file, max_batch or None)
    first = (-1,) if max_batch else ()
    return tuple(Tensor(tensor.name, tensor.dtype, (*first, *shapes[tensor.name][len(first) :])) for tensor in found)


def _tensors(path: Path, kind: str) -> tuple[Tensor, ...]:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return tuple(
        Tensor(
            value.name,
            str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
            tuple(axis.dim_value or -1 for axis in value.type.tensor_type.shape.dim),
        )
        for value in getattr(graph, kind)
        if value.name not in constants
    )


def _has_plugin(path: Path) -> bool:
    import onnx

    return any(node.op_type == _PLUGIN for node in onnx.load(str(path), load_external_data=False).graph.node)
