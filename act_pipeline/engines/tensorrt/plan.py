"""TensorRT plans on disk: built once for each model, profile, version and GPU, and stored with a record."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import Artifact, InferenceModel, OnnxModel, PlanModel, location
from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.errors import UserError
from act_pipeline.core.output_places import require_writable_file
from act_pipeline.core.records import read_record, write_record
from act_pipeline.engines.tensorrt.build import BuildOptions, Built, Recipe, build, make_recipe, plan_source
from act_pipeline.engines.tensorrt.cudart import Gpu, current_gpu
from act_pipeline.engines.tensorrt.module import TensorRT, import_tensorrt, make_log, register_plugins
from act_pipeline.engines.tensorrt.targets import RTX, Target, check_can_build, check_precision, for_target
from act_pipeline.onnx_export import writable_directory

PLAN_SCHEMA = "act_pipeline.plan/1"
CACHE_DIRECTORY = "trt_cache"

Say = Callable[[str], None]


def print_to_stderr(line: str) -> None:
    """Print a progress line to stderr, which keeps it out of a command's output."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class PlanRecord:
    """A plan on disk; the record next to it (``.json``) holds the same.

    Attributes:
        path: the plan.
        bytes: size of the plan.
        onnx_path: the ONNX file that the plan was built from.
        onnx_bytes: size of the ONNX file.
        recipe: what the plan depends on.
        seconds: build time, s.
        layers: layer type -> number of layers of the parsed network.
        int8_layers: ``convolution`` or ``matmul`` -> number of those whose two operands come from DequantizeLinear.
    """

    path: Path
    bytes: int
    onnx_path: Path
    onnx_bytes: int
    recipe: Recipe
    seconds: float
    layers: dict[str, int]
    int8_layers: dict[str, int]

    def summary(self) -> str:
        """Return a description of the build for users, of a few lines."""
        recipe = self.recipe
        batches = " to ".join(str(recipe.profile["image"][index][0]) for index in (0, 2))
        found = [
            f"{self.int8_layers.get(name, 0)} of {self.layers.get(key, 0)} {name}s"
            for name, key in (("convolution", "convolution"), ("matmul", "matrix_multiply"))
        ]
        return "\n".join(
            [
                f"built {self.path}: {self.bytes / 1e6:.2f} MB from {self.onnx_bytes / 1e6:.2f} MB of ONNX in "
                f"{self.seconds:.1f} s",
                f"{recipe.module} {recipe.version}, {recipe.precision}, batches of {batches}, for "
                f"{_for(recipe.built_for)}",
                f"network: {sum(self.layers.values())} layers; on INT8 inputs {' and '.join(found)}",
            ]
        )


def build_plan(
    model: Artifact,
    path: str | os.PathLike[str] | None = None,
    precision: str = "int8",
    batch_size: int = 1,
    *,
    say: Say = print_to_stderr,
    options: BuildOptions | None = None,
    trt: TensorRT | None = None,
    gpu: Gpu | None = None,
    target: Target | None = None,
) -> PlanRecord:
    """Build a plan and write it to disk; works without a GPU where ``tensorrt_rtx`` is installed.

    Args:
        model: a Paddle model folder, which is exported to ONNX, or an ONNX file for TensorRT.
        path: the plan to write, with its record next to it; None: in the model's cache, where
            :class:`act_pipeline.engines.tensorrt.engine.TensorRTEngine` finds it.
        precision: ``fp32`` or ``fp16`` for float models, ``int8`` for INT8 models.
        batch_size: the largest batch, for which the plan is optimized.
        say: called with a progress line.
        options: builder options; None: the defaults.
        trt: NVIDIA's module; None: ``tensorrt``, or ``tensorrt_rtx`` if only that is installed or there is no GPU.
        gpu: the GPU to build on; None: the current CUDA device, if any.
        target: the device that shall run the plan; None: whichever the module builds for.

    Returns:
        The record of the plan.

    Raises:
        UserError: the model is a plan already, the module is missing, the export to ONNX fails, TensorRT cannot build
            the model, ``path`` cannot be written, or a plan for the target cannot be made here.

    Example:
        >>> model = InferenceModel.load("output/rtdetr_sample_int8")  # doctest: +SKIP
        >>> build_plan(model, "sample.plan").bytes  # doctest: +SKIP
    """
    if isinstance(model, PlanModel):
        raise UserError(f"{model.path} is a TensorRT plan already, expected a model folder or an ONNX file")
    if path is not None:
        require_writable_file(path, "--output", "model.plan")
    gpu = gpu or current_gpu()
    if target is not None:
        check_precision(target, precision == "int8", str(location(model)))
        check_can_build(target)
    rtx_first = gpu is None or (target is not None and target.name == RTX)
    trt = trt or import_tensorrt(("tensorrt_rtx",) if rtx_first else ())
    options = options or BuildOptions()
    if target is not None:
        options = for_target(target, options, trt.rtx, gpu.compute_capability if gpu is not None else None)
    onnx_model, summary = plan_source(model, precision, trt, options.float16_rest)
    recipe = make_recipe(trt, gpu, onnx_model, summary, precision=precision, batch_size=batch_size, options=options)
    cache = cache_directory(model)
    output = Path(path) if path is not None else cache / plan_name(recipe)
    return _build_and_write(trt, onnx_model, recipe, output, cache, say)


