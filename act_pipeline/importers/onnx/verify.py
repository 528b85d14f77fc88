"""Comparison of an imported model with ONNX Runtime on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.families.interface import DetectorFamily
from act_pipeline.families.registry import find_family
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.importers.onnx.convert import Converted, batch_of, first_line, quiet
from act_pipeline.importers.onnx.pictures import Pictures, Preparation, preparation_of
from act_pipeline.importers.onnx.source import OnnxInput, OnnxSource

TOLERANCE = 1e-3
_SEED = 20
_MOST_ROWS = 2000


class Reference:
    """The ONNX file in ONNX Runtime, and the inputs for the comparison.

    Args:
        source: the file.
        pictures: for the image input, prepared as for the family; all other inputs are seeded random numbers.
        family: the detector family, where it is known; None: as the outputs say.
        count: how many different batches of the file's size to compare.

    Attributes:
        samples: the inputs of each comparison.
        compared_on: what they are, for users.

    Raises:
        UserError: ONNX Runtime cannot load or run the file.
    """

    def __init__(
        self, source: OnnxSource, pictures: Pictures, family: DetectorFamily | None = None, count: int = 3
    ) -> None:
        import onnxruntime

        self.source = source
        self._pictures, self._count = pictures, count
        self.samples = self._prepared(preparation := preparation_of(family))
        try:
            session = onnxruntime.InferenceSession(
                source.reference.SerializeToString(), quiet(), providers=["CPUExecutionProvider"]
            )
            names = list(source.outputs)
            if family is None and source.image is not None:
                shapes = [np.shape(each) for each in session.run(names, self.samples[0])]
                preparation = preparation_of(_family(dict(zip(names, shapes)), source.path))
                self.samples = self._prepared(preparation)
            self.outputs = [[np.asarray(each) for each in session.run(names, sample)] for sample in self.samples]
        except Exception as error:  # ONNX Runtime has an exception type for each of its status codes
            raise UserError(
                f"{source.path} does not run in ONNX Runtime: {first_line(error)}; check it, or export it again"
            ) from None

        self.compared_on = self._described(preparation)

    def _prepared(self, preparation: Preparation) -> list[dict[str, np.ndarray]]:
        rng = np.random.default_rng(_SEED)
        return [_sample(self.source, rng, self._pictures, preparation, index) for index in range(self._count)]

    def _described(self, preparation: Preparation) -> str:
        count = self._count * batch_of(self.source)
        others = [each for each in self.source.inputs if each.name != self.source.image]
        drawn = ", ".join(each.name for each in others if _known_values(each, (1, 1)) is None)
        if self.source.image is None:
            return "random numbers, since no input is a picture"
        found = f"{count} {self._pictures.words} ({preparation.words})"
        return f"{found} and random numbers for {drawn}" if drawn else found

    def difference(self, model: InferenceModel, converted: Converted, batched: bool) -> float:
        """Return the largest difference of a saved model's outputs; call it within ``static_mode``.

        Args:
            model: the saved model.
            converted: what it was saved from.
            batched: run all inputs as one batch, else one after the other.

        Returns:
            The largest ``|a - b| / max(1, |b|)`` over all outputs; infinite where the shapes differ or one is not a
            number and the other is. Rows of DETR-like outputs, [N, Q, ...] or ``bbox`` and ``bbox_num``, are
            compared as sets if they differ in their order.

        Raises:
            UserError: Paddle cannot run the model.
        """
        import paddle

        graph = StaticGraph.load(model)
        try:
            groups = [self.samples] if batched else [[sample] for sample in self.samples]
            expected = [self._joined(self.outputs, converted)] if batched else self.outputs
            largest = 0.0
            for group, outputs in zip(groups, expected):
                feed = {}
                for name, known in converted.inputs.items():
                    if known in graph.feed_names:
                        opened = graph.program.global_block().var(known).shape[:1] == (-1,)
                        parts = [sample[name] for sample in group]
                        feed[known] = np.concatenate(parts) if opened else parts[0]
                with paddle.static.scope_guard(graph.scope):
                    found = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
                largest = max(largest, compare(outputs, [np.asarray(each) for each in found]))
            return largest
        except (RuntimeError, ValueError, IndexError, OSError, MemoryError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(f"{self.source.path}: Paddle cannot run what was imported: {lines[-1][:200]}") from None
        finally:
            graph.close()

    def _joined(self, runs: Sequence[Sequence[np.ndarray]], converted: Converted) -> list[np.ndarray]:
        """Return the outputs of several runs as one batch, joined along each output's open dimension."""
        joined = []
        for index, target in enumerate(converted.graph.fetch_targets):
            axis = next((axis for axis, size in enumerate(target.shape) if size < 0), None)
            parts = [run[index] for run in runs]
            joined.append(parts[0] if axis is None else np.concatenate(parts, axis))
        return joined


