"""A convolutional network with random weights, written as an ONNX graph.

Random weights alone make activations vanish or overflow within a few layers. Here every convolution is followed by a
normalization with the statistics of pictures, as BatchNorm after a training, and both are written as one convolution,
as exporters write them. Activations lie mostly where the activation functions are nearly linear: with a mean of 0,
every layer of a random network would amplify rounding errors by about 1.2 (Yang et al. 2019), which no trained network
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Shape = tuple[int, int, int]
OPSET = 17
_EPSILON = 1e-3


@dataclass
class Network:
    """An ONNX graph under construction; an architecture is a function that adds its layers to one.

    Attributes:
        size: height and width of the input in pixels.
        seed: of the weights.
        statistics: name of a convolution -> mean and variance of its outputs' channels on pictures; None: the graph is
            the one that measures them, which has them as additional outputs.
        shift: added to the bias of the channels that decide whether there is an object.
    """

    size: int
    seed: int = 0
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] | None = None
    shift: float = 0.0
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shapes["images"] = (3, self.size, self.size)

    @property
    def batch(self) -> int:
        """Batch in the sizes of a Reshape: 1 as in a file of fixed batch; 0, any, while statistics are measured."""
        return 0 if self.statistics is None else 1

    def add(self, op: str, inputs: Sequence[Any], outputs: int = 1, **attributes: Any) -> Any:
        """Add a node.

        Args:
            op: the ONNX op type.
            inputs: names of tensors, or arrays, which become constants.
            outputs: number of outputs.
            **attributes: of the node.

        Returns:
            The name of the output; a list of names for several.
        """
        from onnx import helper

        place = len(self.nodes)
        names = [each if isinstance(each, str) else self._constant(each) for each in inputs]
        made = [f"{op.lower()}_{place}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, name=f"{op}_{place}", **attributes))
        return made if outputs > 1 else made[0]

    def conv(
        self, x: str, channels: int, kernel: int = 1, stride: int = 1, act: str | None = "Silu", **more: Any
    ) -> str:
        """Add a convolution with its normalization and its activation.

        Args:
            x: name of the input [N, C, H, W].
            channels: number of output channels.
            kernel, stride: of the convolution, the padding keeps the size.
            act: ``Silu``, ``Relu``, ``LeakyRelu`` (0.1) or None.
            **more: ``groups``; ``pad``; ``spread`` and ``centre``, the standard deviation and mean of the outputs, a
                number or one a channel; ``objects``: the slice of channels that ``shift`` is added to; ``up``:
                a transposed convolution of twice the size.
        """
        depth, height, width = self.shapes[x]
        groups, pad, up = more.get("groups", 1), more.get("pad", kernel // 2), bool(more.get("up"))
        name = f"conv{len(self.shapes)}"
        rng = np.random.default_rng([self.seed, len(self.shapes)])
        shape = (depth, channels, kernel, kernel) if up else (channels, depth // groups, kernel, kernel)
        weight = rng.normal(0, 1 / np.sqrt(depth // groups * kernel**2), shape).astype(np.float32)
        scale = np.broadcast_to(more.get("spread", rng.uniform(0.3, 0.6, channels)), channels).astype(np.float32)
        centre = np.broadcast_to(more.get("centre", rng.normal(0.8, 0.3, channels)), channels).astype(np.float32).copy()
        centre[more.get("objects", slice(0, 0))] += self.shift
        attributes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "group": groups}
        if not up:
            attributes["pads"] = [pad] * 4
        op = "ConvTranspose" if up else "Conv"
        if self.statistics is None:
            y = self._measured(name, self.add(op, [x, weight], **attributes), scale, centre)
        else:
            mean, variance = self.statistics[name]
            scale = scale / np.sqrt(variance + _EPSILON)
            factor = scale[None, :, None, None] if up else scale[:, None, None, None]
            y = self.add(op, [x, weight * factor, centre - mean * scale], **attributes)
        y = self._activated(y, act)
        size = (
            (height * 2, width * 2)
            if up
            else tuple((edge + 2 * pad - kernel) // stride + 1 for edge in (height, width))
        )
        self.shapes[y] = (channels, *size)
        return y

    def concat(self, *parts: str) -> str:
        """Add a concatenation of channels."""
        y: str = self.add("Concat", list(parts), axis=1)
        self.shapes[y] = (sum(self.shapes[part][0] for part in parts), *self.shapes[parts[0]][1:])
        return y

    def sum(self, x: str, y: str) -> str:
        """Add an addition of two tensors of one shape."""
        z: str = self.add("Add", [x, y])
        self.shapes[z] = self.shapes[x]
        return z

    def halves(self, x: str) -> tuple[str, str]:
        """Add a split of the channels into two halves."""
        channels, height, width = self.shapes[x]
        first, second = self.add("Split", [x, np.array([channels // 2] * 2)], 2, axis=1)
        self.shapes[first] = self.shapes[second] = (channels // 2, height, width)
        return first, second

    def pool(self, x: str, kernel: int, stride: int = 1) -> str:
        """Add a maximum over windows; with stride 1 it keeps the size."""
        pad = kernel // 2 if stride == 1 else 0
        y: str = self.add("MaxPool", [x], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)
        channels, height, width = self.shapes[x]
        self.shapes[y] = (channels, height // stride, width // stride)
        return y

    def double(self, x: str) -> str:
        """Add a nearest-neighbour enlargement to twice the size."""
        y: str = self.add("Resize", [x, "", np.array([1, 1, 2, 2], np.float32)], mode="nearest",
                          nearest_mode="floor", coordinate_transformation_mode="asymmetric")  # fmt: skip
        channels, height, width = self.shapes[x]
        self.shapes[y] = (channels, height * 2, width * 2)
        return y

    def model(self, output: str, shape: Sequence[Any], classes: int) -> Any:
        """Return the finished ModelProto with ``output`` as its output ``output0`` and class names as metadata.

        Args:
            output: name of the tensor.
            shape: its shape.
            classes: number of classes.
        """
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Identity", [output], ["output0"], name="output"))
        batch = 1 if self.statistics is not None else "n"
        image = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *self.shapes["images"]])
        outputs = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape)]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.measured]
        graph = helper.make_graph(self.nodes, "detector", [image], outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        helper.set_model_props(model, {"names": str({index: f"class_{index}" for index in range(classes)})})
        return model

    def _constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _activated(self, x: str, act: str | None) -> str:
        if act is None:
            return x
        if act == "Silu":
            return str(self.add("Mul", [x, self.add("Sigmoid", [x])]))
        return str(self.add(act, [x], **({"alpha": 0.1} if act == "LeakyRelu" else {})))

    def _measured(self, name: str, x: str, scale: np.ndarray, centre: np.ndarray) -> str:
        """Normalize by the statistics of the batch itself, which become outputs."""
        from onnx import helper

        mean = self.add("ReduceMean", [x], axes=[0, 2, 3])
        difference = self.add("Sub", [x, mean])
        variance = self.add("ReduceMean", [self.add("Mul", [difference, difference])], axes=[0, 2, 3])
        for kind, tensor in (("mean", mean), ("variance", variance)):
            self.nodes.append(helper.make_node("Flatten", [tensor], [f"{name}.{kind}"], axis=0))
            self.measured.append(f"{name}.{kind}")
        deviation = self.add("Sqrt", [self.add("Add", [variance, np.float32(_EPSILON)])])
        normalized = self.add("Div", [difference, deviation])
        scaled = self.add("Mul", [normalized, scale.reshape(1, -1, 1, 1)])
        return str(self.add("Add", [scaled, centre.reshape(1, -1, 1, 1)]))


Architecture = Callable[[Network], tuple[str, list[int]]]


def with_random_weights(
    architecture: Architecture, pictures: np.ndarray, classes: int, objectness: bool, objects: int = 40, seed: int = 0
) -> Any:
    """Return the ModelProto of an architecture with random weights that detect something in pictures.

    Args:
        architecture: adds the layers to a network and returns the output and its shape.
        pictures: float32 [N, 3, S, S], 0 to 1.
        classes: number of classes.
        objectness: whether the output is [N, A, 5 + C], else [N, 4 + C, A].
        objects: average number of rows an image whose score is to be above 0.3, before NMS.
        seed: of the weights.
    """
    size = pictures.shape[2]
    measuring = Network(size, seed)
    # The output has the shape of one picture: only the statistics are of all.
    architecture(measuring)
    names = measuring.measured
    values = _run(_statistics_only(measuring), pictures, names)
    found = {name: value.reshape(-1) for name, value in zip(names, values)}
    layers = [name[: -len(".mean")] for name in names if name.endswith(".mean")]
    statistics = {layer: (found[f"{layer}.mean"], found[f"{layer}.variance"]) for layer in layers}

    def made(shift: float) -> Any:
        network = Network(size, seed, statistics, shift)
        output, shape = architecture(network)
        return network.model(output, shape, classes)

    outputs = np.concatenate([_run(made(0.0), picture[None], ["output0"])[0] for picture in pictures])
    outputs = outputs if objectness else outputs.transpose(0, 2, 1)
    best = outputs[..., -classes:].max(-1).reshape(-1)
    # YOLOv6 has a constant objectness of 1: there the classes decide, as where there is none.
    constant = not objectness or bool((outputs[..., 4] == 1).all())
    first, second = (best, np.ones_like(best)) if constant else (outputs[..., 4].reshape(-1), best)
    return made(_shift(first, second, objects * len(pictures)))


def _statistics_only(network: Network) -> Any:
    """Return the graph up to the statistics: the head's reshapes are made for one picture."""
    from onnx import TensorProto, helper

    shape = ["n", *network.shapes["images"]]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in network.measured]
    written = {name: node for node in network.nodes for name in node.output}
    needed, waiting = set(), list(network.measured)
    while waiting:
        node = written.get(waiting.pop())
        if node is not None and node.name + node.output[0] not in needed:
            needed.add(node.name + node.output[0])
            waiting.extend(node.input)
    nodes = [node for node in network.nodes if node.name + node.output[0] in needed]
    graph = helper.make_graph(nodes, "statistics", [image], outputs, network.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _run(model: Any, pictures: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(list(outputs), {"images": pictures})]


def _shift(first: np.ndarray, second: np.ndarray, count: int, least: float = 0.3) -> float:
    """Return what to add to the logits of ``first``, so that ``count`` products of the two scores exceed ``least``."""
    logits = np.log(np.clip(first, 1e-30, 1 - 1e-7) / (1 - np.clip(first, 1e-30, 1 - 1e-7)))
    low, high = -40.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        above = int((second / (1 + np.exp(-np.clip(logits + middle, -60, 60))) > least).sum())
        low, high = (low, middle) if above > count else (middle, high)
    return low
