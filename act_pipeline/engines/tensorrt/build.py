"""From an ONNX file to TensorRT's plan: parse, say what it may do, build. With ``tensorrt_rtx`` no GPU is needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError
from act_pipeline.engines.interface import location
from act_pipeline.engines.onnx_runtimes.onnx_files import OnnxSummary, inspect_onnx, onnx_artifact, require_qdq_format
from act_pipeline.engines.tensorrt.cudart import Gpu
from act_pipeline.engines.tensorrt.module import TensorRT, make_log

PRECISIONS = ("fp32", "fp16", "int8")
WORKSPACE_BYTES = 4 << 30
# A plan of TensorRT-RTX that names no compute capability goes with every one from 8.0 on; its kernels are compiled by
# the machine that loads it. Turing must be named.
PORTABLE = "portable"
_TURING = (7, 5)

# Input name -> its shapes: the smallest, the one to be fastest at, the largest.
Profile = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class BuildOptions:
    """What else decides what is built.

    Attributes:
        float16_rest: what of an INT8 model is float computes in FP16; the post-process always in FP32.
        workspace_bytes: the most memory that a layer may take beside its tensors, bytes.
        detailed: keep what the engine inspector shows of every layer.
        compute_capability: for TensorRT-RTX, the one to build for (``8.9``); None: every one from 8.0 on.
    """

    float16_rest: bool = True
    workspace_bytes: int = WORKSPACE_BYTES
    detailed: bool = False
    compute_capability: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All that a plan depends on; two plans of one recipe are the same.

    Attributes:
        onnx_hash: of the file, ``sha256:<hex>``.
        precision: one of :data:`PRECISIONS`.
        profile: the shapes.
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: of it.
        built_for: the GPU, the compute capability, or :data:`PORTABLE`.
        options: builder options.
    """

    onnx_hash: str
    precision: str
    profile: dict[str, Any]
    module: str
    version: str
    built_for: str
    options: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Built:
    """What came of a build.

    Attributes:
        plan: the engine, serialized.
        seconds: parsing and building.
        layers: of the network as parsed, before any fusion: type -> how many.
        int8_layers: those whose inputs all come from DequantizeLinear: type -> how many.
    """

    plan: bytes
    seconds: float
    layers: dict[str, int] = field(default_factory=dict)
    int8_layers: dict[str, int] = field(default_factory=dict)


def strongly_typed(trt: TensorRT) -> bool:
    """Return whether the network's types are the file's (TensorRT 10 on), not the builder's to choose (8, 9)."""
    return hasattr(trt.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(
        trt.module.BuilderFlag, "FP16"
    )


def plan_source(
    model: InferenceModel | OnnxModel, precision: str, trt: TensorRT, float16_rest: bool
) -> tuple[OnnxModel, OnnxSummary]:
    """Return the ONNX file to build from: a folder is lowered for TensorRT, a file taken as it is.

    A strongly typed network computes in FP16 where the file says so. A weakly typed one (TensorRT 8 and 9, whose parser
    knows no Q/DQ of FP16) gets the FP32 file, and builder flags.

    Raises:
        UserError: precision and model do not fit, the file is spelled for another runtime, or as the lowering.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, TensorRT has {', '.join(PRECISIONS)}")
    float16 = strongly_typed(trt) and (precision == "fp16" or (precision == "int8" and float16_rest))
    if isinstance(model, OnnxModel):
        onnx_model, summary = model, inspect_onnx(model)
        if strongly_typed(trt) and not summary.quantized:
            onnx_artifact(model, "tensorrt", precision == "fp16")  # refuses floats of the other type
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
    """Return the shapes that the plan is for: batches of 1 to ``batch_size``, fastest at that.

    Raises:
        UserError: the batch size is not positive, or not the file's fixed one, or more than the batch is left open.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size is {batch_size}, expected a positive integer")
    profile = {}
    for name, shape in summary.inputs.items():
        if -1 in shape[1:]:
            raise UserError(
                f"{onnx_model.path}: input {name} has the shape {list(shape)}, expected a fixed height and width; "
                "export the model with a fixed size (tools/export_model.py), then lower it again"
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
    precision: str,
    batch_size: int,
    options: BuildOptions,
) -> Recipe:
    """Return what is to be built, here.

    Raises:
        UserError: as :func:`make_profile`; TensorRT without a GPU; no such compute capability.
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
    """Build the plan, and return it with the timing cache as it is now (empty where the module has none).

    Raises:
        UserError: NVIDIA's parser or builder refuses: the node, its op, and NVIDIA's words.
    """
    started = time.perf_counter()
    log = make_log(trt.module)
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
        # Without INT8 the Q/DQ pairs would be computed as they stand; with it no calibrator is asked, since the file
        # has its scales.
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
    """Return the first error, which is the one that stopped it."""
    ours = bool(onnx_model.record())  # then the lowering is wrong, and writing the file again is no help
    remedy = "" if ours else "; write the file with deploy/export_onnx.py --target tensorrt, or give the model's folder"
    if parser.num_errors == 0:
        return f"{trt} cannot parse {onnx_model.path}: {log.first_error()}{remedy}"
    error = parser.get_error(0)
    # The two names came with TensorRT 10; before, the node's number is all there is.
    op, node = (getattr(error, name, lambda: "")() for name in ("node_operator", "node_name"))
    where = f"node {node!r} ({op})" if op else f"node number {error.node()}"
    # Without a driver the words end with that of TensorRT-RTX's, which is not why the node is refused.
    said = " ".join(error.desc().split()).split(" [checkMacros.cpp::catchCudaError")[0]
    return f"{trt} cannot parse {onnx_model.path}: {where}: {said}{remedy}"


def _count_layers(trt: TensorRT, network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many layers of each type the network has, and how many convolutions and matmuls take INT8."""
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
        """The parser puts shuffles between, to give both sides of a product as many dimensions."""
        layer = made_by.get(tensor.name) if tensor is not None else None
        while layer is not None and layer.type == types.SHUFFLE:
            layer = made_by.get(layer.get_input(0).name)
        return layer is not None and layer.type == types.DEQUANTIZE

    for layer in counting:
        if dequantized(layer.get_input(0)) and dequantized(layer.get_input(1)):
            int8_layers[counted[layer.type]] += 1
    return dict(layers), dict(int8_layers)
