"""``Distillation.loss: detection``: compare the detections of two models query by query, or place by place.

An RT-DETR selects its queries by a top-k of the encoder's scores. If teacher and student each make their own selection,
their rows belong to different objects: 88% of the rows in RT-DETR-R18 when only its weights are rounded to INT8. In the
training program the student's decoder therefore reads the teacher's indices, so that row ``i`` of both starts from the
same position in the image. The student's selection is trained separately, by comparing the encoder's scores at all
positions.

With the scores (sigmoids) of the teacher ``t`` and of the student ``s``, their divergence ``KL`` and the boxes ``b``,
the loss is, with the weights of DETR's matching cost (Carion et al. 2020: 1, 5 and 2),

    mean(KL(t, s); w) + mean(KL(t_encoder, s_encoder); w) + 5 mean(|b_t - b_s|_1; v) + 2 mean(1 - GIoU(b_t, b_s); v)

The means are weighted means over queries or over the encoder's positions. The weight ``v`` is the teacher's best score.
The weight ``w`` is the larger of both models' best scores plus 0.02, so that positions that are background for both
models count little. The loss is 0 if the outputs of student and teacher are equal. In contrast, PaddleSlim's
``soft_label`` applies a softmax over the last dimension of any tensor.

Detectors that score the places of a grid are compared place by place before NMS (`compress.qat.raw_outputs`). Their
loss is multiplied by 10: it is about 0.05 for YOLOv8n, and SGD at the learning rate of RT-DETR (1e-4) would not lower
it within 100 iterations. At 10 times that rate it falls by a tenth, at 50 times ten iterations ruin the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from act_pipeline.compress.paddleslim.prefixes import LOSS_PREFIX
from act_pipeline.compress.qat.raw_outputs import RawTensors, compared, find_raw_tensors
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.detection_tensors import DetectionTensors, find_detection_tensors
from act_pipeline.graph.unread_ops import remove_unread

Tensors = Union[DetectionTensors, RawTensors]
DETECTION = "detection"
_BOX_WEIGHT, _GIOU_WEIGHT = 5.0, 2.0
_LEAST_WEIGHT = 0.02
_LARGEST_LOGIT = 1e4
# Factor of the loss of a model that scores the places of a grid, no queries.
_PLACES_WEIGHT = 10.0


def require_tensors(config: Config, model: InferenceModel) -> Tensors:
    """Return the tensors of a model that the loss compares, or raise.

    Args:
        config: ``Global.arch`` names the family, if the model does not tell.
        model: the float model, with its ``infer_cfg.yml``.

    Raises:
        UserError: the model neither selects queries as RT-DETR does nor has scores and boxes before NMS.
    """
    found = find_detection_tensors(model) or find_raw_tensors(config, model)
    if found is None:
        raise UserError(
            f"{config.path}: Distillation.loss is detection, which needs a model that selects queries as RT-DETR does "
            "(a top-k whose indices a gather reads, then scores and boxes of as many rows), or has scores and boxes "
            "before NMS (as outputs, or as inputs of multiclass_nms3), and "
            f"{config.global_.model_dir} has none; set it to l2"
        )
    return found


def unaligned_rows(config: Config, model: InferenceModel) -> Optional[str]:
    """Return a warning if a config's loss compares rows of different objects.

    Args:
        config: the compression config.
        model: the float model.

    Returns:
        One line; None if the loss is ``detection``, nothing is distilled, or the model does not select queries.
    """
    settings = config.distillation
    if settings is None or settings.loss == DETECTION or find_detection_tensors(model) is None:
        return None
    return (
        f"Distillation.loss is {settings.loss}, which compares rows of queries that teacher and student select "
        "each for itself, so that most are of other objects; detection compares rows of the same queries"
    )


def align(block: Any, student: Tensors, teacher: Tensors, prefix: str) -> int:
    """Connect the student's gathers to the teacher's indices; call it before the gradients are added.

    The student's own selection is removed, since no op depends on it any more.

    Args:
        block: block of the program into which teacher and student were merged; it is changed.
        student, teacher: the tensors of each model, both with queries.
        prefix: prefix of the teacher's names in ``block``.

    Returns:
        The number of ops that read the indices.
    """
    assert student.queries is not None and teacher.queries is not None
    other = prefix + teacher.queries
    readers = [op for op in block.ops if student.queries in op.input_arg_names]
    for op in readers:
        op._rename_input(student.queries, other)
    remove_unread(block, [student.queries], keep=student.taught)
    return len(readers)


def detection_loss(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Any:
    """Add the loss that the module's docstring defines to the current program.

    Args:
        student, teacher: ``logits`` [N, Q, C], ``boxes`` [N, Q, 4] and, where the model selects queries,
            ``encoder_logits`` [N, positions, C], float32 variables. Row i of both belongs to the same query or place.

    Returns:
        The loss, a scalar variable.
    """
    import paddle
    from paddle.nn import functional

    with paddle.utils.unique_name.guard(LOSS_PREFIX):
        for variable in teacher.values():
            _constant(variable)
        value = functional.sigmoid(teacher["logits"]).max(-1, keepdim=True)
        loss = _divergence(student["logits"], teacher["logits"])
        if "encoder_logits" in student:
            loss += _divergence(student["encoder_logits"], teacher["encoder_logits"])
        distance = paddle.abs(student["boxes"] - teacher["boxes"]).sum(-1, keepdim=True)
        loss += _BOX_WEIGHT * _mean(distance, value)
        return loss + _GIOU_WEIGHT * _mean(1 - _giou(student["boxes"], teacher["boxes"]), value)


def _constant(variable: Any) -> Any:
    """Stop gradients at a variable, and return it."""
    variable.stop_gradient = True
    return variable


def _mean(values: Any, weights: Any) -> Any:
    weights = _constant(weights)
    return (weights * values).sum() / _constant(weights.sum() + 1e-9)


def _divergence(student: Any, teacher: Any) -> Any:
    """Return the weighted mean over rows of the KL divergence of the scores, summed over the classes."""
    import paddle
    from paddle.nn import functional

    # GroundingDINO's logits are -inf beyond its prompt, and -inf times the score 0 would be NaN.
    student, teacher = (paddle.clip(each, -_LARGEST_LOGIT, _LARGEST_LOGIT) for each in (student, teacher))
    scores = _constant(functional.sigmoid(teacher))
    best = paddle.maximum(scores, _constant(functional.sigmoid(student))).max(-1, keepdim=True)
    cross = functional.binary_cross_entropy_with_logits(student, scores, reduction="none")
    entropy = functional.binary_cross_entropy_with_logits(teacher, scores, reduction="none")
    return _mean((cross - _constant(entropy)).sum(-1, keepdim=True), best + _LEAST_WEIGHT)


def _giou(first: Any, second: Any) -> Any:
    """Return the generalized IoU (Rezatofighi et al. 2019) of boxes [N, Q, 4] row by row, [N, Q, 1]."""
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
    """The detection loss in the form that PaddleSlim's ACT takes.

    Attributes:
        nodes: names of the compared tensors in the order of ACT's ``node``: ``[teacher's, student's, ...]``.
    """

    def __init__(self, student: Tensors, teacher: Tensors, prefix: str) -> None:
        """Store the tensors of both models.

        Args:
            student, teacher: the outputs of :func:`require_tensors`.
            prefix: prefix of the teacher's names in the merged program.

        Raises:
            UserError: the models differ in the number of queries or boxes, classes or positions, or only one of them
                selects queries.
        """
        if _in_words(student) != _in_words(teacher):
            raise UserError(
                f"Distillation.loss is detection, and the model of Distillation.teacher_model_dir has "
                f"{_in_words(teacher)}, expected {_in_words(student)} as the model that is compressed; give another "
                "teacher, or none"
            )
        self._student, self._teacher, self._prefix = student, teacher, prefix
        pairs = zip(teacher.taught, student.taught)
        self.nodes = [name for teacher_name, name in pairs for name in (prefix + teacher_name, name)]

    @classmethod
    def of(cls, config: Config, model: InferenceModel, prefix: str) -> Optional[DetectionDistillation]:
        """Return the detection loss of a config; None if the config names another loss.

        Args:
            config: section ``Distillation`` has the loss and the teacher.
            model: the float model, which is the teacher if the config names no other.
            prefix: prefix of the teacher's names in the merged program.

        Raises:
            UserError: see :func:`require_tensors`; or the models differ in size.
        """
        settings = config.distillation
        if settings is None or settings.loss != DETECTION:
            return None
        student = teacher = require_tensors(config, model)
        other = settings.teacher()
        if other is not None:
            teacher = require_tensors(config, other)
        return cls(student, teacher, prefix)

    @property
    def teacher_queries(self) -> Optional[str]:
        """The name of the teacher's ``queries`` in the merged program; None: it selects none."""
        return None if self._teacher.queries is None else self._prefix + self._teacher.queries

    def build(self, pairs: Sequence[str], loss: str, alpha: float) -> tuple[Any, dict[str, Any]]:
        """Add the loss to the merged program; replaces PaddleSlim's ``_parse_distill_loss``.

        Args:
            pairs: :attr:`nodes`.
            loss: unused; part of the replaced function's signature.
            alpha: weight of the loss.

        Returns:
            The loss, a scalar variable, and ``{"detection": loss}`` for the log.
        """
        import paddle

        block = paddle.static.default_main_program().global_block()
        if self._student.queries is not None:
            align(block, self._student, self._teacher, self._prefix)
        for name in pairs[0::2]:
            _constant(block.var(name))
        teacher = _operands(block, self._teacher, self._prefix, self._student)
        weight = _PLACES_WEIGHT if _scores_places(self._student) else 1.0
        total = alpha * weight * detection_loss(_operands(block, self._student), teacher)
        return total, {DETECTION: total}


def _operands(block: Any, tensors: Tensors, prefix: str = "", student: Optional[Tensors] = None) -> dict[str, Any]:
    """Return the operands of :func:`detection_loss` from one side of the merged program.

    Args:
        block: the program's block.
        tensors: the tensors of a model.
        prefix: prefix of its names.
        student: the student's tensors, if ``tensors`` are the teacher's; both models read the same image.
    """
    if isinstance(tensors, DetectionTensors):
        names = {"logits": tensors.logits, "boxes": tensors.boxes, "encoder_logits": tensors.encoder_logits}
        return {key: block.var(prefix + name) for key, name in names.items()}
    own = student if isinstance(student, RawTensors) else tensors
    found = {name: block.var(prefix + name) for name in tensors.taught}
    return compared(found, tensors.parts, block.var(own.image), "teacher" if prefix else "student")


def _scores_places(tensors: Tensors) -> bool:
    # A DETR gives logits of queries.
    return isinstance(tensors, RawTensors) and not tensors.parts.logits


def _in_words(tensors: Tensors) -> str:
    if isinstance(tensors, DetectionTensors):
        return "{} queries, {} classes and {} places".format(*tensors.sizes)
    return "{} boxes and {} classes before NMS".format(*tensors.sizes)
