"""A tiny Segment Anything that works: white is inside, within the box; and a data set with masks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.core.artifacts import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.graph.static_graph import StaticGraph, static_mode

SIZE = 64
# x1, y1, x2, y2 in pixels of the original image, and the category id.
OBJECTS = (((8, 6, 40, 22), 7), ((50, 20, 86, 44), 3))


def make_pair(folder: Path) -> tuple[InferenceModel, InferenceModel]:
    """Write an encoder, whose embeddings are the brightness, and its decoder, each naming the other one."""
    encoder = _saved(folder / "encoder", _encoder, {"arch": "sam", "mask_decoder": "../decoder"})
    decoder = _saved(folder / "decoder", _decoder, {"arch": "sam_decoder", "image_encoder": "../encoder"})
    return encoder, decoder


def _saved(folder: Path, build: Any, infer_cfg: dict[str, str]) -> InferenceModel:
    import paddle

    folder.mkdir(parents=True)
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope), paddle.utils.unique_name.guard():
            inputs, outputs, values = build(paddle)
            for name, value in values.items():
                scope.var(name).get_tensor().set(value, paddle.CPUPlace())
        executor = paddle.static.Executor(paddle.CPUPlace())
        model = StaticGraph(program, inputs, outputs, scope, executor).save(folder)
    (folder / INFER_CFG_FILENAME).write_text(yaml.safe_dump(infer_cfg), encoding="utf-8")
    return model


def _encoder(paddle: Any) -> tuple[list[str], list[Any], dict[str, np.ndarray]]:
    image = paddle.static.data("image", [-1, 3, SIZE, SIZE])
    weight = paddle.static.create_parameter([4, 3, 2, 2], "float32", name="brightness")
    values = np.full((4, 3, 2, 2), 1 / 12, np.float32) * np.linspace(0.5, 1.5, 4, dtype=np.float32)[:, None, None, None]
    second = paddle.static.create_parameter([4, 4, 1, 1], "float32", name="same")
    embeddings = paddle.nn.functional.relu(paddle.nn.functional.conv2d(image, weight, stride=2))
    embeddings = paddle.nn.functional.conv2d(embeddings, second)
    return ["image"], [embeddings], {"brightness": values, "same": np.eye(4, dtype=np.float32)[:, :, None, None]}


def _decoder(paddle: Any) -> tuple[list[str], list[Any], dict[str, np.ndarray]]:
    side = SIZE // 2
    embeddings = paddle.static.data("image_embeddings", [-1, 4, side, side])
    boxes = paddle.static.data("boxes", [-1, 1, 4])
    weight = paddle.static.create_parameter([1, 4, 1, 1], "float32", name="sum")
    x1, y1, x2, y2 = (paddle.reshape(boxes[:, :, index], [-1, 1, 1, 1]) for index in range(4))
    centres = (paddle.arange(side, dtype="float32") + 0.5) * 2
    columns, rows = paddle.reshape(centres, [1, 1, 1, side]), paddle.reshape(centres, [1, 1, side, 1])
    relu, second = paddle.nn.functional.relu, paddle.static.create_parameter([4, 4, 1, 1], "float32", name="same")
    features = relu(paddle.nn.functional.conv2d(embeddings, second))
    outside = relu(x1 - columns) + relu(columns - x2) + relu(y1 - rows) + relu(rows - y2)
    logits = paddle.nn.functional.conv2d(features, weight) - 0.5 - outside
    scores = 0.9 - (x2 - x1) * 0.001
    masks = paddle.reshape(logits, [-1, 1, 1, side, side])
    return ["image_embeddings", "boxes"], [masks, paddle.reshape(scores, [-1, 1, 1])], {
        "sum": np.full((1, 4, 1, 1), 0.25, np.float32), "same": np.eye(4, dtype=np.float32)[:, :, None, None],
    }  # fmt: skip


def make_data(folder: Path, images: int = 8) -> Path:
    """Write images with a white rectangle of each class, on grey, and return the annotation file."""
    import cv2

    (folder / "images").mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [], "annotations": [], "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}],
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for index in range(images):
        picture = rng.integers(0, 60, (48, 96, 3)).astype(np.uint8)
        for (x1, y1, x2, y2), category in OBJECTS:
            picture[y1:y2, x1:x2] = 200 + index
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": 100 + index, "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                }
            )  # fmt: skip
        cv2.imwrite(str(folder / "images" / f"{index}.png"), picture)
        content["images"].append({"id": 100 + index, "file_name": f"{index}.png", "height": 48, "width": 96})
    path = folder / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def change_annotations(path: Path, **values: Any) -> None:
    """Set entries of every annotation of a file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for entry in content["annotations"]:
        entry.update(values)
        for key, value in values.items():
            if value is None:
                del entry[key]
    path.write_text(json.dumps(content), encoding="utf-8")
