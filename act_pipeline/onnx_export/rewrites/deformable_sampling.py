"""The weighted sum of deformable attention without a concatenation of the levels, and vectorized over the queries.

Programs concatenate the samples of all levels, multiply them by the attention weights and sum them. The samples are the
largest tensors of the decoder, and the concatenation copies them. Weighting each level separately avoids the copy; only
the order of the additions changes. Levels with the same number of points are added before the sum over the points, as
runtimes fuse these products and additions, and one sum is left of one for each level. In OpenVINO (2026.4), sampling,
products and sums take 0.92 of the time of a sum for each level with 300 queries, 3 levels and 4 points, and 0.83 with
2125 queries and 4 levels.

The samples ``[N, C, Q, P]`` of a GridSample have the few points of a query on the last axis, over which the sum runs.
OpenVINO (2026.4) adds up four numbers at a time then. Sampled as ``[N, C, P, Q]``, it adds up whole rows of queries:
GridSample, product and sum of GroundingDINO's 2125 queries and 16 points take 0.57 of the time. This is done in
encoders, where every cell of the feature maps is a query. With the 300 queries of RT-DETR-R18's decoder nothing was
gained.
"""

from __future__ import annotations

from collections.abc import Callable

from act_pipeline.onnx_export.program import Op, Source

_POINTS_FIRST = [0, 2, 1, 3]  # of a grid [N, Q, P, 2]
_QUERIES_LAST = [0, 1, 3, 2]  # of weights [N, 1, Q, P]
_MANY_QUERIES = 1024  # decoders have at most 900

# Name of a tensor and type of op -> the op of that type that writes it, if the tensor is read once; else None.
_Alone = Callable[[str, str], "Op | None"]


def sum_by_level(source: Source, queries_last: bool = False) -> None:
    """Rewrite ``sum(concat(samples) * weights, -1)``, also where a flattened stack takes the place of ``concat``.

    Args:
        source: the program, changed in place.
        queries_last: sample ``[N, C, P, Q]`` where GridSample has many queries.
    """
    producers = {name: op for op in source.ops for names in op.outputs.values() for name in names}
    count: dict[str, int] = dict.fromkeys(source.outputs, 1)
    for name in (name for op in source.ops for names in op.inputs.values() for name in names):
        count[name] = count.get(name, 0) + 1
    for tensor in source.quantized.values():
        count[tensor.source] = count.get(tensor.source, 0) + 1

    def alone(name: str, kind: str) -> Op | None:
        op = producers.get(name)
        return op if op is not None and op.type == kind and count.get(name) == 1 else None

    for total in [op for op in source.ops if op.type == "reduce_sum"]:
        rank = len(source.shapes[total.input("X")])
        if [int(axis) % rank for axis in total.attrs["dim"]] != [rank - 1] or total.attrs.get("keep_dim"):
            continue
        product = alone(total.input("X"), "elementwise_mul")
        beside = product and _side_by_side(source, product.input("X"), alone)
        if not product or not beside:
            continue
        weights, (gone, samples) = product.input("Y"), beside
        sizes = [source.shapes[name][-1] for name in samples]
        if len(samples) < 2 or source.shapes[weights][-1] != sum(sizes) or min(sizes) < 1:
            continue
        grids = [alone(name, "grid_sampler") for name in samples] if queries_last else []
        many = rank == 4 and source.shapes[weights][-2] >= _MANY_QUERIES
        if grids and all(grids) and many and len(source.shapes[weights]) == 4:
            sampled = [_sample_points_first(source, op) for op in grids if op is not None]
            turned = _declare(source, f"{total.output}.weights", weights, _QUERIES_LAST)
            first = Op("transpose2", {"X": [weights]}, {"Out": [turned]}, {"axis": _QUERIES_LAST})
            _replace(source, [total, product, *gone], sampled, turned, sizes, 2, [first])
        else:
            _replace(source, [total, product, *gone], samples, weights, sizes, rank - 1, [])


