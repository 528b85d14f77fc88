"""Build of a TensorRT plan from an ONNX file; with ``tensorrt_rtx`` no GPU is needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, OnnxModel, location
from act_pipeline.core.errors import UserError
from act_pipeline.engines.onnx_runtimes.onnx_files import OnnxSummary, inspect_onnx, onnx_artifact, require_qdq_format
from act_pipeline.engines.tensorrt.cudart import Gpu
from act_pipeline.engines.tensorrt.module import TensorRT, make_log, register_plugins

PRECISIONS = ("fp32", "fp16", "int8")
WORKSPACE_BYTES = 4 << 30
# A TensorRT-RTX plan built without a compute capability runs on every one from 8.0 on; the machine that loads it
# compiles its kernels. Turing must be requested explicitly.
PORTABLE = "portable"
_TURING = (7, 5)

# Input name -> the smallest, the optimal and the largest shape.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class BuildOptions:
    """Builder options.

    Attributes:
        float16_rest: for an INT8 model, compute what is not INT8 in FP16, except for the post-process, which stays
            FP32.
        workspace_bytes: the most memory that a layer may use in addition to its tensors, bytes.
        detailed: store the layer details that the engine inspector shows.
        compute_capability: for TensorRT-RTX, the compute capability to build for (``8.9``); None: every one from 8.0
            on.
    """

    float16_rest: bool = True
    workspace_bytes: int = WORKSPACE_BYTES
    detailed: bool = False
    compute_capability: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything that a plan depends on; plans of equal recipes are interchangeable.

    Attributes:
        onnx_hash: hash of the ONNX file, ``sha256:<hex>``.
        precision: one of :data:`PRECISIONS`.
        profile: input name -> the smallest, the optimal and the largest shape.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: version of the module.
        built_for: the GPU, the compute capability (``SM89``), or :data:`PORTABLE`.
        options: the fields of :class:`BuildOptions`.
    """

    onnx_hash: str
    precision: str
    profile: dict[str, Any]
    module: str
    version: str
    built_for: str
    options: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as a dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        plan: the serialized engine.
        seconds: time for parsing and building, s.
        layers: layer type -> number of layers of the parsed network, before any fusion.
        int8_layers: ``convolution`` or ``matmul`` -> number of those whose two operands come from DequantizeLinear.
    """

    plan: bytes
    seconds: float
    layers: dict[str, int] = field(default_factory=dict)
    int8_layers: dict[str, int] = field(default_factory=dict)


def strongly_typed(trt: TensorRT) -> bool:
    """Return whether the ONNX file determines the types (TensorRT 10 on), or the builder chooses them (8 and 9)."""
    return hasattr(trt.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(
        trt.module.BuilderFlag, "FP16"
    )


def plan_source(
    model: InferenceModel | OnnxModel, precision: str, trt: TensorRT, float16_rest: bool
) -> tuple[OnnxModel, OnnxSummary]:
    """Return the ONNX file to build from and its summary: a folder is exported, a file is used unchanged.

    A strongly typed network computes in FP16 where the tensors of the file are FP16. A weakly typed one (TensorRT 8 and
    9, whose parser does not support FP16 Q/DQ) gets an FP32 file and builder flags.

    Args:
        model: a Paddle model folder, or an ONNX file written with ``--target tensorrt``.
        precision: one of :data:`PRECISIONS`.
        trt: NVIDIA's module.
        float16_rest: see :class:`BuildOptions`.

    Raises:
        UserError: the precision does not match the model, the file has the Q/DQ format of another runtime, or the
            export to ONNX fails.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, TensorRT has {', '.join(PRECISIONS)}")
    float16 = strongly_typed(trt) and (precision == "fp16" or (precision == "int8" and float16_rest))
    if isinstance(model, OnnxModel):
        onnx_model, summary = model, inspect_onnx(model)
        if strongly_typed(trt) and not summary.quantized:
            onnx_artifact(model, "tensorrt", precision == "fp16")  # raises if the floats are of the other type
    else:
        onnx_model, summary = onnx_artifact(model, "tensorrt_rtx" if trt.rtx else "tensorrt", float16)
    if (precision == "int8") != summary.quantized:
        found, remedy = (
            ("an INT8 model", "use --precision int8, or give the float model's folder")
            if summary.quantized
            else ("a float model", "compress it with tools/compress.py, or use --precision fp32 or fp16")
        )
        raise UserError(f"{location(model)} is {found}, asked for {precision}; {remedy}")
    require_qdq_format(onnx_model, summary, "tensorrt", "which TensorRT refuses")
    return onnx_model, summary


