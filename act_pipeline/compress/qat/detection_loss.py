"""``Distillation.loss: detection``: a DETR is taught the detections of another, query by query.

An RT-DETR selects its queries, by a top-k of the encoder's scores. Teacher and student that select for themselves give
rows that belong to other objects: in RT-DETR-R18, with no more than its weights rounded to INT8, 88% of the rows. So in
the training program the student's decoder reads the teacher's indices, and row ``i`` of both starts from one place in
the image. What the student would have selected is taught apart: the selection follows from the encoder's scores, all of
which are compared.

With the teacher's scores ``t`` and the student's ``s`` (of sigmoids), ``KL`` their divergence, and ``b`` the boxes, the
loss is, with the weights of DETR's matching cost (Carion et al. 2020: 1, 5 and 2),

    mean(KL(t, s); w) + mean(KL(t_encoder, s_encoder); w) + 5 mean(|b_t - b_s|_1; v) + 2 mean(1 - GIoU(b_t, b_s); v)

where the means are over queries (or the encoder's places), weighted: ``v`` is the teacher's best score, as a box is
worth what its score is, and ``w`` the larger of both models' best scores plus 0.02, so that what is nothing to both
counts little. It is 0 where the student gives what the teacher gives. ``soft_label`` is PaddleSlim's: a softmax over
whatever the last dimension holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.detection_tensors import DetectionTensors, find_detection_tensors

DETECTION = "detection"
# Of all variables of the loss: they are no part of the model, and no observer looks at them.
LOSS_PREFIX = "detection_loss/"
_BOX_WEIGHT, _GIOU_WEIGHT = 5.0, 2.0
_LEAST_WEIGHT = 0.02


def require_detection_tensors(model: InferenceModel, where: str) -> DetectionTensors:
    """Return what can be taught of a float model.

    Args:
        model: the model.
        where: the config's key, for the message.

    Raises:
        UserError: it has no such tensors.
    """
    found = find_detection_tensors(model)
    if found is None:
        raise UserError(
            f"{where} is detection, which needs a model that selects queries as RT-DETR does (a top-k whose indices a "
            f"gather reads, then scores and boxes of as many rows), and {model.model_path} has none; set it to l2"
        )
    return found


def unaligned_rows(config: Config, model: InferenceModel) -> Optional[str]:
    """Return in one line that a config's loss compares rows of other objects; None: it does not."""
    settings = config.distillation
    if settings is None or settings.loss == DETECTION or find_detection_tensors(model) is None:
        return None
    return (
        f"Distillation.loss is {settings.loss}, which compares rows of queries that teacher and student select "
        "each for "
        "itself, so that most are of other objects; detection compares rows of the same queries"
    )


def align(block: Any, student: DetectionTensors, teacher: DetectionTensors, prefix: str) -> int:
    """Let the student's gathers read the teacher's indices; call it before the gradients are made.

    The student's own selection is taken out: nothing depends on it any more.

    Args:
        block: of the program that teacher and student were merged into.
        student, teacher: what was found in each.
        prefix: of the teacher's names in ``block``.

    Returns:
        how many ops read the indices.
    """
    other = prefix + teacher.queries
    readers = [op for op in block.ops if student.queries in op.input_arg_names]
    for op in readers:
        op._rename_input(student.queries, other)
    _remove_unread(block, student.queries, keep=student.taught)
    return len(readers)


def _remove_unread(block: Any, name: str, keep: Sequence[str]) -> None:
    """Remove the op that gives a tensor, and what only it reads, as far as the tensors to keep."""
    ahead = deque([name])
    while ahead:
        name = ahead.popleft()
        op = next((op for op in block.ops if name in op.output_arg_names), None)
        if op is None or op.type == "feed" or not set(keep).isdisjoint(op.output_arg_names):
            continue
        if not any(output in other.input_arg_names for other in block.ops for output in op.output_arg_names):
            ahead.extend(op.input_arg_names)
            block._remove_op(block.ops.index(op), sync=False)


