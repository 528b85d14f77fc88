"""NMS as ONNX nodes: ``NonMaxSuppression`` with the semantics of ``multiclass_nms3``, or TensorRT's plugin."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from act_pipeline.families.interface import PostProcess
from act_pipeline.families.yolo import has_objectness
from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.nms_cut import Suppression

# The domain that exporters of other detectors give the plugin; TensorRT's parser looks it up by the op type alone.
PLUGIN_DOMAIN = "TRT"
_PLUGIN = "EfficientNMS_TRT"
_PLUGIN_CANDIDATES = 5000  # it keeps the pairs of box and class with the highest scores of an image, for its NMS
_LAST = np.iinfo(np.int64).max


class Output(NamedTuple):
    """An output of the ONNX graph: its name, the tensor that becomes it, its NumPy type and its sizes."""

    name: str
    value: str
    dtype: Any
    sizes: list[Any]


def boxes_and_scores(build: GraphBuilder, names: list[str], of: Suppression) -> tuple[str, str]:
    """Add the nodes that turn a model's outputs into boxes [N, A, 4] (x1, y1, x2, y2) and scores [N, C, A].

    Args:
        build: the graph of the whole model.
        names: Paddle names of the outputs.
        of: the family of the model.

    Returns:
        ONNX names of boxes and scores.
    """
    if len(names) == 2:
        return build.get(names[0]), build.get(names[1])
    rows, shape = build.get(names[0]), build.shapes[names[0]]
    boxes_last = of.family == "ppyoloe" or has_objectness(shape, of.post.num_classes)
    if not boxes_last:
        rows = build.node("Transpose", [rows], perm=[0, 2, 1])
    boxes = _columns(build, rows, 0, 4)
    if of.family == "ppyoloe":
        scores = _columns(build, rows, 4, _LAST)
    else:
        centre, half = _columns(build, boxes, 0, 2), _half(build, _columns(build, boxes, 2, 4))
        corners = [build.node(kind, [centre, half]) for kind in ("Sub", "Add")]
        boxes = build.node("Concat", corners, "boxes", axis=2)
        scores = _columns(build, rows, 5 if boxes_last else 4, _LAST)
        if boxes_last:
            scores = build.node("Mul", [scores, _columns(build, rows, 4, 5)])
    return boxes, build.node("Transpose", [scores], "scores", perm=[0, 2, 1])


def onnx_nms(build: GraphBuilder, boxes: str, scores: str, classes: int, post: PostProcess, batch: Any) -> list[Output]:
    """Add ``NonMaxSuppression`` and what it lacks of ``multiclass_nms3``.

    Args:
        build: the graph.
        boxes, scores: ONNX names of [N, A, 4] and [N, C, A], float32.
        classes: number of classes C.
        post: thresholds and counts.
        batch: the batch size, or the name of its axis.

    Returns:
        ``bbox [K, 6]`` float32 (class, score, x1, y1, x2, y2), image 0 first, in descending order of the scores, and
        ``bbox_num [N]`` int32.
    """
    boxes, scores = build.node("Identity", [boxes], "boxes"), build.node("Identity", [scores], "scores")
    candidates, limit = _candidates(build, scores, classes, post)
    overlapping = boxes
    if not post.normalized:  # boxes contain their last row and column
        overlapping = build.node("Add", [boxes, build.initializer(np.array([0, 0, 1, 1], np.float32))])
    # Rows of image, class and box. Its default order of coordinates is y, x: the same for the overlaps.
    chosen = build.node(
        "NonMaxSuppression",
        [
            overlapping, candidates, limit, build.initializer(np.array([post.nms_threshold], np.float32)),
            build.initializer(np.array([post.score_threshold], np.float32)),
        ],
        "selected",
    )  # fmt: skip
    image, label, place = (_column(build, chosen, index) for index in range(3))
    by_class = build.node("GatherND", [scores, chosen], "selected.scores")
    at = build.node("Concat", [build.node("Unsqueeze", [index, build.ints(1)]) for index in (image, place)], axis=1)
    corners = build.node("GatherND", [boxes, at], "selected.boxes")
    order = _order(build, image, by_class)
    image = build.node("Gather", [image, order])
    columns = [build.node("Unsqueeze", [value, build.ints(1)]) for value in (build.cast(label, np.float32), by_class)]
    rows = build.node("Gather", [build.node("Concat", [*columns, corners], axis=1), order])
    # [K, N]: whether a row is of an image.
    shape = build.node("Shape", [boxes])
    images = build.node("Squeeze", [_span(build, shape, 0, 1)])
    numbers = build.node("Range", [_scalar(build, 0), images, _scalar(build, 1)])
    own = build.node("Equal", [build.node("Unsqueeze", [image, build.ints(1)]), numbers])
    counts = build.reduce("ReduceSum", build.cast(own, np.int64), [0], False)
    if post.keep_top_k > -1:
        rows = build.node("Gather", [rows, _best_of_each_image(build, own, post.keep_top_k)])
        counts = build.node("Min", [counts, build.initializer(np.array([post.keep_top_k], np.int64))])
    return [
        Output("bbox", rows, np.float32, ["K", 6]),
        Output("bbox_num", build.cast(counts, np.int32), np.int32, [batch]),
    ]


def tensorrt_nms(
    build: GraphBuilder, boxes: str, scores: str, pairs: int, post: PostProcess, batch: Any
) -> list[Output]:
    """Add TensorRT's plugin ``EfficientNMS_TRT`` (version 1).

    It has no ``nms_top_k`` and no ``normalized``: it considers its own number of candidates, of normalized boxes. It
    refuses a negative threshold of scores, which keeps as much as 0, and a threshold of IoU of 0. With a threshold of
    scores below 0.007 it may count places without a detection, with the score -32768, among the detections.

    Args:
        build: the graph.
        boxes, scores: ONNX names of [N, A, 4] and [N, C, A], float32.
        pairs: number of pairs of box and class of an image, A * C.
        post: thresholds and counts.
        batch: the batch size, or the name of its axis.

    Returns:
        ``num_dets [N, 1]`` int32, ``det_boxes [N, K, 4]`` float32, ``det_scores [N, K]`` float32, ``det_classes
        [N, K]`` int32, where K is ``keep_top_k``, or the most that the plugin can find.
    """
    most = min(pairs, _PLUGIN_CANDIDATES)
    if post.keep_top_k > -1:
        most = min(most, post.keep_top_k)
    by_box = build.node("Transpose", [scores], perm=[0, 2, 1])
    made = build.node(
        _PLUGIN,
        [boxes, by_box],
        outputs=4,
        domain=PLUGIN_DOMAIN,
        plugin_version="1",
        score_threshold=max(0.0, float(post.score_threshold)),
        iou_threshold=max(float(np.finfo(np.float32).tiny), float(post.nms_threshold)),
        max_output_boxes=most,
        background_class=post.background_label,
        score_activation=0,
        class_agnostic=0,
        box_coding=0,  # x1, y1, x2, y2
    )
    described = [
        ("num_dets", np.int32, [1]), ("det_boxes", np.float32, [most, 4]), ("det_scores", np.float32, [most]),
        ("det_classes", np.int32, [most]),
    ]  # fmt: skip
    return [Output(name, value, dtype, [batch, *sizes]) for value, (name, dtype, sizes) in zip(made, described)]


def _candidates(build: GraphBuilder, scores: str, classes: int, post: PostProcess) -> tuple[str, str]:
    """Return the scores with those that NMS does not consider below its threshold, and the most boxes of a class."""
    none = build.initializer(np.array([post.score_threshold - 1], np.float32))
    if 0 <= post.background_label < classes:
        background = (np.arange(classes) == post.background_label).reshape(1, classes, 1)
        scores = build.node("Where", [build.initializer(background), none, scores])
    shape = build.node("Shape", [scores])
    count = _span(build, shape, 2, 3)
    if post.nms_top_k > -1:
        count = build.node("Min", [count, build.ints(post.nms_top_k)])
        best, places = build.node("TopK", [scores, count], outputs=2, axis=2)
        scores = build.node("ScatterElements", [build.node("Expand", [none, shape]), places, best], axis=2)
    return scores, count


def _order(build: GraphBuilder, image: str, scores: str) -> str:
    """Return the order of rows by image, then by descending score; no two keys are equal, so it is that of any TopK."""
    count = build.node("Shape", [scores])
    by_score = build.node("TopK", [scores, count], outputs=2, axis=0)[1]
    numbers = build.node("Range", [_scalar(build, 0), build.node("Squeeze", [count]), _scalar(build, 1)])
    keys = build.node("Add", [build.node("Mul", [build.node("Gather", [image, by_score]), count]), numbers])
    by_image = build.node("TopK", [keys, count], outputs=2, axis=0, largest=0)[1]
    return build.node("Gather", [by_score, by_image])


def _best_of_each_image(build: GraphBuilder, own: str, most: int) -> str:
    """Return the indices of the first ``most`` rows of each image.

    Args:
        own: ONNX name of [K, N], whether a row is of an image; rows are in descending order of the scores.
        most: number of rows.
    """
    ones = build.cast(own, np.int32)
    ranks = build.node("CumSum", [ones, build.initializer(np.array(0, np.int32))])
    rank = build.reduce("ReduceSum", build.node("Mul", [ranks, ones]), [1], False)
    among = build.node("LessOrEqual", [rank, build.initializer(np.array([most], np.int32))])
    return build.reshape(build.node("NonZero", [among]), -1)


def _columns(build: GraphBuilder, value: str, first: int, last: int) -> str:
    return build.node("Slice", [value, build.ints(first), build.ints(last), build.ints(2)])


def _column(build: GraphBuilder, value: str, index: int) -> str:
    return build.node("Gather", [value, _scalar(build, index)], axis=1)


def _span(build: GraphBuilder, shape: str, first: int, last: int) -> str:
    return build.node("Slice", [shape, build.ints(first), build.ints(last)])


def _half(build: GraphBuilder, value: str) -> str:
    return build.node("Mul", [value, build.initializer(np.array(0.5, np.float32))])


def _scalar(build: GraphBuilder, number: int) -> str:
    return build.initializer(np.array(number, np.int64))
