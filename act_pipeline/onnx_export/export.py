"""Export of a Paddle model to ONNX: read the program, place Q/DQ, write the file and its record."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import ONNX_SCHEMA, InferenceModel, OnnxModel
from act_pipeline.core.atomic_files import write_bytes_atomically
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import write_record
from act_pipeline.families.yolo import has_objectness
from act_pipeline.graph.op_types import DYNAMIC
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export.float_ops.registry import add_op, exporting
from act_pipeline.onnx_export.float_reasons import float_reasons
from act_pipeline.onnx_export.graph_builder import GraphBuilder, require_onnx
from act_pipeline.onnx_export.nms_cut import (
    METADATA_KEY,
    NMS_MODES,
    NMS_OP,
    Suppression,
    cut_nms,
    described_suppression,
)
from act_pipeline.onnx_export.nms_nodes import PLUGIN_DOMAIN, Output, boxes_and_scores, onnx_nms, tensorrt_nms
from act_pipeline.onnx_export.program import INT8_OPS, PRODUCTS, Source, read_source
from act_pipeline.onnx_export.quantized_ops import (
    convolution,
    followers_of,
    matmul,
    readers_of,
    rounds_dynamically,
)
from act_pipeline.onnx_export.rewrites.attention_by_rows import with_attention_by_rows
from act_pipeline.onnx_export.rewrites.attention_masks import protect_masks
from act_pipeline.onnx_export.rewrites.channels_last import rewrite_layout_conversions
from act_pipeline.onnx_export.rewrites.constants_in_float16 import store_constants_in_float16
from act_pipeline.onnx_export.rewrites.deformable_sampling import sum_by_level
from act_pipeline.onnx_export.rewrites.early_selection import select_early
from act_pipeline.onnx_export.rewrites.float16 import QUANTIZED_OPSET, to_float16
from act_pipeline.onnx_export.rewrites.float_weights import write_weights_in_float
from act_pipeline.onnx_export.rewrites.integer_convolutions import write_integer_convolutions
from act_pipeline.onnx_export.rewrites.qdq_placement import round_early
from act_pipeline.onnx_export.rewrites.zero_points import choose_zero_points
from act_pipeline.onnx_export.targets import CPU_TARGETS, RUNTIMES, TARGETS
from act_pipeline.onnx_export.validity import invalid_reason

# Op type -> number of quantized ops; and the ops that are left in float.
_Report = tuple[dict[str, int], list[dict[str, str]]]
OPSETS = range(17, 22)
PRECISIONS = ("auto", "int8", "fp32")
_OUTPUTS = ("bbox", "bbox_num")
# The oldest IR version that an opset allows: older runtimes reject newer IR versions.
_IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10}


@dataclass(frozen=True)
class Lowered:
    """Description of an exported ONNX file.

    Attributes:
        path: the ONNX file.
        precision: precision of the model, ``int8`` or ``fp32``.
        float16: whether what is not INT8 is FP16, up to the last matmul.
        target: Q/DQ format, a key of :data:`TARGETS`.
        opset: opset of the file.
        batch: the batch size, if the model or the caller fixes it; None: dynamic.
        bytes: size of the file.
        quantized: Paddle op type -> number of ops that compute in INT8.
        kept: convolutions and matmuls left in float, each ``{"type", "output", "reason"}`` and, where the model's
            ``act.json`` names it, ``module``.
        detections: what turns the outputs into detections besides their shapes, ``{"family", "post"}``: the thresholds
            of the NMS that is not in the file, or what is left to do after the one that is. None: nothing.
    """

    path: Path
    precision: str
    float16: bool
    target: str
    opset: int
    batch: int | None
    bytes: int
    quantized: dict[str, int] = field(default_factory=dict)
    kept: list[dict[str, str]] = field(default_factory=list)
    detections: dict[str, Any] | None = None

    def as_record(self, source: InferenceModel) -> dict[str, Any]:
        """Return the record to write next to the file.

        Args:
            source: the model that was exported.
        """
        record = {key: value for key, value in asdict(self).items() if key != "path"}
        return {
            "source": str(source.directory),
            "source_hash": source.content_hash(),
            "lowering_hash": lowering_hash(),
            **record,
        }

    def summary(self) -> str:
        """Return a description of the export for users, of a few lines."""
        batch = "any batch size" if self.batch is None else f"batch size {self.batch}"
        done = f"exported to {self.path}: {self.bytes / 1e6:.2f} MB, opset {self.opset}, {batch}"
        rest = "FP16" if self.float16 else "FP32"
        if self.precision != "int8":
            return f"{done}, {rest}"
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.quantized.items())) or "no op"
        left = f"{len(self.kept)} convolutions and matmuls" if self.kept else "no convolution and no matmul"
        return "\n".join(
            [
                f"{done}, INT8 for {RUNTIMES[self.target]}",
                f"in INT8: {counts} (the scales are in ops QuantizeLinear and DequantizeLinear)",
                f"in {rest}: {left}{':' if self.kept else ''}",
                *(f"  {op.get('module') or op['output']} ({op['type']}): {op['reason']}" for op in self.kept),
            ]
        )


def lower(
    model: InferenceModel,
    output: str | os.PathLike[str],
    target: str = "cpu",
    *,
    opset: int = 17,
    batch: int | None = None,
    precision: str = "auto",
    float16: bool = False,
    nms: str = "none",
) -> Lowered:
    """Export a Paddle model to ONNX and write a record next to it (``model_cpu.json`` for ``model_cpu.onnx``).

    Inputs and outputs are those of the Paddle model, with their names, types and fixed sizes. Only the outputs of a
    detector with postprocessing, a float tensor [K, 6] and an integer one, are renamed to ``bbox [K, 6]`` float32 and
    ``bbox_num [N]`` int32. NMS at the end of the program is left out: the outputs are then ``boxes [N, A, 4]`` and
    ``scores [N, C, A]``, and the file states the thresholds, which the engines of this package apply.

    Args:
        model: an INT8 model of PaddleSlim's ACT or of this package, or a float model.
        output: the file to write.
        target: Q/DQ format, a key of :data:`TARGETS`.
        opset: 17 to 21.
        batch: the batch size; None: dynamic where the model leaves it open.
        precision: ``int8`` (the model must hold scales), ``fp32`` (it must hold none), or ``auto`` (either).
        float16: for GPUs, compute in FP16 what is not INT8, up to the last matmul; the opset of an INT8 model is then
            at least 19.
        nms: ``none``: as above; ``onnx``: NMS in the file, also of models of the families ``yolo`` and ``ppyoloe`` that
            end before it, with the outputs ``bbox [K, 6]`` and ``bbox_num [N]``; ``tensorrt``: the same by TensorRT's
            plugin ``EfficientNMS_TRT``, with its four outputs.

    Returns:
        A description of the file.

    Raises:
        UserError: an argument is unknown, the precision does not match the model, the model fixes another batch size,
            an op cannot be exported, or ``onnx`` is not installed.
    """
    if target not in TARGETS:
        raise UserError(f"target is {target!r}, expected one of {', '.join(TARGETS)}{suggest(target, TARGETS)}")
    if opset not in OPSETS:
        raise UserError(f"opset is {opset}, expected {OPSETS.start} to {OPSETS.stop - 1}")
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if nms not in NMS_MODES:
        raise UserError(f"nms is {nms!r}, expected one of {', '.join(NMS_MODES)}{suggest(nms, NMS_MODES)}")
    if batch is not None and batch < 1:
        raise UserError(f"batch is {batch}, expected a positive integer, or 'dynamic'")
    if float16 and target == "onnxruntime":
        raise UserError(
            "target onnxruntime is for CPUs and float16 for GPUs; leave float16 out, or take another target"
        )
    require_onnx()
    with static_mode():
        graph = StaticGraph.load(model)
        own = set(graph.program.global_block().vars)
        source = read_source(with_attention_by_rows(graph) if target in CPU_TARGETS else graph)
    fake = next((op for op in source.ops if op.type.startswith("fake_")), None)
    if float16 and source.quantized:
        opset = max(opset, QUANTIZED_OPSET)
    if fake is not None:
        raise UserError(
            f"{model.model_path}: op {fake.type} with the output {fake.output!r} is of a model saved without "
            "onnx_format; compress it again with QuantAware.onnx_format: true"
        )
    if precision == "int8" and not source.quantized:
        raise UserError(
            f"{model.model_path} has no quantize_linear ops, so no scales, expected ACT's INT8 model; compress it with "
            "tools/compress.py first, or export it as it is with --precision fp32"
        )
    if precision == "fp32" and source.quantized:
        raise UserError(f"{model.model_path} is an INT8 model; give the float model it was made from for fp32")
    sizes = _input_sizes(source, batch, model.model_path)
    suppression = _suppression(model, source, nms)
    rewrite_layout_conversions(source)
    select_early(source)
    sum_by_level(source, queries_last=target in CPU_TARGETS)
    if target in CPU_TARGETS:
        choose_zero_points(source)
    if target == "cpu":  # ONNX Runtime moves Q/DQ pairs itself, and needs one right before every op
        round_early(source)
    if target not in CPU_TARGETS or float16:  # TensorRT has no dynamic scales, and GPUs no DynamicQuantizeLinear
        for op in source.ops:
            op.attrs.pop(DYNAMIC, None)
    if target == "tensorrt":
        write_weights_in_float(source)
    reasons = float_reasons(model) if source.quantized else {}
    build, report = _convert(source, TARGETS[target], opset, target == "tensorrt_rtx" and not float16, reasons, own)
    outputs = _outputs(build, source, sizes)
    if suppression is not None and nms != "none":
        outputs = _after_nms(build, source, suppression, nms, _batch_of(sizes))
    detections = suppression.metadata(nms) if suppression is not None else None
    proto = _finish(build, source, opset, sizes, outputs, detections)
    if target == "cpu" and source.quantized:
        protect_masks(proto)
    if target == "onnxruntime" and source.quantized:
        write_integer_convolutions(proto, _observed_ranges(build, source))
    if float16:
        to_float16(proto)
    elif target in CPU_TARGETS and source.quantized:
        store_constants_in_float16(proto)
    reason = invalid_reason(proto)
    if reason is not None:
        raise UserError(
            f"{model.model_path}: the ONNX graph is not valid ({reason}); a rule for one of the ops is wrong: report "
            "it with the model"
        )
    path = Path(output)
    written = proto.SerializeToString()
    quantized, kept = report
    fixed = _batch_of(sizes)
    lowered = Lowered(
        path, "int8" if source.quantized else "fp32", float16, target, opset, fixed if isinstance(fixed, int) else None,
        len(written), quantized, kept, detections,
    )  # fmt: skip
    # The record is written first: if the process is killed in between, no ONNX file without a record is left.
    write_record(OnnxModel(path).record_path, ONNX_SCHEMA, lowered.as_record(model))
    write_bytes_atomically(path, written)
    return lowered


def lowering_hash() -> str:
    """Return a hash of the code of this package, on which exported files depend."""
    return hash_files(sorted(Path(__file__).parent.rglob("*.py")))


def _convert(
    source: Source,
    dtype: str,
    opset: int,
    unit_scales: bool,
    reasons: Mapping[str, Mapping[str, str]],
    own: Collection[str],
) -> tuple[GraphBuilder, _Report]:
    """Return the nodes, and the report of the model's ops, which are those that write one of the tensors ``own``."""
    build = GraphBuilder(source, dtype, opset, unit_scales)
    readers = readers_of(source)
    merged: set[int] = set()
    quantized: Counter[str] = Counter()
    kept = []
    for op in source.ops:
        if id(op) in merged:
            continue
        if op.type not in INT8_OPS:
            add_op(build, op)
            continue
        floats = [op.input(slot) for slot in op.operands if op.input(slot) not in source.quantized]
        if not floats or rounds_dynamically(build, op):
            quantized[op.type] += 1
        elif op.output in own:
            unknown = f"the INT8 model has no scale for its input {' and '.join(floats)}"
            kept.append({"type": op.type, "output": op.output, "reason": unknown, **reasons.get(op.output, {})})
        with exporting(op):
            if op.type in PRODUCTS:
                matmul(build, op)
            else:
                followers = followers_of(op, source, readers)
                merged.update(map(id, followers))
                convolution(build, op, followers)
    return build, (dict(quantized), kept)