def make_profile(onnx_model: OnnxModel, summary: OnnxSummary, batch_size: int) -> dict[str, Any]:
    """Return the optimization profile: batches of 1 to ``batch_size``, optimized for ``batch_size``.

    Args:
        onnx_model: the file, for messages.
        summary: its summary.
        batch_size: the largest batch.

    Returns:
        Input name -> the smallest, the optimal and the largest shape.

    Raises:
        UserError: the batch size is not positive, the file has another fixed batch size, or a dimension other than the
            batch is dynamic.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}, expected a positive integer")
    profile = {}
    for name, shape in summary.inputs.items():
        if -1 in shape[1:]:
            raise UserError(
                f"{onnx_model.path}: input {name} has the shape {list(shape)}, expected a fixed height and width; "
                "export the model with a fixed size (tools/export_model.py), then export it to ONNX again"
            )
        if shape and shape[0] not in (-1, batch_size):
            raise UserError(
                f"{onnx_model.path} is for batches of {shape[0]}, asked for --batch_size={batch_size}; set it to "
                f"{shape[0]}, or write the file for any batch (deploy/export_onnx.py --batch dynamic)"
            )
        sizes = [tuple(batch if size == -1 else size for size in shape) for batch in (1, batch_size, batch_size)]
        profile[name] = sizes
    return profile


def make_recipe(
    trt: TensorRT,
    gpu: Gpu | None,
    onnx_model: OnnxModel,
    summary: OnnxSummary,
    *,
    precision: str,
    batch_size: int,
    options: BuildOptions,
) -> Recipe:
    """Return the recipe of a plan to build on this machine.

    Args:
        trt: NVIDIA's module.
        gpu: the GPU of this machine; None: there is none.
        onnx_model: the file to build from.
        summary: its summary.
        precision: one of :data:`PRECISIONS`.
        batch_size: the largest batch.
        options: builder options.

    Raises:
        UserError: as :func:`make_profile`; ``tensorrt`` is used without a GPU; or the compute capability is unknown.
    """
    return Recipe(
        onnx_hash=onnx_model.content_hash(),
        precision=precision,
        profile={name: [list(shape) for shape in shapes]
                 for name, shapes in make_profile(onnx_model, summary, batch_size).items()},
        module=trt.name,
        version=trt.version,
        built_for=_built_for(trt, gpu, options.compute_capability),
        options=asdict(options),
    )  # fmt: skip


def _built_for(trt: TensorRT, gpu: Gpu | None, compute_capability: str | None) -> str:
    if not trt.rtx:
        if compute_capability is not None:
            raise UserError(
                f"{trt.title} builds for the GPU that it builds on, found --compute_capability={compute_capability}; "
                "leave it out, or install TensorRT-RTX (tensorrt-rtx-cu12)"
            )
        if gpu is None:
            raise UserError(
                f"{trt} builds on the GPU that it builds for, and there is none here; build it on the machine "
                "that will "
                'run it, or pip install "act_pipeline[tensorrt-rtx]", which builds without one'
            )
        return str(gpu)
    if compute_capability is None:
        return "SM75" if gpu is not None and gpu.compute_capability == _TURING else PORTABLE
    wanted = f"SM{compute_capability.replace('.', '')}"
    known = [name for name in dir(trt.module.ComputeCapability) if name.startswith("SM")]
    if wanted not in known:
        listed = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in sorted(known, key=lambda name: int(name[2:])))
        raise UserError(f"--compute_capability is {compute_capability!r}, {trt} builds for {listed}")
    return wanted


def build(trt: TensorRT, onnx_model: OnnxModel, recipe: Recipe, timing_cache: bytes = b"") -> tuple[Built, bytes]:
    """Build the plan, and return it with the updated timing cache.

    Args:
        trt: NVIDIA's module.
        onnx_model: the file to build from.
        recipe: what to build.
        timing_cache: the serialized timing cache of earlier builds; empty: none.

    Returns:
        The result, and the serialized timing cache; empty for TensorRT-RTX, which has none.

    Raises:
        UserError: NVIDIA's parser or builder fails; the message names the node, its op and NVIDIA's reason.
    """
    started = time.perf_counter()
    log = make_log(trt.module)
    register_plugins(trt.module, log)
    builder = trt.module.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.module.OnnxParser(network, log)
    content = onnx_model.path.read_bytes()
    if not parser.parse(content):
        raise UserError(_parser_error(trt, onnx_model, parser, log))
    config = builder.create_builder_config()
    _configure(trt, config, recipe)
    if any(shapes[0] != shapes[2] for shapes in recipe.profile.values()) or _is_open(network):
        profile = builder.create_optimization_profile()
        for name, shapes in recipe.profile.items():
            profile.set_shape(name, *(tuple(shape) for shape in shapes))
        config.add_optimization_profile(profile)
    cache = None
    if not trt.rtx and hasattr(config, "create_timing_cache"):
        cache = config.create_timing_cache(timing_cache)
        config.set_timing_cache(cache, False)
    layers, int8_layers = _count_layers(trt, network)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(
            f"{trt} cannot build an engine of {onnx_model.path} for {recipe.built_for}: {log.first_error()}"
        )
    seconds = round(time.perf_counter() - started, 2)
    return Built(bytes(plan), seconds, layers, int8_layers), bytes(cache.serialize()) if cache is not None else b""


def _network_flags(trt: TensorRT) -> int:
    flags = trt.module.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if hasattr(flags, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, name)) if hasattr(flags, name) else 0


def _configure(trt: TensorRT, config: Any, recipe: Recipe) -> None:
    module, options = trt.module, recipe.options
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options["workspace_bytes"])
    if not strongly_typed(trt):
        # Without this flag Q/DQ pairs would be computed in float. No calibrator is needed, since the file has scales.
        if recipe.precision == "int8":
            config.set_flag(module.BuilderFlag.INT8)
        if recipe.precision == "fp16" or (recipe.precision == "int8" and options["float16_rest"]):
            config.set_flag(module.BuilderFlag.FP16)
    if hasattr(module, "ProfilingVerbosity"):
        verbosity = module.ProfilingVerbosity
        config.profiling_verbosity = verbosity.DETAILED if options["detailed"] else verbosity.LAYER_NAMES_ONLY
    if trt.rtx and recipe.built_for != PORTABLE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(module.ComputeCapability, recipe.built_for), 0)


def _is_open(network: Any) -> bool:
    return any(-1 in tuple(network.get_input(index).shape) for index in range(network.num_inputs))


def _parser_error(trt: TensorRT, onnx_model: OnnxModel, parser: Any, log: Any) -> str:
    """Return a line about the parser's first error, which is the cause of the others."""
    ours = bool(onnx_model.record())  # the error is then in our export, and writing the file again does not help
    remedy = "" if ours else "; write the file with deploy/export_onnx.py --target tensorrt, or give the model's folder"
    if parser.num_errors == 0:
        return f"{trt} cannot parse {onnx_model.path}: {log.first_error()}{remedy}"
    error = parser.get_error(0)
    # TensorRT 10 introduced the two names; older versions have only the node's number.
    op, node = (getattr(error, name, lambda: "")() for name in ("node_operator", "node_name"))
    where = f"node {node!r} ({op})" if op else f"node number {error.node()}"
    # Without a driver TensorRT-RTX appends a CUDA error, which is not the reason why parsing failed.
    said = " ".join(error.desc().split()).split(" [checkMacros.cpp::catchCudaError")[0]
    return f"{trt} cannot parse {onnx_model.path}: {where}: {said}{remedy}"


def _count_layers(trt: TensorRT, network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of layers of each type, and of the convolutions and matmuls with INT8 operands."""
    types = trt.module.LayerType
    counted = {types.CONVOLUTION: "convolution", types.MATRIX_MULTIPLY: "matmul"}
    layers: Counter[str] = Counter()
    int8_layers: Counter[str] = Counter()
    made_by, counting = {}, []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        layers[layer.type.name.lower()] += 1
        made_by.update({layer.get_output(number).name: layer for number in range(layer.num_outputs)})
        if layer.type in counted:
            counting.append(layer)

    def dequantized(tensor: Any) -> bool:
        """Return whether a tensor comes from DequantizeLinear, past shuffles that the parser adds to equalize ranks."""
        layer = made_by.get(tensor.name) if tensor is not None else None
        while layer is not None and layer.type == types.SHUFFLE:
            layer = made_by.get(layer.get_input(0).name)
        return layer is not None and layer.type == types.DEQUANTIZE

    for layer in counting:
        if dequantized(layer.get_input(0)) and dequantized(layer.get_input(1)):
            int8_layers[counted[layer.type]] += 1
    return dict(layers), dict(int8_layers)
