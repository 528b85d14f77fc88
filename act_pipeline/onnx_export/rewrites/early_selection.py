"""Selection of the best rows before the layers that compute each row by itself.

RT-DETR scores all cells of its feature maps (8400 at 640x640), predicts a box for each, and then takes the 300 with the
best scores. A linear layer, an activation and an addition compute each row by itself, so the rows can be taken first:
the three layers of the box head compute 300 rows instead of 8400. The values are unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from act_pipeline.onnx_export.program import Op, Source

_SELECTIONS = ("gather_nd", "take_along_axis")
_PRODUCTS = ("matmul_v2", "matmul")
_BINARY = ("elementwise_add", "elementwise_sub", "elementwise_mul", "elementwise_div")
_UNARY = (
    "relu", "relu6", "gelu", "sigmoid", "silu", "swish", "hard_swish", "hard_sigmoid", "tanh", "leaky_relu", "scale",
)  # fmt: skip


@dataclass(frozen=True)
class _Selection:
    """An op that picks rows of a tensor ``[N, L, C]``.

    Attributes:
        op: the op, ``gather_nd`` (PaddleDetection) or ``take_along_axis`` of a repeated index (PyTorch's ``gather``).
        slot: slot of the tensor.
        index: name of the indices: ``[N, K, 2]``, image and row, or ``[N, K, 1]``, the row.
        count: K.
    """

    op: Op
    slot: str
    index: str
    count: int

    @property
    def rows(self) -> str:
        return self.op.input(self.slot)


def select_early(source: Source) -> None:
    """Move the selection of rows up past ops that compute each row by itself.

    An op is passed if nothing else reads its result, and only where a linear layer is among those that are passed.

    Args:
        source: the program, changed in place.
    """
    for op in [op for op in source.ops if op.type in _SELECTIONS]:
        writers = _writers(source)
        selection = _selection(source, op, writers)
        chain = _rowwise(source, selection, writers) if selection else []
        if selection and any(passed.type in _PRODUCTS for passed in chain):
            _move(source, selection, chain)


def _writers(source: Source) -> dict[str, Op]:
    return {name: op for op in source.ops for names in op.outputs.values() for name in names}


def _selection(source: Source, op: Op, writers: Mapping[str, Op]) -> _Selection | None:
    """Return how an op picks rows of a tensor ``[N, L, C]``, fewer than L; None: it does something else."""
    if op.type == "gather_nd":
        slot, index, columns = "X", op.input("Index"), 2
    elif op.type == "take_along_axis" and int(op.attrs.get("Axis", 0)) == 1:
        repeat = writers.get(op.input("Index"))
        if repeat is None or repeat.type not in ("tile", "expand_v2"):
            return None
        slot, index, columns = "Input", repeat.input("X"), 1
    else:
        return None
    rows, picked = source.shapes[op.input(slot)], source.shapes[index]
    if len(rows) != 3 or len(picked) != 3 or picked[2] != columns or not 0 < picked[1] < rows[1]:
        return None
    return _Selection(op, slot, index, picked[1])


def _rowwise(source: Source, selection: _Selection, writers: Mapping[str, Op]) -> list[Op]:
    """Return the ops before a selection that compute each row by itself, the last one first."""
    chain: list[Op] = []
    name = selection.rows
    length = source.shapes[name][1]
    reading = Counter(source.outputs)
    for op in source.ops:
        reading.update(_float_name(source, name) for names in op.inputs.values() for name in names)
    while reading[name] == 1 and name in writers and _passable(source, writers[name], length):
        chain.append(writers[name])
        name = _float_name(source, chain[-1].input("X"))
    return chain


def _passable(source: Source, op: Op, length: int) -> bool:
    """Return whether an op writes one tensor ``[N, length, C]``, each row from one row ``[N, length, C']``."""
    if [len(names) for names in op.outputs.values()] != [1] or "X" not in op.inputs:
        return False
    before, after = source.shapes[_float_name(source, op.input("X"))], source.shapes[op.output]
    if len(before) != 3 or len(after) != 3 or not before[1] == after[1] == length:
        return False
    if op.type in _UNARY:
        return list(op.inputs) == ["X"]
    if op.type in _PRODUCTS:
        turned = op.attrs.get("trans_x") or op.attrs.get("transpose_X")
        return not turned and _is_constant(source, op.input("Y")) and len(source.shapes[op.input("Y")]) == 2
    if op.type not in _BINARY or not _is_constant(source, op.input("Y")):
        return False
    shape = source.shapes[op.input("Y")]
    if len(shape) == 1:
        return int(op.attrs.get("axis", -1)) in (-1, 2) and shape[0] in (1, after[2])
    return not shape or (len(shape) == 3 and shape[0] == 1 and shape[1] in (1, length))


def _is_constant(source: Source, name: str) -> bool:
    tensor = source.quantized.get(name)
    return name in source.constants or (tensor is not None and tensor.weight is not None)


def _float_name(source: Source, name: str) -> str:
    """Return the name of the tensor before its rounding."""
    tensor = source.quantized.get(name)
    return name if tensor is None or tensor.weight is not None else tensor.source


def _move(source: Source, selection: _Selection, chain: list[Op]) -> None:
    """Pick the rows that the first op reads, the last one of ``chain``, and compute the chain of these rows."""
    result, rounded = selection.op.output, chain[-1].input("X")
    base = _float_name(source, rounded)
    name, made = _picked(source, selection, base)
    if rounded != base:
        source.quantized[f"{name}.rounded_for_{result}"] = replace(source.quantized[rounded], source=name)
        name = _declare(source, f"{name}.rounded_for_{result}", base, selection.count)
    chain[-1].inputs["X"] = [name]
    for op in reversed(chain):
        if op.type in _BINARY and len(source.shapes[op.input("Y")]) == 3 and source.shapes[op.input("Y")][1] > 1:
            made.extend(_rows_of_constant(source, op, selection))
        _declare(source, op.output, op.output, selection.count)
        made.append(op)
    slot = next(slot for slot, names in chain[0].outputs.items() if names)
    chain[0].outputs[slot] = [result]
    moved = {id(op) for op in made}
    source.ops = [
        new
        for op in source.ops
        if op is selection.op or id(op) not in moved
        for new in (made if op is selection.op else (op,))
    ]


def _picked(source: Source, selection: _Selection, base: str) -> tuple[str, list[Op]]:
    """Return the name of the picked rows of ``base``, and the ops to put where the selection stands."""
    name = f"{base}.picked_for_{selection.op.output}"
    if selection.op.type == "gather_nd":
        picking = Op("gather_nd", {"X": [base], "Index": [selection.index]}, {"Out": [name]}, {})
        kinds = [(op.type, op.inputs) for op in source.ops]
        if (picking.type, picking.inputs) in kinds:
            there = kinds.index((picking.type, picking.inputs))
            later = any(op is selection.op for op in source.ops[:there])
            return source.ops[there].output, [source.ops[there]] if later else []
        return _declare(source, name, base, selection.count), [picking]
    _declare(source, name, base, selection.count)
    index, columns = _declare(source, f"{name}.index", base, selection.count), source.shapes[base][2]
    source.dtypes[index] = source.dtypes[selection.index]
    repeat = Op("tile", {"X": [selection.index]}, {"Out": [index]}, {"repeat_times": [1, 1, columns]})
    taking = Op("take_along_axis", {"Input": [base], "Index": [index]}, {"Result": [name]}, {"Axis": 1})
    return name, [repeat, taking]


def _rows_of_constant(source: Source, op: Op, selection: _Selection) -> list[Op]:
    """Let an op read the picked rows of its constant ``[1, L, C]``, as the anchors are; return the ops that pick."""
    constant, made, rows = op.input("Y"), [], selection.index
    table, chosen = (f"{op.output}.{part}" for part in ("table", "constant"))
    sizes = source.shapes[rows][:2]
    source.constants[table] = np.asarray(source.constants[constant][0])
    source.shapes[table], source.dtypes[table] = source.shapes[constant][1:], source.dtypes[constant]
    if source.shapes[rows][2] == 2:
        row = f"{op.output}.row"
        source.shapes[row], source.dtypes[row] = (*sizes, 1), source.dtypes[rows]
        last = {"axes": [2], "starts": [1], "ends": [2], "decrease_axis": [], "infer_flags": [1]}
        made.append(Op("slice", {"Input": [rows]}, {"Out": [row]}, last))
        rows = row
    source.shapes[chosen], source.dtypes[chosen] = (*sizes, source.shapes[table][1]), source.dtypes[constant]
    op.inputs["Y"] = [chosen]
    return [*made, Op("gather_nd", {"X": [table], "Index": [rows]}, {"Out": [chosen]}, {})]


def _declare(source: Source, name: str, like: str, count: int) -> str:
    """Describe a tensor that has ``count`` rows and is otherwise like another one; return its name."""
    source.shapes[name] = (source.shapes[like][0], count, source.shapes[like][2])
    source.dtypes[name] = source.dtypes[like]
    return name