def _observed_ranges(build: GraphBuilder, source: Source) -> dict[str, float]:
    """Return ONNX name of a tensor -> its largest absolute value in calibration, where the model states it."""
    found = {build.values.get(op.output, ""): source.ranges.get(op.output, 0.0) for op in source.ops}
    return {name: value for name, value in found.items() if 0 < value < np.inf}


def _gives_detections(source: Source) -> bool:
    """Return whether the outputs are those of a detector, float ``bbox [K, 6]`` and integer ``bbox_num [N]``."""
    if len(source.outputs) != 2:
        return False
    bbox, bbox_num = source.outputs
    shape = source.shapes[bbox]
    kinds = np.issubdtype(source.dtypes[bbox], np.floating) and np.issubdtype(source.dtypes[bbox_num], np.integer)
    return len(shape) == 2 and shape[1] == 6 and kinds


def _input_sizes(source: Source, batch: int | None, where: Path) -> dict[str, list[int | str]]:
    """Return the size of each axis of the inputs: a first axis that the program leaves open has the batch size.

    Args:
        source: the program.
        batch: the batch size; None: open.
        where: path of the model, for the error.

    Raises:
        UserError: the program fixes the first axes to something else than the batch size.
    """
    firsts = {name: source.shapes[name][0] for name in source.inputs if source.shapes[name]}
    if batch is not None and firsts and batch not in firsts.values() and min(firsts.values()) >= 0:
        name, fixed = next(iter(firsts.items()))
        raise UserError(
            f"{where}: batch is {batch}, but the model fixes it: its input {name} is {list(source.shapes[name])}, "
            f"expected {fixed}; leave the batch out, or make a Paddle model with an open batch"
        )
    sizes: dict[str, list[int | str]] = {}
    for name in source.inputs:
        sizes[name] = [size if size >= 0 else f"{name}_{axis}" for axis, size in enumerate(source.shapes[name])]
        if firsts.get(name, 0) < 0:
            sizes[name][0] = batch or "N"
    return sizes


