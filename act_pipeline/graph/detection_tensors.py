"""The tensors of a DETR that its detections come from, found by the structure of its graph.

An RT-DETR selects its queries by a top-k whose indices a gather reads. From there on the scores and boxes are known by
their shapes, whatever the names are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.op_index import GraphIndex
from act_pipeline.graph.op_types import GATHERING, RESHAPING, TOP_K
from act_pipeline.graph.static_graph import static_mode

# What may stand between a top-k and the gather that reads its indices.
_INDEXING = ("stack", "concat", "unsqueeze2", "cast", "tile", "expand_v2", "reshape2", "elementwise_add", "assign")
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


class _Search(GraphIndex):
    """The search in the ops of an inference program."""

    def __init__(self, program: Any) -> None:
        self.block = program.global_block()
        super().__init__(self.block.ops)

    def find(self) -> Optional[DetectionTensors]:
        for op in self.ops:
            if op.type in TOP_K and self._is_gathered(op.output("Indices")[0]):
                encoder_logits = self._of_best_class(op.input("X")[0])
                if encoder_logits is not None:
                    return self._from(op.output("Indices")[0], encoder_logits)
        return None

    def _is_gathered(self, indices: str) -> bool:
        waiting, seen = deque([indices]), {indices}
        while waiting:
            for reader in self.readers.get(waiting.popleft(), ()):
                if reader.type in GATHERING:
                    return True
                for name in reader.output_arg_names if reader.type in _INDEXING else ():
                    if name not in seen:
                        seen.add(name)
                        waiting.append(name)
        return False

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
            logits = self._source(self.producer[scores].input("X")[0])
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
        for op in reversed(self.ops):
            if op.type in TOP_K and op.output("Indices")[0] != queries:
                name = self._source(op.input("X")[0])
                return name if name in self._sigmoids(sizes) else None
        return None

    def _output(self, boxes: Sequence[str], sizes: tuple[int, int]) -> Optional[str]:
        """Return the logits where they are an output."""
        ends = [self._source(name) for op in self.ops if op.type == "fetch" for name in op.input("X")]
        return next((name for name in ends if name not in boxes and self.shape(name)[1:] == sizes), None)

    def _source(self, name: str) -> str:
        """Return the tensor that ops of :data:`_RENAMING` made ``name`` of."""
        while True:
            op = self.producer.get(name)
            if op is None or op.type not in _RENAMING:
                return name
            sources = op.input("X" if "X" in op.input_names else "Input")
            if len(sources) > 1:  # the layers' results, stacked
                return name
            name = sources[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.block.var(name).shape)