def source_of_plan(plan: PlanModel) -> OnnxModel:
    """Return the ONNX file that a plan was built from: the one of the same name beside it, or the one in its record.

    Args:
        plan: the plan.

    Raises:
        UserError: there is no such file, or it has changed since.
    """
    record_path = plan.path.with_suffix(".json")
    recorded: dict[str, Any] = {}
    if record_path.is_file():
        recorded = read_record(record_path, PLAN_SCHEMA)
    beside = plan.path.with_suffix(".onnx")
    named = Path(str(recorded.get("onnx", "")))
    found = next((path for path in (beside, named) if path.suffix == ".onnx" and path.is_file()), None)
    if found is None:
        also = f", nor is {named}, which it was built from" if recorded else ""
        raise UserError(
            f"{plan.path} does not tell what its outputs mean, and {beside} is not there{also}; put the ONNX file that "
            "it was built from there"
        )
    recipe = recorded.get("recipe")
    built_from = recipe.get("onnx_hash") if isinstance(recipe, dict) else None
    if built_from is not None and OnnxModel(found).content_hash() != built_from:
        raise UserError(f"{plan.path} was built from another file than {found} is now; build it again")
    return OnnxModel(found)


def cache_directory(model: InferenceModel | OnnxModel) -> Path:
    """Return the folder of a model's plans: in the model's folder, or in the user's cache if that is read-only."""
    return writable_directory(model, CACHE_DIRECTORY)


def plan_name(recipe: Recipe) -> str:
    """Return the file name of a recipe's plan, a hash of the recipe."""
    text = json.dumps(recipe.as_dict(), sort_keys=True)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.plan"


def load_or_build(
    trt: TensorRT,
    model: InferenceModel | OnnxModel,
    onnx_model: OnnxModel,
    recipe: Recipe,
    deserialize: Callable[[bytes], Any],
    say: Say,
) -> tuple[Any, Path]:
    """Return the engine of a recipe and the path of its plan, from the cache or built now.

    Args:
        trt: NVIDIA's module.
        model: the model whose cache is used.
        onnx_model: the file to build from.
        recipe: what to build.
        deserialize: returns the engine of a serialized plan, or None if it does not load.
        say: called with the reason for a build.

    Raises:
        UserError: the plan cannot be built, or does not load after the build.
    """
    cache = cache_directory(model)
    path = cache / plan_name(recipe)
    reason = f"{trt} builds the engine of {onnx_model.path}, which takes a while and is kept in {cache}"
    if path.exists():
        plan = _whole(path)
        engine = deserialize(plan) if plan is not None else None
        if engine is not None:
            return engine, path
        reason = f"{path} is {'damaged' if plan is None else 'refused by ' + str(trt)}: built anew"
    else:
        reason = _other_plan(cache, recipe) or reason
    say(reason)
    _build_and_write(trt, onnx_model, recipe, path, cache, lambda line: None)
    engine = deserialize(path.read_bytes())
    if engine is None:
        raise UserError(
            f"{trt} built {path} and does not load it; TensorRT-RTX runs on GeForce RTX and RTX PRO GPUs (compute "
            "capability 7.5, 8.0, 8.6, 8.9 and 12.x), on others install NVIDIA's tensorrt; or run with --engine=auto"
        )
    return engine, path