def _batch_of(sizes: dict[str, list[int | str]]) -> int | str:
    """Return the batch size, or ``N``: the first size of the first input that has axes."""
    return next((shape[0] for shape in sizes.values() if shape), "N")


def _suppression(model: InferenceModel, source: Source, nms: str) -> Suppression | None:
    """Return the NMS that follows the outputs, cut out of the program or to append; None: there is none to regard."""
    op = next((op for op in source.ops if op.type == NMS_OP), None)
    if op is not None:
        with exporting(op):
            return cut_nms(source, op)
    return None if nms == "none" else described_suppression(model, source, nms)


def _outputs(build: GraphBuilder, source: Source, sizes: dict[str, list[int | str]]) -> list[Output]:
    outputs = []
    detections = _gives_detections(source)
    for position, name in enumerate(source.outputs):
        exposed = _OUTPUTS[position] if detections else source.exposed.get(name, name)
        value, dtype = build.get(name), source.dtypes[name]
        shape: list[int | str] = [
            size if size >= 0 else f"{exposed}_{axis}" for axis, size in enumerate(source.shapes[name])
        ]
        if detections and position == 0:
            shape = ["K", 6]
        elif detections:
            value, dtype = value if dtype == np.int32 else build.cast(value, np.int32), np.int32
            shape = [_batch_of(sizes)]
        outputs.append(Output(exposed, value, dtype, shape))
    return outputs


