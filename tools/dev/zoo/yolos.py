"""YOLOv5n, YOLOv6n, YOLOv7-tiny and YOLO11n, written from their descriptions: layers, widths and heads, as exported.

Sources: YOLOv5's model diagram; Li et al. 2022 (YOLOv6, after its RepVGG blocks became single convolutions); Wang et
al. 2022 (YOLOv7, ELAN); Khanam and Hussain 2024 (YOLO11: C3k2, C2PSA).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from tools.dev.zoo.network import Architecture, Network

CLASSES = 80
_STRIDES = (8, 16, 32)
_ANCHORS = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))
_BINS = 16


def yolov5n(net: Network) -> tuple[str, list[int]]:
    """Add YOLOv5n: C3 blocks, SPPF, anchors; return the output [N, A, 5 + C] and its shape."""
    x = net.conv(net.conv("images", 16, 6, 2, pad=2), 32, 3, 2)
    x = net.conv(_c3(net, x, 32, 1), 64, 3, 2)
    third = _c3(net, x, 64, 2)
    fourth = _c3(net, net.conv(third, 128, 3, 2), 128, 3)
    fifth = _sppf(net, _c3(net, net.conv(fourth, 256, 3, 2), 256, 1), 256)
    top = net.conv(fifth, 128)
    x = _c3(net, net.concat(net.double(top), fourth), 128, 1, shortcut=False)
    middle = net.conv(x, 64)
    small = _c3(net, net.concat(net.double(middle), third), 64, 1, shortcut=False)
    medium = _c3(net, net.concat(net.conv(small, 64, 3, 2), middle), 128, 1, shortcut=False)
    large = _c3(net, net.concat(net.conv(medium, 128, 3, 2), top), 256, 1, shortcut=False)
    return _anchor_head(net, (small, medium, large))


def yolov7_tiny(net: Network) -> tuple[str, list[int]]:
    """Add YOLOv7-tiny: ELAN blocks, leaky ReLU, anchors; return the output [N, A, 5 + C] and its shape."""
    conv = partial(net.conv, act="LeakyRelu")
    x = conv(conv("images", 32, 3, 2), 64, 3, 2)
    x = _elan(net, x, 32, 64)
    third = _elan(net, net.pool(x, 2, 2), 64, 128)
    fourth = _elan(net, net.pool(third, 2, 2), 128, 256)
    x = _elan(net, net.pool(fourth, 2, 2), 256, 512)
    side, x = conv(x, 256), conv(x, 256)
    x = net.concat(net.pool(x, 13), net.pool(x, 9), net.pool(x, 5), x)
    top = conv(net.concat(conv(x, 256), side), 256)
    middle = _elan(net, net.concat(conv(fourth, 128), net.double(conv(top, 128))), 64, 128)
    small = _elan(net, net.concat(conv(third, 64), net.double(conv(middle, 64))), 32, 64)
    medium = _elan(net, net.concat(conv(small, 128, 3, 2), middle), 64, 128)
    large = _elan(net, net.concat(conv(medium, 256, 3, 2), top), 128, 256)
    return _anchor_head(net, (conv(small, 128, 3), conv(medium, 256, 3), conv(large, 512, 3)), slices=True)


def yolov6n(net: Network) -> tuple[str, list[int]]:
    """Add YOLOv6n: plain 3 x 3 convolutions, distances without anchors; return the output [N, A, 5 + C], its shape."""
    conv = partial(net.conv, act="Relu")
    x = conv("images", 16, 3, 2)
    features = []
    for channels, count in ((32, 2), (64, 4), (128, 6), (256, 2)):
        x = conv(x, channels, 3, 2)
        for _ in range(count):
            x = conv(x, channels, 3)
        features.append(x)
    _, third, fourth, fifth = features
    fifth = _sppf(net, fifth, 256, "Relu")

    def repeated(x: str, channels: int) -> str:
        for _ in range(4):
            x = conv(x, channels, 3)
        return x

    top = conv(fifth, 64)
    x = net.concat(net.conv(top, 64, 2, 2, act=None, up=True), fourth)
    middle = conv(repeated(x, 64), 32)
    small = repeated(net.concat(net.conv(middle, 32, 2, 2, act=None, up=True), third), 32)
    medium = repeated(net.concat(conv(small, 32, 3, 2), middle), 64)
    large = repeated(net.concat(conv(medium, 64, 3, 2), top), 128)
    scores, distances = [], []
    for x in (small, medium, large):
        stem = net.conv(x, net.shapes[x][0])
        channels, height, width = net.shapes[stem]
        each = net.conv(net.conv(stem, channels, 3), CLASSES, act=None, spread=1.5, centre=-4.0, objects=slice(None))
        scores.append(net.add("Reshape", [net.add("Sigmoid", [each]), np.array([1, CLASSES, height * width])]))
        sides = net.conv(net.conv(stem, channels, 3), 4, act=None, spread=0.6, centre=5.0)
        distances.append(net.add("Reshape", [sides, np.array([1, 4, height * width])]))
    rows = [net.add("Transpose", [net.add("Concat", each, axis=-1)], perm=[0, 2, 1]) for each in (distances, scores)]
    centres, strides = _places(net)
    boxes = net.add("Mul", [_boxes(net, rows[0], centres[None], 2), strides[None]])
    count = len(strides)
    objectness = np.ones((1, count, 1), np.float32)
    return net.add("Concat", [boxes, objectness, rows[1]], axis=2), [1, count, 5 + CLASSES]


def yolo11n(net: Network) -> tuple[str, list[int]]:
    """Add YOLO11n: C3k2, attention, distributions of distances; return the output [N, 4 + C, A] and its shape."""
    x = net.conv(net.conv("images", 16, 3, 2), 32, 3, 2)
    x = _c3k2(net, x, 64, False, 0.25)
    third = _c3k2(net, net.conv(x, 64, 3, 2), 128, False, 0.25)
    fourth = _c3k2(net, net.conv(third, 128, 3, 2), 128, True)
    fifth = _c3k2(net, net.conv(fourth, 256, 3, 2), 256, True)
    fifth = _c2psa(net, _sppf(net, fifth, 256), 256)
    middle = _c3k2(net, net.concat(net.double(fifth), fourth), 128, False)
    small = _c3k2(net, net.concat(net.double(middle), third), 64, False)
    medium = _c3k2(net, net.concat(net.conv(small, 64, 3, 2), middle), 128, False)
    large = _c3k2(net, net.concat(net.conv(medium, 128, 3, 2), fifth), 256, True)
    levels = []
    for x in (small, medium, large):
        sides = net.conv(net.conv(net.conv(x, 64, 3), 64, 3), 4 * _BINS, act=None, spread=1.5, centre=0.0)
        y = x
        for _ in range(2):
            y = net.conv(net.conv(y, net.shapes[y][0], 3, groups=net.shapes[y][0]), CLASSES)
        scores = net.conv(y, CLASSES, act=None, spread=1.5, centre=-4.0, objects=slice(None))
        _, height, width = net.shapes[x]
        both = net.concat(sides, scores)
        levels.append(net.add("Reshape", [both, np.array([1, 4 * _BINS + CLASSES, height * width])]))
    sides, scores = net.add("Split", [net.add("Concat", levels, axis=2), np.array([4 * _BINS, CLASSES])], 2, axis=1)
    centres, strides = _places(net)
    count = len(strides)
    bins = net.add("Transpose", [net.add("Reshape", [sides, np.array([1, 4, _BINS, count])])], perm=[0, 2, 1, 3])
    row = np.arange(_BINS, dtype=np.float32).reshape(1, _BINS, 1, 1)
    means = net.add("Conv", [net.add("Softmax", [bins], axis=1), row], kernel_shape=[1, 1])
    distances = net.add("Reshape", [means, np.array([1, 4, count])])
    boxes = net.add("Mul", [_boxes(net, distances, centres.T[None], 1), strides.T[None]])
    return net.add("Concat", [boxes, net.add("Sigmoid", [scores])], axis=1), [1, 4 + CLASSES, count]


YOLOS: dict[str, tuple[Architecture, bool]] = {
    "yolov5n": (yolov5n, True),
    "yolov6n": (yolov6n, True),
    "yolov7-tiny": (yolov7_tiny, True),
    "yolo11n": (yolo11n, False),
}


def _bottleneck(
    net: Network, x: str, channels: int, kernels: tuple[int, int], inner: int, shortcut: bool = True
) -> str:
    y = net.conv(net.conv(x, inner, kernels[0]), channels, kernels[1])
    return net.sum(x, y) if shortcut else y


def _c3(net: Network, x: str, channels: int, count: int, shortcut: bool = True, first: int = 1) -> str:
    """Add a C3: two branches of half the channels, one with bottlenecks whose first kernel is ``first``."""
    half = channels // 2
    branch, side = net.conv(x, half), net.conv(x, half)
    for _ in range(count):
        branch = _bottleneck(net, branch, half, (first, 3), half, shortcut)
    return net.conv(net.concat(branch, side), channels)


def _sppf(net: Network, x: str, channels: int, act: str = "Silu") -> str:
    """Add a spatial pyramid of three pools of 5, one after the other."""
    parts = [net.conv(x, channels // 2, act=act)]
    for _ in range(3):
        parts.append(net.pool(parts[-1], 5))
    return net.conv(net.concat(*parts), channels, act=act)


def _elan(net: Network, x: str, inner: int, channels: int) -> str:
    """Add the small ELAN: two 1 x 1 convolutions, two 3 x 3 after the second, all four joined."""
    conv = partial(net.conv, act="LeakyRelu")
    first, second = conv(x, inner), conv(x, inner)
    third = conv(second, inner, 3)
    return conv(net.concat(conv(third, inner, 3), third, second, first), channels)


def _c3k2(net: Network, x: str, channels: int, nested: bool, expansion: float = 0.5) -> str:
    """Add a C3k2: a split after the first convolution, and one bottleneck, or one C3 if ``nested``."""
    inner = int(channels * expansion)
    first, second = net.halves(net.conv(x, 2 * inner))
    third = _c3(net, second, inner, 2, first=3) if nested else _bottleneck(net, second, inner, (3, 3), inner // 2)
    return net.conv(net.concat(first, second, third), channels)


def _c2psa(net: Network, x: str, channels: int) -> str:
    """Add attention over places to half of the channels, with a depthwise convolution as its position encoding."""
    side, y = net.halves(net.conv(x, channels))
    depth, height, width = net.shapes[y]
    heads, places = depth // 64, height * width
    qkv = net.conv(y, 2 * depth, act=None)
    parts = net.add("Reshape", [qkv, np.array([net.batch, heads, 128, places])])
    query, key, value = net.add("Split", [parts, np.array([32, 32, 64])], 3, axis=2)
    products = net.add("MatMul", [net.add("Transpose", [query], perm=[0, 1, 3, 2]), key])
    weights = net.add("Softmax", [net.add("Mul", [products, np.float32(32**-0.5)])], axis=-1)
    mixed = net.add("MatMul", [value, net.add("Transpose", [weights], perm=[0, 1, 3, 2])])
    planes = np.array([net.batch, depth, height, width])
    mixed, value = (net.add("Reshape", [each, planes]) for each in (mixed, value))
    net.shapes[mixed] = net.shapes[value] = net.shapes[y]
    encoded = net.conv(value, depth, 3, act=None, groups=depth)
    y = net.sum(y, net.conv(net.sum(mixed, encoded), depth, act=None))
    y = net.sum(y, net.conv(net.conv(y, 2 * depth), depth, act=None))
    return net.conv(net.concat(side, y), channels)


def _anchor_head(net: Network, features: Sequence[str], slices: bool = False) -> tuple[str, list[int]]:
    """Add the head of three anchors a place; ``slices``: it takes the parts apart by Slice, else by Split."""
    levels, total, width = [], 0, 5 + CLASSES
    spread = np.tile(np.concatenate([np.full(4, 1.0), [2.0], np.full(CLASSES, 1.5)]), 3)
    centre = np.tile(np.concatenate([np.zeros(4), [-4.0], np.full(CLASSES, -2.5)]), 3)
    for x, stride, anchors in zip(features, _STRIDES, _ANCHORS):
        raw = net.conv(x, 3 * width, act=None, spread=spread, centre=centre, objects=slice(4, None, width))
        _, rows, columns = net.shapes[x]
        placed = net.add("Reshape", [raw, np.array([1, 3, width, rows, columns])])
        scores = net.add("Sigmoid", [net.add("Transpose", [placed], perm=[0, 1, 3, 4, 2])])
        if slices:
            bounds = [(0, 2), (2, 4), (4, 2**31 - 1)]
            xy, wh, rest = (
                net.add("Slice", [scores, np.array([start]), np.array([end]), np.array([4]), np.array([1])])
                for start, end in bounds
            )
        else:
            xy, wh, rest = net.add("Split", [scores, np.array([2, 2, width - 4])], 3, axis=4)
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1)[None, None].astype(np.float32) - 0.5
        xy = net.add("Mul", [net.add("Add", [net.add("Mul", [xy, np.float32(2)]), grid]), np.float32(stride)])
        sizes = np.array(anchors, np.float32).reshape(1, 3, 1, 1, 2)
        wh = net.add("Mul", [net.add("Pow", [net.add("Mul", [wh, np.float32(2)]), np.float32(2)]), sizes])
        joined = net.add("Concat", [xy, wh, rest], axis=4)
        levels.append(net.add("Reshape", [joined, np.array([1, 3 * rows * columns, width])]))
        total += 3 * rows * columns
    return net.add("Concat", levels, axis=1), [1, total, width]


def _places(net: Network) -> tuple[np.ndarray, np.ndarray]:
    """Return the centres [A, 2] of all places in strides, and the strides [A, 1], float32."""
    centres, strides = [], []
    for stride in _STRIDES:
        edge = np.arange(net.size // stride, dtype=np.float32) + 0.5
        centres.append(np.stack(np.meshgrid(edge, edge), -1).reshape(-1, 2))
        strides.append(np.full((edge.size**2, 1), stride, np.float32))
    return np.concatenate(centres), np.concatenate(strides)


def _boxes(net: Network, distances: str, centres: np.ndarray, axis: int) -> str:
    """Add what makes centre and size of distances to four sides, along ``axis``."""
    near, far = net.add("Split", [distances, np.array([2, 2])], 2, axis=axis)
    near, far = net.add("Sub", [centres, near]), net.add("Add", [centres, far])
    middle = net.add("Div", [net.add("Add", [near, far]), np.float32(2)])
    return str(net.add("Concat", [middle, net.add("Sub", [far, near])], axis=axis))
