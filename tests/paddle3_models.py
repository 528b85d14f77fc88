"""Writes models in Paddle 3's own format, for the tests; runs in the Python that has Paddle 3.

python paddle3_models.py yolo|detr FOLDER
python paddle3_models.py translate FOLDER_OF_PADDLE_2 FOLDER
"""

from __future__ import annotations

import os
import sys

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

SIZE, CLASSES, QUERIES, HIDDEN = 64, 3, 20, 32


class ConvBN(nn.Layer):
    def __init__(self, channels: int, filters: int, size: int = 3, stride: int = 1, act: str = "relu") -> None:
        super().__init__()
        self.conv = nn.Conv2D(channels, filters, size, stride, size // 2, bias_attr=False)
        self.bn = nn.BatchNorm2D(filters)
        self.act = getattr(F, act)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.act(self.bn(self.conv(x)))


class Backbone(nn.Layer):
    """Maps of stride 8 and 16, joined by an interpolation with a scale factor."""

    def __init__(self, act: str = "relu") -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBN(3, 16, stride=2, act=act), ConvBN(16, 16, act=act), nn.MaxPool2D(3, 2, 1))
        self.stage1 = ConvBN(16, HIDDEN, stride=2, act=act)
        self.stage2 = ConvBN(HIDDEN, HIDDEN, stride=2, act=act)
        self.fuse = ConvBN(2 * HIDDEN, HIDDEN, 1, act=act)

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        fine = self.stage1(self.stem(x))
        coarse = self.stage2(fine)
        fused = self.fuse(paddle.concat([F.interpolate(coarse, scale_factor=2.0), fine], 1))
        return fused, coarse


class Yolo(nn.Layer):
    """An anchor-free head: one output [N, 4 + classes, anchors], boxes (cx, cy, w, h) in pixels and scores."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone("silu")
        self.heads = nn.LayerList([nn.Conv2D(HIDDEN, 4 + CLASSES, 1) for _ in range(2)])
        for name, stride in (("fine", 8), ("coarse", 16)):
            edges = np.arange(SIZE // stride, dtype="float32") * stride + stride / 2
            grid = np.stack(np.meshgrid(edges, edges), 0).reshape(1, 2, -1)
            self.register_buffer(name, paddle.to_tensor(grid))

    def forward(self, image: paddle.Tensor) -> paddle.Tensor:
        rows = []
        for head, map_, grid in zip(self.heads, self.backbone(image), (self.fine, self.coarse)):
            raw = head(map_).flatten(2)
            centers, sizes, scores = raw.split([2, 2, CLASSES], 1)
            rows.append(paddle.concat([centers * 4 + grid, F.softplus(sizes) * 16, F.sigmoid(scores)], 1))
        return paddle.concat(rows, 2)


class Detr(nn.Layer):
    """Queries chosen by a top-k, one decoder layer, and RT-DETR's post-process: ``bbox`` and ``bbox_num``."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.score, self.box = nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, 4)
        self.attention = nn.MultiHeadAttention(HIDDEN, 4)
        self.norm = nn.LayerNorm(HIDDEN)
        self.ffn = nn.Sequential(nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN))

    def forward(self, inputs: dict[str, paddle.Tensor]) -> tuple[paddle.Tensor, paddle.Tensor]:
        fused, _ = self.backbone(inputs["image"])
        memory = fused.flatten(2).transpose([0, 2, 1])
        _, index = paddle.topk(self.score(memory).max(-1), QUERIES, axis=1)
        batch = paddle.arange(end=memory.shape[0]).astype(index.dtype).unsqueeze(-1).tile([1, QUERIES])
        queries = paddle.gather_nd(memory, paddle.stack([batch, index], -1))
        queries = self.norm(queries + self.attention(queries, memory, memory))
        queries = queries + self.ffn(queries)
        boxes, scores = F.sigmoid(self.box(queries)), F.sigmoid(self.score(queries))
        center, size = boxes.split(2, -1)
        boxes = paddle.concat([center - size / 2, center + size / 2], -1)
        original = paddle.floor(inputs["im_shape"] / inputs["scale_factor"] + 0.5)
        height, width = original.split(2, -1)
        boxes = boxes * paddle.concat([width, height, width, height], -1).unsqueeze(1)
        scores, index = paddle.topk(scores.flatten(1), QUERIES, axis=-1)
        labels = index % CLASSES
        batch = paddle.arange(end=scores.shape[0]).astype(index.dtype).unsqueeze(-1).tile([1, QUERIES])
        boxes = paddle.gather_nd(boxes, paddle.stack([batch, index // CLASSES], -1))
        bbox = paddle.concat([labels.unsqueeze(-1).astype("float32"), scores.unsqueeze(-1), boxes], -1)
        bbox_num = paddle.to_tensor(QUERIES, dtype="int32").tile([bbox.shape[0]])
        return bbox.reshape([-1, 6]), bbox_num


def save(kind: str, folder: str) -> None:
    """Save a model with seeded random weights."""
    paddle.seed(7)
    model = Yolo() if kind == "yolo" else Detr()
    for layer in model.sublayers():
        if isinstance(layer, nn.BatchNorm2D):  # as training leaves them
            layer._mean.set_value(paddle.randn(layer._mean.shape) * 0.1)
            layer._variance.set_value(paddle.rand(layer._variance.shape) + 0.5)
    model.eval()
    spec = paddle.static.InputSpec
    image = spec([None, 3, SIZE, SIZE], "float32", "image")
    inputs = {name: spec([None, 2], "float32", name) for name in ("im_shape", "scale_factor")}
    given = [image] if kind == "yolo" else [{"image": image, **inputs}]
    paddle.jit.save(paddle.jit.to_static(model, input_spec=given, full_graph=True), os.path.join(folder, "inference"))


def translate(source: str, folder: str) -> None:
    """Write a ``.pdmodel`` as a program of Paddle 3."""
    from paddle2onnx import convert

    paddle.enable_static()
    executor = paddle.static.Executor(paddle.CPUPlace())
    with paddle.pir_utils.OldIrGuard():
        program, _, _ = paddle.static.load_inference_model(os.path.join(source, "model"), executor)
    translated = paddle.pir.translate_to_pir(program.desc)
    convert.load_parameter(translated)
    convert.save_program(translated, os.path.join(folder, "inference"))


if __name__ == "__main__":
    os.makedirs(sys.argv[-1], exist_ok=True)
    if sys.argv[1] == "translate":
        translate(*sys.argv[2:])
    else:
        save(*sys.argv[1:])