def detection_loss(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Any:
    """Return the loss of this module's head, a variable of the current program.

    Args:
        student, teacher: ``logits`` [N, Q, C], ``boxes`` [N, Q, 4] and ``encoder_logits`` [N, places, C], float32
            variables; row i of both is the same query.
    """
    import paddle
    from paddle.nn import functional

    with paddle.utils.unique_name.guard(LOSS_PREFIX):
        for variable in teacher.values():
            _constant(variable)
        value = functional.sigmoid(teacher["logits"]).max(-1, keepdim=True)
        loss = _divergence(student["logits"], teacher["logits"])
        loss += _divergence(student["encoder_logits"], teacher["encoder_logits"])
        distance = paddle.abs(student["boxes"] - teacher["boxes"]).sum(-1, keepdim=True)
        loss += _BOX_WEIGHT * _mean(distance, value)
        return loss + _GIOU_WEIGHT * _mean(1 - _giou(student["boxes"], teacher["boxes"]), value)


def _constant(variable: Any) -> Any:
    """Let no gradient go through what a variable was computed from, and return it."""
    variable.stop_gradient = True
    return variable


def _mean(values: Any, weights: Any) -> Any:
    weights = _constant(weights)
    return (weights * values).sum() / _constant(weights.sum() + 1e-9)


def _divergence(student: Any, teacher: Any) -> Any:
    """Return the mean KL divergence of the scores of rows, the sum of their classes'."""
    import paddle
    from paddle.nn import functional

    scores = _constant(functional.sigmoid(teacher))
    best = paddle.maximum(scores, _constant(functional.sigmoid(student))).max(-1, keepdim=True)
    cross = functional.binary_cross_entropy_with_logits(student, scores, reduction="none")
    entropy = functional.binary_cross_entropy_with_logits(teacher, scores, reduction="none")
    return _mean((cross - _constant(entropy)).sum(-1, keepdim=True), best + _LEAST_WEIGHT)


def _giou(first: Any, second: Any) -> Any:
    """Return the generalized IoU (Rezatofighi et al. 2019) of boxes [N, Q, 4] with those of the same rows, [N, Q,
    1].
    """
    import paddle
    from paddle.nn import functional

    (low, high), (other_low, other_high) = _corners(first), _corners(second)

    def area(sides: Any) -> Any:
        width, height = paddle.split(functional.relu(sides), 2, axis=-1)
        return width * height

    shared = area(paddle.minimum(high, other_high) - paddle.maximum(low, other_low))
    union = area(high - low) + area(other_high - other_low) - shared
    around = area(paddle.maximum(high, other_high) - paddle.minimum(low, other_low))
    return shared / (union + 1e-9) - (around - union) / (around + 1e-9)


def _corners(boxes: Any) -> tuple[Any, Any]:
    import paddle

    centre, size = paddle.split(boxes, 2, axis=-1)
    return centre - size / 2, centre + size / 2


class DetectionDistillation:
    """The loss of a student and its teacher, in the terms of PaddleSlim's ACT.

    Attributes:
        nodes: the pairs of tensors that are compared, ``[teacher's, student's, ...]``, as ACT's ``node`` has them.
    """

    def __init__(self, student: DetectionTensors, teacher: DetectionTensors, prefix: str) -> None:
        """Take what was found in both.

        Args:
            student, teacher: of :func:`require_detection_tensors`.
            prefix: of the teacher's names in the merged program.

        Raises:
            UserError: they have other numbers of queries, classes or places.
        """
        if student.sizes != teacher.sizes:
            found, expected = (
                f"{sizes[0]} queries, {sizes[1]} classes and {sizes[2]} places"
                for sizes in (teacher.sizes, student.sizes)
            )
            raise UserError(
                f"Distillation.loss is detection, and the model of Distillation.teacher_model_dir has {found}, "
                "expected "
                f"{expected} as the model that is compressed; give another teacher, or none"
            )
        self._student, self._teacher, self._prefix = student, teacher, prefix
        pairs = zip(teacher.taught, student.taught)
        self.nodes = [name for teacher_name, name in pairs for name in (prefix + teacher_name, name)]

    @classmethod
    def of(cls, config: Config, model: InferenceModel, prefix: str) -> Optional[DetectionDistillation]:
        """Return the loss of a config's model and teacher; None: the config names another loss.

        Raises:
            UserError: one of them has no such tensors, or they differ in size.
        """
        settings, where = config.distillation, f"{config.path}: Distillation.loss"
        if settings is None or settings.loss != DETECTION:
            return None
        student = teacher = require_detection_tensors(model, where)
        other = settings.teacher()
        if other is not None:
            teacher = require_detection_tensors(other, where)
        return cls(student, teacher, prefix)

    @property
    def teacher_queries(self) -> str:
        """The teacher's selection, by its name in the merged program."""
        return self._prefix + self._teacher.queries

    def build(self, pairs: Sequence[str], loss: str, alpha: float) -> tuple[Any, dict[str, Any]]:
        """Take the place of ``paddleslim``'s ``_parse_distill_loss``, within the merged program."""
        import paddle

        block = paddle.static.default_main_program().global_block()
        align(block, self._student, self._teacher, self._prefix)
        names = ("logits", "boxes", "encoder_logits")
        teacher, student = (dict(zip(names, map(block.var, pairs[side::2]))) for side in (0, 1))
        total = alpha * detection_loss(student, teacher)
        return total, {DETECTION: total}