def _after_nms(build: GraphBuilder, source: Source, of: Suppression, nms: str, batch: int | str) -> list[Output]:
    """Append NMS to the outputs of the program."""
    boxes, scores = boxes_and_scores(build, source.outputs, of)
    first = source.shapes[source.outputs[0]]
    if len(source.outputs) == 2:
        anchors, classes = first[1], source.shapes[source.outputs[1]][1]
    elif of.family == "ppyoloe":
        anchors, classes = first[1], first[2] - 4
    elif has_objectness(first, of.post.num_classes):
        anchors, classes = first[1], first[2] - 5
    else:
        anchors, classes = first[2], first[1] - 4
    if nms == "onnx":
        return onnx_nms(build, boxes, scores, classes, of.post, batch)
    return tensorrt_nms(build, boxes, scores, anchors * classes, of.post, batch)


def _finish(
    build: GraphBuilder,
    source: Source,
    opset: int,
    sizes: dict[str, list[int | str]],
    outputs: list[Output],
    detections: dict[str, Any] | None,
) -> Any:
    onnx = build.onnx

    def described(name: str, dtype: Any, shape: list[int | str]) -> Any:
        return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    inputs = [described(name, source.dtypes[name], sizes[name]) for name in source.inputs]
    for output in outputs:
        build.nodes.append(onnx.helper.make_node("Identity", [output.value], [output.name], name=output.name))
    used = {name for node in build.nodes for name in node.input}
    initializers = [tensor for name, tensor in build.initializers.items() if name in used]
    described_outputs = [described(output.name, output.dtype, output.sizes) for output in outputs]
    graph = onnx.helper.make_graph(build.nodes, "detector", inputs, described_outputs, initializers)
    domains = sorted({node.domain for node in build.nodes} & {PLUGIN_DOMAIN})
    model = onnx.helper.make_model(
        graph,
        opset_imports=[
            onnx.helper.make_opsetid("", opset),
            *(onnx.helper.make_opsetid(domain, 1) for domain in domains),
        ],
        ir_version=_IR_VERSIONS[opset],
        producer_name="act_pipeline",
    )
    if detections is not None:
        onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(detections)})
    return model
