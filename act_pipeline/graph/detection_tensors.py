"""The tensors of a DETR that its detections come from, found by the structure of its graph.

From the query selection on (`graph.detr_structure`) the scores and boxes are known by their shapes, whatever the names
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.detr_structure import DetrStructure
from act_pipeline.graph.op_types import RESHAPING
from act_pipeline.graph.static_graph import static_mode

_RENAMING = ("scale", "assign", "slice", "squeeze2", "stack", *RESHAPING)


@dataclass(frozen=True)
class DetectionTensors:
    """What of a DETR's graph is taught.

    Attributes:
        queries: int64 [N, Q], the places that the top-k selects.
        logits: [N, Q, C], whose sigmoids are the scores.
        boxes: [N, Q, 4] in [0, 1]: centre x, centre y, width, height.
        encoder_logits: [N, places, C], of which the top-k selects by the best class.
        sizes: Q, C and the places (-1: open).
    """

    queries: str
    logits: str
    boxes: str
    encoder_logits: str
    sizes: tuple[int, int, int]

    @property
    def taught(self) -> tuple[str, str, str]:
        """The tensors that are compared."""
        return self.logits, self.boxes, self.encoder_logits


def find_detection_tensors(model: InferenceModel) -> Optional[DetectionTensors]:
    """Return what can be taught of a float model of any exporter; None: it selects no queries as RT-DETR does.

    The post-process may be missing (PaddleDetection's ``exclude_post_process``).
    """
    import paddle

    with static_mode():
        return _Search(paddle.static.Program.parse_from_string(model.model_path.read_bytes())).find()


class _Search(DetrStructure):
    """The search in the ops of an inference program."""

    def find(self) -> Optional[DetectionTensors]:
        for selection in self.query_selections():
            encoder_logits = self._of_best_class(selection.input("X")[0])
            if encoder_logits is not None:
                return self._from(selection.output("Indices")[0], encoder_logits)
        return None

    def _of_best_class(self, name: str) -> Optional[str]:
        """Return the logits [N, places, C] of which ``name`` is the largest of each place."""
        op = self.producer.get(self._source(name))
        if op is None or op.type not in ("reduce_max", "max"):
            return None
        found = op.input("X")[0]
        return found if len(self.shape(found)) == 3 else None

    def _from(self, queries: str, encoder_logits: str) -> Optional[DetectionTensors]:
        count, (_, places, classes) = self.shape(queries)[-1], self.shape(encoder_logits)
        scores = self._scores(queries, (count, classes))
        boxes = [name for name in self._sigmoids((count, 4)) if name != scores]
        logits: Optional[str]
        if scores is not None:
            logits = self._first(self.producer[scores].input("X")[0], (count, classes))
        else:
            logits = self._output(boxes, (count, classes))
        if not boxes or logits is None:
            return None
        # Each layer of the decoder refines the boxes: the last ones are given.
        return DetectionTensors(queries, logits, boxes[-1], encoder_logits, (count, classes, places))

    def _sigmoids(self, sizes: tuple[int, int]) -> list[str]:
        found = [op.output_arg_names[0] for op in self.ops if op.type == "sigmoid"]
        return [name for name in found if self.shape(name)[1:] == sizes]

    def _scores(self, queries: str, sizes: tuple[int, int]) -> Optional[str]:
        """Return the scores that the post-process takes the best of; None: the graph ends before it."""
        op = self.detection_selection(queries)
        name = self._source(op.input("X")[0]) if op is not None else None
        return name if name in self._sigmoids(sizes) else None

    def _output(self, boxes: Sequence[str], sizes: tuple[int, int]) -> Optional[str]:
        """Return the logits where they are an output."""
        outputs = [name for op in self.ops if op.type == "fetch" for name in op.input("X")]
        return next((name for end in outputs if (name := self._first(end, sizes)) and name not in boxes), None)

    def _first(self, end: str, sizes: tuple[int, int]) -> Optional[str]:
        """Return the first tensor [N, *sizes] on the way to ``end``, which may be a slice of all layers' results."""
        way = [name for name in self.upstream(end, _RENAMING) if self.shape(name)[1:] == sizes]
        return way[-1] if way else None

    def _source(self, name: str) -> str:
        return self.origin(name, _RENAMING)  # not through the layers' results, stacked