def _side_by_side(source: Source, name: str, alone: _Alone) -> tuple[list[Op], list[str]] | None:
    """Return the ops that concatenate the levels along the last axis, and the samples that they read; or None.

    Paddle's programs have ``concat``, or ``stack`` and ``flatten``; PyTorch exports ``stack`` as ``unsqueeze`` of each
    sample and ``concat``.
    """
    rank = len(source.shapes[name])
    concat = alone(name, "concat")
    if concat is not None:
        return ([concat], concat.inputs["X"]) if int(concat.attrs["axis"]) % rank == rank - 1 else None
    flat = alone(name, "flatten_contiguous_range") or alone(name, "reshape2")
    if flat is None or len(source.shapes[flat.input("X")]) != rank + 1:
        return None
    before = source.shapes[flat.input("X")]
    if source.shapes[name] != (*before[:-2], before[-2] * before[-1]):
        return None
    stack = alone(flat.input("X"), "stack")
    if stack is not None:
        return ([flat, stack], stack.inputs["X"]) if int(stack.attrs["axis"]) % (rank + 1) == rank - 1 else None
    concat = alone(flat.input("X"), "concat")
    if concat is None or int(concat.attrs["axis"]) % (rank + 1) != rank - 1:
        return None
    parts = [alone(part, "unsqueeze2") for part in concat.inputs["X"]]
    found = [
        op for op in parts if op is not None and [int(axis) % (rank + 1) for axis in op.attrs["axes"]] == [rank - 1]
    ]
    return ([flat, concat, *found], [op.input("X") for op in found]) if len(found) == len(parts) else None


def _sample_points_first(source: Source, op: Op) -> str:
    """Let a GridSample write [N, C, P, Q] instead of [N, C, Q, P], and return the name of that tensor."""
    grid = op.input("Grid")
    turned = _declare(source, f"{op.output}.grid", grid, _POINTS_FIRST)
    transpose = Op("transpose2", {"X": [grid]}, {"Out": [turned]}, {"axis": _POINTS_FIRST})
    source.ops.insert(next(index for index, each in enumerate(source.ops) if each is op), transpose)
    slot = next(slot for slot, names in op.outputs.items() if op.output in names)
    sampled = _declare(source, f"{op.output}.points_first", op.output, _QUERIES_LAST)
    op.inputs["Grid"], op.outputs[slot] = [turned], [sampled]
    return sampled


def _declare(source: Source, name: str, like: str, axes: list[int]) -> str:
    source.shapes[name] = tuple(source.shapes[like][axis] for axis in axes)
    source.dtypes[name] = source.dtypes[like]
    return name


def _replace(
    source: Source, old: list[Op], samples: list[str], weights: str, sizes: list[int], axis: int, first: list[Op]
) -> None:
    """Replace ``old``, whose first op is the sum, with ``first`` and sums of the weighted samples along ``axis``."""
    total, result = old[0], old[0].output
    dtype, shape = source.dtypes[weights], source.shapes[result]

    def declare(name: str, sizes: tuple[int, ...]) -> str:
        source.shapes[name], source.dtypes[name] = sizes, dtype
        return name

    whole = source.shapes[weights]
    parts = [declare(f"{result}.w{n}", (*whole[:axis], size, *whole[axis + 1 :])) for n, size in enumerate(sizes)]
    made = [*first, Op("split", {"X": [weights]}, {"Out": parts}, {"axis": axis})]
    terms = []
    for number, (sample, part) in enumerate(zip(samples, parts)):
        terms.append(declare(f"{result}.p{number}", source.shapes[sample]))
        made.append(Op("elementwise_mul", {"X": [sample], "Y": [part]}, {"Out": [terms[-1]]}, {"axis": -1}))

    def reduced(name: str, into: str) -> str:
        made.append(Op("reduce_sum", {"X": [name]}, {"Out": [into]}, {**total.attrs, "dim": [axis]}))
        return into

    same = len({source.shapes[name] for name in terms}) == 1
    if not same:
        terms = [reduced(name, declare(f"{result}.s{number}", shape)) for number, name in enumerate(terms)]
    so_far = terms[0]
    for number, name in enumerate(terms[1:], 1):
        last = number == len(terms) - 1 and not same
        added = result if last else declare(f"{result}.a{number}", source.shapes[name])
        made.append(Op("elementwise_add", {"X": [so_far], "Y": [name]}, {"Out": [added]}, {"axis": -1}))
        so_far = added
    if same:
        reduced(so_far, result)
    gone = set(map(id, old))
    source.ops = [
        new for op in source.ops if op is total or id(op) not in gone for new in (made if op is total else (op,))
    ]
