"""How far a quantized model's outputs are from the float model's: signal and noise, from which comes the SQNR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import GATHERING, RESHAPING, TOP_K
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class RawOutputs:
    """The tensors that RT-DETR's post-process starts from.

    Attributes:
        scores: [N, Q, C] in [0, 1].
        boxes: [N, Q, 4], shares of the image.
        queries: [N, Q], the place in the encoder's memory that each query was selected from.
    """

    scores: str
    boxes: str
    queries: str

    @property
    def names(self) -> tuple[str, str, str]:
        """The three."""
        return self.scores, self.boxes, self.queries


def find_raw_outputs(graph: StaticGraph) -> RawOutputs | None:
    """Return what an RT-DETR's post-process starts from; None in another graph."""
    block = graph.program.global_block()
    graph_index = GraphIndex(block.ops)
    ops = graph_index.ops
    selections = [index for index, op in enumerate(ops) if op.type in TOP_K]
    if len(selections) < 2:
        return None
    first, last = ops[selections[0]], ops[selections[-1]]
    scores = last.input("X")[0]
    while len(block.var(scores).shape) != 3:
        op = graph_index.producer.get(scores)
        if op is None or op.type not in RESHAPING:
            return None
        scores = op.input("X")[0]
    queries = block.var(scores).shape[1]
    for op in ops[selections[-1] :]:
        if op.type in GATHERING:
            for name in op.input_arg_names:
                if tuple(block.var(name).shape[1:]) == (queries, 4):
                    return RawOutputs(scores, name, first.output("Indices")[0])
    return None


def signal_and_noise(
    exact: Mapping[str, np.ndarray], quantized: Mapping[str, np.ndarray], raw: RawOutputs | None
) -> tuple[float, float]:
    """Return the powers of the float outputs and of their difference from the quantized model's, summed up.

    A query's output is its scores in all classes, and its box times its best score: a box that nobody sees is no
    output. Queries are compared by the place that they were selected from, since their order means nothing: the
    float model's query has the quantized model's as its partner if both come from one place; one without a partner is
    compared with zeros. Where the post-process is not RT-DETR's, the rows of ``bbox`` are compared as they stand.

    Args:
        exact, quantized: as :meth:`act_pipeline.analysis.simulation.Simulation.run` gives them, ``raw`` tapped.
        raw: of :func:`find_raw_outputs`.
    """
    if raw is None:
        one, other = (np.asarray(outputs["bbox"], np.float64) for outputs in (exact, quantized))
        signal = float((one**2).sum())
        return signal, float(((one - other) ** 2).sum()) if one.shape == other.shape else signal
    signal = noise = 0.0
    one, other = _vectors(exact, raw), _vectors(quantized, raw)
    for image, (places, other_places) in enumerate(zip(exact[raw.queries], quantized[raw.queries])):
        _, rows, other_rows = np.intersect1d(places, other_places, return_indices=True)
        ours, theirs = one[image], other[image]
        common = float(((ours[rows] - theirs[other_rows]) ** 2).sum())
        gone = float((ours**2).sum() - (ours[rows] ** 2).sum())
        new = float((theirs**2).sum() - (theirs[other_rows] ** 2).sum())
        signal += float((ours**2).sum())
        noise += common + max(gone, 0.0) + max(new, 0.0)
    return signal, noise


def _vectors(outputs: Mapping[str, np.ndarray], raw: RawOutputs) -> np.ndarray:
    scores = np.asarray(outputs[raw.scores], np.float64)
    boxes = np.asarray(outputs[raw.boxes], np.float64)
    return np.concatenate([scores, boxes * scores.max(axis=2, keepdims=True)], axis=2)
