"""Conversion between feature maps and sequences as a four-dimensional transpose and a reshape.

Paddle's programs flatten a feature map and transpose it in three dimensions. Runtimes compute convolutions in
channels-last layout, where this conversion costs nothing, but they recognize it only in four dimensions:
``[N, C, H, W]`` to ``[N, H, W, C]``, then flattened. The values are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator

from act_pipeline.onnx_export.program import Op, Source

_TURN, _SHAPE = "transpose2", "reshape2"
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def rewrite_layout_conversions(source: Source) -> None:
    """Rewrite conversions between feature maps ``[N, C, H, W]`` and sequences ``[N, H * W, C]``.

    Args:
        source: the program, changed in place.
    """
    for first, second in list(_pairs(source)):
        kinds, shape = (first.type, second.type), source.shapes[first.input("X")]
        turned = [int(axis) for op in (first, second) if op.type == "transpose2" for axis in op.attrs["axis"]]
        result = source.shapes[second.output]
        if kinds == ("flatten_contiguous_range", "transpose2") and len(shape) == 4 and turned == [0, 2, 1]:
            # [N, C, H, W] -> [N, H * W, C]
            if min(shape[1:]) > 0 and source.shapes[first.output] == (shape[0], shape[1], shape[2] * shape[3]):
                _replace(source, first, second, [(_TURN, _TO_LAST), (_SHAPE, [-1, result[1], result[2]])])
        elif kinds == ("transpose2", "reshape2") and len(result) == 4 and min(result[1:]) > 0:
            height, width = result[2:]
            if turned == [0, 2, 1] and shape[1:] == (height * width, result[1]):
                # [N, H * W, C] -> [N, C, H, W]
                _replace(source, first, second, [(_SHAPE, [-1, height, width, shape[2]]), (_TURN, _TO_FIRST)])
            elif turned == _TO_LAST and shape[1] == height * width and shape[3] == result[1]:
                # [N, H * W, heads, C] -> [N * heads, C, H, W], the values sampled by deformable attention
                sizes = [-1, height, width, shape[2] * shape[3]]
                steps = [(_SHAPE, sizes), (_TURN, _TO_FIRST), (_SHAPE, [-1, *result[1:]])]
                _replace(source, first, second, steps)


def _pairs(source: Source) -> Iterator[tuple[Op, Op]]:
    """Yield each flatten or transpose together with the only op that reads its result."""
    readers: dict[str, list[Op | None]] = {name: [None] for name in source.outputs}
    for tensor in source.quantized.values():
        readers.setdefault(tensor.source, []).append(None)
    for op in source.ops:
        for name in (name for names in op.inputs.values() for name in names):
            readers.setdefault(name, []).append(op)
    for op in source.ops:
        if op.type in ("flatten_contiguous_range", "transpose2"):
            reading = readers.get(op.output, [])
            if len(reading) == 1 and reading[0] is not None:
                yield op, reading[0]


def _replace(source: Source, first: Op, second: Op, steps: list[tuple[str, list[int]]]) -> None:
    """Replace two ops with ``steps``, each a permutation of the axes or a shape."""
    made, name = [], first.input("X")
    for number, (kind, numbers) in enumerate(steps):
        before = source.shapes[name]
        output = second.output if number == len(steps) - 1 else f"{second.output}.layout{number}"
        if kind == _TURN:
            made.append(Op(_TURN, {"X": [name]}, {"Out": [output]}, {"axis": numbers}))
            source.shapes[output] = tuple(before[axis] for axis in numbers)
        else:
            made.append(Op(_SHAPE, {"X": [name]}, {"Out": [output]}, {"shape": numbers}))
            source.shapes[output] = tuple(numbers)
        source.dtypes[output] = source.dtypes[first.input("X")]
        name = output
    source.ops = [new for op in source.ops if op is not first for new in (made if op is second else (op,))]