def compare(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Return the largest difference of two lists of outputs, see :meth:`Reference.difference`."""
    if any(one.shape != other.shape for one, other in zip(expected, found)) or len(expected) != len(found):
        return float("inf")
    in_order = max((_largest(one, other) for one, other in zip(expected, found)), default=0.0)
    if in_order <= TOLERANCE:
        return in_order
    rows, others = _rows(expected), _rows(found)
    if rows is None or others is None or [len(each) for each in rows] != [len(each) for each in others]:
        return in_order
    return max(_as_sets(one, other) for one, other in zip(rows, others))


def _family(shapes: Mapping[str, tuple[int, ...]], where: Path) -> DetectorFamily | None:
    try:
        return find_family(shapes, where)
    except UserError:  # part of a detector, or after a post-process
        return None


def _largest(expected: np.ndarray, found: np.ndarray) -> float:
    if not expected.size:
        return 0.0
    one, other = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    return float((np.abs(one[finite] - other[finite]) / np.maximum(1, np.abs(one[finite]))).max())


def _rows(outputs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Return [Q, values] for each image of ``bbox`` and ``bbox_num``, or of outputs [N, Q, ...]; None for others."""
    if len(outputs) == 2 and outputs[0].ndim == 2 and outputs[1].ndim == 1 and outputs[1].dtype.kind == "i":
        boxes, counts = outputs
        if (counts >= 0).all() and counts.sum() == len(boxes) and counts.max(initial=0) <= _MOST_ROWS:
            return np.split(np.nan_to_num(boxes.astype(np.float64), posinf=1e30, neginf=-1e30), np.cumsum(counts)[:-1])
    shapes = {each.shape[:2] for each in outputs}
    if len(shapes) != 1 or any(each.ndim < 2 for each in outputs):
        return None
    batch, count = shapes.pop()
    if not 1 < count <= _MOST_ROWS:
        return None
    joined = np.concatenate([each.reshape(batch, count, -1).astype(np.float64) for each in outputs], axis=-1)
    return list(np.nan_to_num(joined, posinf=1e30, neginf=-1e30))


def _as_sets(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference of rows, each with another one of the other side, so that the sum is smallest."""
    from scipy.optimize import linear_sum_assignment

    if not len(expected):
        return 0.0
    distances = np.stack([(np.abs(found - row) / np.maximum(1, np.abs(row))).max(-1) for row in expected])
    rows, columns = linear_sum_assignment(distances)
    return float(distances[rows, columns].max())


def _sample(
    source: OnnxSource, rng: np.random.Generator, pictures: Pictures, preparation: Preparation, index: int
) -> dict[str, np.ndarray]:
    """Return values for all inputs: pictures for the image, seeded numbers for the others."""
    batch = batch_of(source)
    size = next((each.shape[2:] for each in source.inputs if each.name == source.image), (640, 640))
    sample = {}
    for each in source.inputs:
        if each.name == source.image:
            taken = [pictures.take(index * batch + position, max(size)) for position in range(batch)]
            sample[each.name] = np.stack([preparation(picture, size, each.dtype) for picture in taken])
        else:
            sample[each.name] = _values(source, each, size, rng)
    return sample


def _values(source: OnnxSource, each: OnnxInput, size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Return numbers in the range of an input, as far as its name, type and use tell it."""
    known = _known_values(each, size)
    if known is not None:
        return known
    if each.dtype == "float32":
        return rng.random(each.shape, np.float32)
    if each.dtype == "bool":
        return rng.random(each.shape) < 0.5
    return rng.integers(0, _table_rows(source, each.name), each.shape).astype(each.dtype)


def _known_values(each: OnnxInput, size: Sequence[int]) -> np.ndarray | None:
    """Return the values of an input whose name tells them: of a mask, a scale or a size."""
    name = each.name.lower()
    if "mask" in name or "scale_factor" in name:
        return np.ones(each.shape, each.dtype)
    if each.shape[-1:] == (2,) and ("shape" in name or "size" in name):
        return np.broadcast_to(np.array(size, each.dtype), each.shape).copy()
    return None


def _table_rows(source: OnnxSource, name: str) -> int:
    """Return the rows of the constant table that an input indexes; 2 without one."""
    names = {name}
    for node in source.nodes:
        if node.type == "Cast" and node.inputs[0] in names:
            names.add(node.outputs[0])
        table = source.constants.get(node.inputs[0]) if node.type == "Gather" else None
        if table is not None and node.inputs[1] in names and table.ndim:
            return int(table.shape[int(node.attrs.get("axis", 0))])
    return 2


def state_difference(value: Any) -> str:
    """Return a difference as text for messages."""
    return "infinite" if value == float("inf") else f"{value:.1e}"
