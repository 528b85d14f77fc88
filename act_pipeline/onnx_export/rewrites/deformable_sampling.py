"""The weighted sum of deformable attention, computed for each level separately.

Programs concatenate the samples of all levels, multiply them by the attention weights and sum them. The samples are the
largest tensors of the decoder, and the concatenation copies them. Summing each level and adding the sums avoids the
copy; only the order of the additions changes.
"""

from __future__ import annotations

from collections.abc import Callable

from act_pipeline.onnx_export.program import Op, Source


def sum_by_level(source: Source) -> None:
    """Rewrite ``sum(concat(samples) * weights, -1)``, also where a flattened stack takes the place of ``concat``.

    Args:
        source: the program, changed in place.
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
        weights, samples = product.input("Y"), beside[-1].inputs["X"]
        sizes = [source.shapes[name][-1] for name in samples]
        if source.shapes[weights][-1] == sum(sizes) and min(sizes) > 0:
            _replace(source, [total, product, *beside], samples, weights, sizes)


def _side_by_side(source: Source, name: str, alone: Callable[[str, str], Op | None]) -> list[Op] | None:
    """Return the ops that concatenate the levels along the last axis, the op that reads the samples last, or None."""
    rank = len(source.shapes[name])
    concat = alone(name, "concat")
    if concat is not None:
        return [concat] if int(concat.attrs["axis"]) % rank == rank - 1 else None
    flat = alone(name, "flatten_contiguous_range")
    stack = alone(flat.input("X"), "stack") if flat is not None else None
    if flat is None or stack is None or int(flat.attrs["start_axis"]) % (rank + 1) != rank - 1:
        return None
    return [flat, stack] if int(stack.attrs["axis"]) % (rank + 1) == rank - 1 else None


def _replace(source: Source, old: list[Op], samples: list[str], weights: str, sizes: list[int]) -> None:
    total, result = old[0], old[0].output
    dtype, shape = source.dtypes[weights], source.shapes[result]

    def declare(name: str, sizes: tuple[int, ...]) -> str:
        source.shapes[name], source.dtypes[name] = sizes, dtype
        return name

    parts = [declare(f"{result}.w{n}", (*source.shapes[weights][:-1], size)) for n, size in enumerate(sizes)]
    made = [Op("split", {"X": [weights]}, {"Out": parts}, {"axis": len(source.shapes[weights]) - 1})]
    sums = []
    for number, (sample, part) in enumerate(zip(samples, parts)):
        weighted = declare(f"{result}.p{number}", source.shapes[sample])
        made.append(Op("elementwise_mul", {"X": [sample], "Y": [part]}, {"Out": [weighted]}, {"axis": -1}))
        sums.append(declare(f"{result}.s{number}", shape))
        made.append(Op("reduce_sum", {"X": [weighted]}, {"Out": [sums[-1]]}, total.attrs))
    so_far = sums[0]
    for number, name in enumerate(sums[1:], 1):
        added = result if number == len(sums) - 1 else declare(f"{result}.a{number}", shape)
        made.append(Op("elementwise_add", {"X": [so_far], "Y": [name]}, {"Out": [added]}, {"axis": -1}))
        so_far = added
    if len(sums) > 1:
        gone = set(map(id, old))
        source.ops = [
            new for op in source.ops if op is total or id(op) not in gone for new in (made if op is total else (op,))
        ]
