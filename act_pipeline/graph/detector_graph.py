"""Properties of a DETR read from its graph: number of classes, normalization of the image, decoding of the boxes.

``infer_cfg.yml`` does not contain them, or contains wrong values: PaddleDetection writes the 80 classes of COCO where
it finds no annotation file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from act_pipeline.core.artifacts import InferenceModel

_QUANTIZATION = ("quantize_linear", "dequantize_linear")
_ARITHMETIC = ("elementwise_mul", "elementwise_div", "elementwise_add", "elementwise_sub", "scale")
_NETWORK = ("conv2d", "depthwise_conv2d", "pad3d")


@dataclass(frozen=True)
class DetectorGraph:
    """Properties of a detector read from its graph; None where the graph does not determine one.

    Attributes:
        num_classes: number of classes in the post-process.
        normalizes: whether the graph scales or shifts the image before the first convolution
            (``TestReader.fuse_normalize``).
        decodes_padding: whether boxes are decoded relative to the padded input
            (``DETRPostProcess.bbox_decode_type: pad``), not to the original image (``origin``).
    """

    num_classes: int | None = None
    normalizes: bool | None = None
    decodes_padding: bool | None = None


def read_detector_graph(model: InferenceModel) -> DetectorGraph:
    """Return the properties of a model, read from its program.

    Raises:
        UserError: the file is not a program.
    """
    from act_pipeline.graph.model_files import read_program

    ops = [_Op.of(op) for op in read_program(model.model_path).blocks[0].ops]
    return DetectorGraph(_num_classes(ops), _normalizes(ops), _decodes_padding(ops))


@dataclass(frozen=True)
class _Op:
    type: str
    inputs: Mapping[str, Sequence[str]]
    outputs: Sequence[str]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, op: Any) -> _Op:
        from act_pipeline.graph.program_desc import variables

        values = {}
        if op.type == "fill_constant":
            values = {attribute.name: attribute.f for attribute in op.attrs if attribute.name == "value"}
        inputs = {slot.parameter: list(variables([slot])) for slot in op.inputs}
        return cls(op.type, inputs, list(variables(op.outputs)), values)

    def reads(self, name: str) -> bool:
        return any(name in names for names in self.inputs.values())


def _num_classes(ops: Sequence[_Op]) -> int | None:
    """Return the constant by which the post-process divides the top-k index of queries x classes to get the class."""
    constants = {op.outputs[0]: op.attributes["value"] for op in ops if op.attributes.get("value") is not None}
    divisors = {
        constants[name]
        for op in ops
        if op.type == "elementwise_mod"
        for name in op.inputs.get("Y", ())
        if name in constants
    }
    (count,) = divisors if len(divisors) == 1 else (0,)
    return int(count) or None


def _normalizes(ops: Sequence[_Op]) -> bool | None:
    first = [op.type for op in _readers(ops, "image")]
    if first and all(kind in _ARITHMETIC for kind in first):
        return True
    return False if first and all(kind in _NETWORK for kind in first) else None


def _decodes_padding(ops: Sequence[_Op]) -> bool | None:
    """Return whether the graph divides by ``im_shape``; None if ``im_shape`` has other readers than divisions.

    ``im_shape / scale_factor`` is the shape of the original image. With padding it is multiplied by
    ``padded shape / im_shape``.
    """
    readers = [op for op in _readers(ops, "im_shape")]
    if not readers or any(op.type != "elementwise_div" for op in readers):
        return None
    divides = [set(op.inputs.get("Y", ())) & _copies(ops, "im_shape") for op in readers]
    return any(divides)


def _copies(ops: Sequence[_Op], name: str) -> set[str]:
    """Return the names of a tensor and of its Q/DQ copies, which are equivalent for the purposes of this module."""
    names = {name}
    for op in ops:
        if op.type in _QUANTIZATION and names.intersection(op.inputs.get("X", ())):
            names.update(op.outputs[:1])
    return names


def _readers(ops: Sequence[_Op], name: str) -> list[_Op]:
    names = _copies(ops, name)
    return [op for op in ops if op.type not in _QUANTIZATION and any(op.reads(one) for one in names)]
