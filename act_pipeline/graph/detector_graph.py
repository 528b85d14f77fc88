"""What a DETR's graph says of itself: how many classes it tells apart, what it does to the image, how it decodes boxes.

Nobody writes these into ``infer_cfg.yml``, or what is written there is wrong: PaddleDetection names COCO's 80 classes
where it finds no annotation file.
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
    """Facts that a graph shows; None: it does not show this one.

    Attributes:
        num_classes: that the post-process tells apart.
        normalizes: the image is scaled or shifted before the first convolution (``TestReader.fuse_normalize``).
        decodes_padding: boxes are decoded from the padded input (``DETRPostProcess.bbox_decode_type: pad``), not from
            the original picture's shape (``origin``).
    """

    num_classes: int | None = None
    normalizes: bool | None = None
    decodes_padding: bool | None = None


def read_detector_graph(model: InferenceModel) -> DetectorGraph:
    """Read a model's program.

    Raises:
        UserError: it is no program.
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
    """The post-process picks the best of queries x classes: the class is the remainder of dividing by their number."""
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
    """``im_shape / scale_factor`` is the original's shape; the canvas is that, times ``padded shape / im_shape``."""
    readers = [op for op in _readers(ops, "im_shape")]
    if not readers or any(op.type != "elementwise_div" for op in readers):
        return None
    divides = [set(op.inputs.get("Y", ())) & _copies(ops, "im_shape") for op in readers]
    return any(divides)


def _copies(ops: Sequence[_Op], name: str) -> set[str]:
    """Return a tensor's names: its own, and those behind Q/DQ, which changes nothing in what this module asks."""
    names = {name}
    for op in ops:
        if op.type in _QUANTIZATION and names.intersection(op.inputs.get("X", ())):
            names.update(op.outputs[:1])
    return names


def _readers(ops: Sequence[_Op], name: str) -> list[_Op]:
    names = _copies(ops, name)
    return [op for op in ops if op.type not in _QUANTIZATION and any(op.reads(one) for one in names)]