def load_plan(
    trt: TensorRT, plan: PlanModel, batch_size: int, deserialize: Callable[[bytes], Any], log: Any
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return the engine of a plan, and the largest shape of each of its inputs.

    Args:
        trt: NVIDIA's module.
        plan: the plan, of this package, of a bundle or of ``trtexec``.
        batch_size: the largest batch that is asked for.
        deserialize: returns the engine of a serialized plan, or None if it does not load.
        log: holds NVIDIA's messages; the plugins are registered with it.

    Raises:
        UserError: the plan is damaged, is of another version or GPU, or is for smaller batches.
    """
    content = plan.path.read_bytes()
    if plan.path.with_suffix(".json").is_file() and _whole(plan.path) is None:
        raise UserError(f"{plan.path} is damaged: it is not the plan of the record beside it; build it again")
    engine = deserialize(content)
    if engine is None:
        raise UserError(
            f"{trt} does not load {plan.path}: {log.first_error()}; a plan runs with the version and on the GPU that "
            "it was built with: build it here (deploy/build_engine.py, or its bundle's build.sh)"
        )
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT]
    largest = {name: tuple(engine.get_tensor_profile_shape(name, 0)[2]) for name in inputs}
    most = min((shape[0] for shape in largest.values() if shape), default=batch_size)
    if batch_size > most:
        raise UserError(
            f"{plan.path} is for batches up to {most}, asked for --batch_size={batch_size}; lower it, or build the "
            "plan again"
        )
    return engine, largest


def _build_and_write(
    trt: TensorRT, onnx_model: OnnxModel, recipe: Recipe, target: Path, cache: Path, say: Say
) -> PlanRecord:
    say(f"{trt} builds an engine of {onnx_model.path} for {_for(recipe.built_for)}")
    timings = cache / f"{recipe.module}-{hashlib.sha256(recipe.built_for.encode()).hexdigest()[:8]}.timing"
    built, timing_cache = build(trt, onnx_model, recipe, timings.read_bytes() if timings.exists() else b"")
    if timing_cache:
        write_bytes_atomically(timings, timing_cache)
    return _write(built, onnx_model, recipe, target)


def _write(built: Built, onnx_model: OnnxModel, recipe: Recipe, target: Path) -> PlanRecord:
    record = PlanRecord(
        target,
        len(built.plan),
        onnx_model.path,
        onnx_model.bytes,
        recipe,
        built.seconds,
        built.layers,
        built.int8_layers,
    )
    write_bytes_atomically(target, built.plan)
    write_record(
        target.with_suffix(".json"),
        PLAN_SCHEMA,
        {
            "recipe": recipe.as_dict(),
            "bytes": record.bytes,
            "plan_hash": _hash(built.plan),
            "onnx": str(onnx_model.path),
            "onnx_bytes": record.onnx_bytes,
            "seconds": record.seconds,
            "layers": record.layers,
            "int8_layers": record.int8_layers,
        },
    )
    return record


def _whole(path: Path) -> bytes | None:
    """Return the bytes of a plan, None if they do not match its record: loading a damaged one can end the process."""
    plan = path.read_bytes()
    try:
        record = read_record(path.with_suffix(".json"), PLAN_SCHEMA)
    except UserError:
        return None
    return plan if record.get("plan_hash") == _hash(plan) else None


def _hash(plan: bytes) -> str:
    return f"sha256:{hashlib.sha256(plan).hexdigest()}"


def _other_plan(cache: Path, recipe: Recipe) -> str:
    """Return a line about a cached plan that differs only in version or GPU; empty if there is none."""
    wanted = recipe.as_dict()
    machine = ("module", "version", "built_for")
    for path in sorted(cache.glob("*.json")) if cache.is_dir() else ():
        try:
            found = read_record(path, PLAN_SCHEMA).get("recipe")
        except UserError:
            continue
        if isinstance(found, dict) and all(
            found.get(key) == value for key, value in wanted.items() if key not in machine
        ):
            was, now = (f"{entry.get('module')} {entry.get('version')} for {_for(entry.get('built_for'))}"
                        for entry in (found, wanted))  # fmt: skip
            return f"{path.with_suffix('.plan')} is of {was}, here is {now}: built anew"
    return ""


def _for(built_for: Any) -> str:
    return "every GPU of compute capability 8.0 on" if built_for == "portable" else str(built_for)


def inspect_plan(path: str | os.PathLike[str], trt: TensorRT | None = None) -> str:
    """Return the output of TensorRT's engine inspector for a plan, layer by layer, as JSON.

    Args:
        path: the plan.
        trt: NVIDIA's module; None: imported.

    Raises:
        UserError: there is no GPU, or the plan does not load on it.
    """
    trt = trt or import_tensorrt()
    require_gpu_for_layers()
    log = make_log(trt.module)
    register_plugins(trt.module, log)
    engine = trt.module.Runtime(log).deserialize_cuda_engine(Path(path).read_bytes())
    if engine is None:
        raise UserError(f"{trt} does not load {path}: {log.first_error()}")
    information = engine.create_engine_inspector().get_engine_information(trt.module.LayerInformationFormat.JSON)
    return str(information)


def require_gpu_for_layers() -> None:
    """Check that there is a GPU: NVIDIA's inspector needs a loaded engine, and an engine loads only on a GPU.

    Raises:
        UserError: there is no GPU.
    """
    if current_gpu() is None:
        raise UserError("--layers needs an NVIDIA GPU with its driver, since an engine only loads on one; leave it out")
