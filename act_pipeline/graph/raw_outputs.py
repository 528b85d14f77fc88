"""Signal and noise power of a quantized model's outputs compared with the float model's, for the SQNR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_pipeline.graph.detr_structure import DetrStructure
from act_pipeline.graph.op_types import GATHERING, RESHAPING
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class RawOutputs:
    """Names of the tensors that RT-DETR's post-process reads, and of the selected queries.

    Attributes:
        scores: [N, Q, C], in [0, 1].
        boxes: [N, Q, 4], relative to the size of the image.
        queries: [N, Q], index in the encoder's memory that each query was selected from.
    """

    scores: str
    boxes: str
    queries: str

    @property
    def names(self) -> tuple[str, str, str]:
        """The names of ``scores``, ``boxes`` and ``queries``."""
        return self.scores, self.boxes, self.queries


def find_raw_outputs(graph: StaticGraph) -> RawOutputs | None:
    """Return the tensors that RT-DETR's post-process reads; None if the graph is not an RT-DETR.

    Args:
        graph: the loaded graph; not changed.
    """
    structure = DetrStructure(graph.program)
    selection = next(structure.query_selections(), None)
    if selection is None:
        return None
    queries = selection.output("Indices")[0]
    post_process = structure.detection_selection(queries)
    if post_process is None:
        return None
    scores = _read_scores(structure, post_process)
    boxes = _read_boxes(structure, post_process, structure.shape(scores)[1]) if scores else None
    return RawOutputs(scores, boxes, queries) if scores and boxes else None


def _read_scores(structure: DetrStructure, post_process: Any) -> str | None:
    """Return the scores [N, Q, C] that the top-k of the post-process selects from."""
    walk = structure.upstream(post_process.input("X")[0], RESHAPING)
    return next((name for name in walk if len(structure.shape(name)) == 3), None)


def _read_boxes(structure: DetrStructure, post_process: Any, queries: int) -> str | None:
    """Return the boxes [N, Q, 4] that the post-process gathers by the indices of its top-k."""
    after = structure.ops[structure.ops.index(post_process) :]
    read = (name for op in after if op.type in GATHERING for name in op.input_arg_names)
    return next((name for name in read if structure.shape(name)[1:] == (queries, 4)), None)


def signal_and_noise(
    exact: Mapping[str, np.ndarray], quantized: Mapping[str, np.ndarray], raw: RawOutputs | None
) -> tuple[float, float]:
    """Return the summed power of the float outputs, and of their difference from the quantized outputs.

    The output of a query is its scores for all classes, and its box multiplied by its best score, so that boxes with
    low scores count little. The order of queries is arbitrary, so queries are matched by the index in the encoder's
    memory that they were selected from. A query without a match is compared with zeros. If the graph is not an
    RT-DETR, the rows of ``bbox`` are compared in order.

    Args:
        exact: outputs of the float model by name, from :meth:`act_pipeline.analysis.simulation.Simulation.run`,
            including the tensors of ``raw``.
        quantized: the same of the quantized model.
        raw: result of :func:`find_raw_outputs`.

    Returns:
        Signal power and noise power; both are equal where ``bbox`` arrays of different shapes are compared.
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
