"""Small ONNX graphs of one op each, with awkward attributes: what `test_import_onnx.py` converts and compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

_RNG = np.random.default_rng(5)


@dataclass(frozen=True)
class Feed:
    """An input of the graph: shape with batch 1, type, and limits of its random values."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float = -2.0
    high: float = 2.0

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        if self.dtype == "float32":
            return rng.uniform(self.low, self.high, self.shape).astype(np.float32)
        if self.dtype == "bool":
            return rng.random(self.shape) < 0.5
        return rng.integers(int(self.low), int(self.high) + 1, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class Case:
    """One node: its op, inputs (`Feed`, constant, or None for one left out), attributes and op set."""

    op: str
    inputs: tuple[Any, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 17
    outputs: int = 1
    open_batch: bool = True


def f(*shape: int) -> np.ndarray:
    return _RNG.normal(size=shape).astype(np.float32)


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = Feed((1, 3, 5, 6))
POSITIVE = Feed((1, 3, 5, 6), low=0.1, high=3)
INTS = Feed((1, 7), "int64", -9, 9)
BOOLS = Feed((1, 4, 3), "bool")
TOKENS = Feed((1, 10, 8))
NAN = np.array([np.inf, -np.inf, np.nan], np.float32).reshape(1, 3, 1, 1)


def _unary() -> dict[str, Case]:
    plain = "Exp Erf Sin Cos Abs Floor Ceil Sign Neg Atan Round Relu Sigmoid Tanh HardSwish Softplus Softsign Identity"
    found = {op: Case(op, (X,)) for op in plain.split()}
    found.update({op: Case(op, (POSITIVE,)) for op in ("Log", "Sqrt", "Reciprocal")})
    found["Round halves"] = Case("Round", (Feed((1, 40), "float32", -3, 3),))
    return found


CASES: dict[str, Case] = {
    **_unary(),
    "Not": Case("Not", (BOOLS,)),
    "IsNaN": Case("IsNaN", (X,)),
    "Mish": Case("Mish", (X,), opset=18),
    "Swish": Case("Swish", (X,), opset=24),
    "Swish alpha": Case("Swish", (X,), {"alpha": 1.7}, opset=24),
    "LeakyRelu": Case("LeakyRelu", (X,), {"alpha": 0.2}),
    "Elu": Case("Elu", (X,), {"alpha": 0.7}),
    "Celu": Case("Celu", (X,), {"alpha": 0.7}),
    "Selu": Case("Selu", (X,)),
    "Selu given": Case("Selu", (X,), {"alpha": 1.2, "gamma": 1.5}),
    "ThresholdedRelu": Case("ThresholdedRelu", (X,), {"alpha": 0.5}),
    "HardSigmoid": Case("HardSigmoid", (X,)),
    "HardSigmoid sixth": Case("HardSigmoid", (X,), {"alpha": 1 / 6, "beta": 0.5}),
    "Gelu": Case("Gelu", (X,), opset=20),
    "Gelu tanh": Case("Gelu", (X,), {"approximate": "tanh"}, opset=20),
    "PRelu channels": Case("PRelu", (X, f(3, 1, 1))),
    "PRelu one": Case("PRelu", (X, f(1))),
    "PRelu places": Case("PRelu", (X, f(3, 5, 6))),
    "Clip": Case("Clip", (X, np.float32(-0.5), np.float32(0.7))),
    "Clip max": Case("Clip", (X, None, np.float32(0.7))),
    "Clip integers": Case("Clip", (INTS, np.int64(-2), np.int64(5))),
    "Clip 6": Case("Clip", (X,), {"min": 0.0, "max": 1.0}, opset=9),
    "Add": Case("Add", (X, X)),
    "Add scalar": Case("Add", (X, np.float32(0.3))),
    "Add one": Case("Add", (f(1), X)),
    "Add more dimensions": Case("Add", (Feed((1, 4)), f(1, 1, 1))),
    "Add channels": Case("Add", (X, f(3, 1, 1))),
    "Add infinite": Case("Add", (X, NAN)),
    "Add integers": Case("Add", (INTS, i(3))),
    "Sub": Case("Sub", (X, np.float32(0.3))),
    "Sub from": Case("Sub", (np.float32(1), X)),
    "Sub constant": Case("Sub", (f(1, 3, 5, 6), X)),
    "Mul": Case("Mul", (X, np.float32(0.3))),
    "Mul places": Case("Mul", (X, f(5, 6))),
    "Div": Case("Div", (X, np.float32(0.3))),
    "Div by": Case("Div", (np.float32(2), POSITIVE)),
    "Div values": Case("Div", (X, POSITIVE)),
    "Div integers": Case("Div", (INTS, i(4))),
    "Div negative": Case("Div", (INTS, i(-4))),
    "Pow": Case("Pow", (X, np.float32(2))),
    "Pow half": Case("Pow", (POSITIVE, np.float32(0.5))),
    "Pow integer": Case("Pow", (X, np.int64(3))),
    "Pow base": Case("Pow", (np.float32(10), X)),
    "Pow values": Case("Pow", (POSITIVE, X)),
    "Mod": Case("Mod", (INTS, i(4))),
    "Mod negative": Case("Mod", (INTS, i(-4))),
    "Mod float": Case("Mod", (X, np.float32(0.7)), {"fmod": 1}),
    "Sum": Case("Sum", (X, f(3, 1, 1), X)),
    "Mean": Case("Mean", (X, f(3, 1, 1), X)),
    "Max": Case("Max", (X, f(6), np.float32(0.1))),
    "Max scalar": Case("Max", (X, np.float32(0.1))),
    "Min": Case("Min", (X, f(6))),
    **{op: Case(op, (INTS, Feed((1, 7), "int64", -9, 9))) for op in ("Greater", "Less", "Equal")},
    "GreaterOrEqual": Case("GreaterOrEqual", (X, np.float32(0.1))),
    "LessOrEqual": Case("LessOrEqual", (X, np.float32(0.1))),
    **{op: Case(op, (BOOLS, BOOLS)) for op in ("And", "Or", "Xor")},
    "And constant": Case("And", (BOOLS, np.array([True, False, True]))),
    "Dropout": Case("Dropout", (X,)),
    "Cast": Case("Cast", (X,), {"to": 7}),
    "Cast half": Case("Cast", (X,), {"to": 10}),
    "Cast bool": Case("Cast", (INTS,), {"to": 9}),
    "CastLike": Case("CastLike", (INTS, np.float32(1))),
    "Where": Case("Where", (BOOLS, Feed((1, 4, 3)), Feed((1, 4, 3)))),
    "Where constant": Case("Where", (BOOLS, np.float32(-np.inf), Feed((1, 4, 1)))),
    "Where integers": Case("Where", (BOOLS, i(1), i(2, 3, 4))),
    # convolutions and pooling
    "Conv": Case("Conv", (X, f(4, 3, 3, 3), f(4)), {"pads": [1, 1, 1, 1]}),
    "Conv asymmetric": Case("Conv", (X, f(4, 3, 2, 3)), {"pads": [0, 2, 1, 1], "strides": [2, 1]}),
    "Conv dilated": Case("Conv", (X, f(4, 3, 3, 2)), {"pads": [2, 1, 2, 0], "dilations": [2, 1]}),
    "Conv depthwise": Case("Conv", (X, f(3, 1, 3, 3), f(3)), {"group": 3, "pads": [1, 1, 1, 1]}),
    "Conv groups": Case("Conv", (Feed((1, 4, 5, 5)), f(6, 2, 3, 3)), {"group": 2}),
    "Conv same upper": Case("Conv", (X, f(4, 3, 3, 2)), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "Conv same lower": Case("Conv", (X, f(4, 3, 2, 4)), {"auto_pad": "SAME_LOWER"}),
    "Conv valid": Case("Conv", (X, f(4, 3, 3, 3)), {"auto_pad": "VALID"}),
    "ConvTranspose": Case("ConvTranspose", (X, f(3, 4, 2, 2), f(4)), {"strides": [2, 2]}),
    "ConvTranspose padded": Case(
        "ConvTranspose", (X, f(3, 4, 3, 3)), {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    ),
    "ConvTranspose asymmetric": Case("ConvTranspose", (X, f(3, 4, 3, 3)), {"strides": [2, 2], "pads": [0, 1, 1, 0]}),
    "ConvTranspose asymmetric extra": Case(
        "ConvTranspose", (X, f(3, 4, 3, 3)), {"strides": [2, 2], "pads": [0, 0, 1, 1], "output_padding": [1, 1]}
    ),
    "ConvTranspose groups": Case("ConvTranspose", (Feed((1, 4, 3, 3)), f(4, 2, 3, 3)), {"group": 2}),
    "ConvTranspose depthwise": Case(
        "ConvTranspose", (X, f(3, 1, 4, 4)), {"group": 3, "strides": [2, 2], "pads": [1, 1, 1, 1]}
    ),
    "ConvTranspose shape": Case("ConvTranspose", (X, f(3, 4, 3, 3)), {"strides": [2, 2], "output_shape": [10, 12]}),
    "ConvTranspose same": Case("ConvTranspose", (X, f(3, 4, 3, 3)), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "ConvTranspose dilated": Case("ConvTranspose", (X, f(3, 4, 3, 3)), {"dilations": [2, 2], "pads": [1, 1, 1, 1]}),
    "MatMul": Case("MatMul", (TOKENS, f(8, 5))),
    "MatMul values": Case("MatMul", (Feed((1, 2, 4, 5)), Feed((1, 2, 5, 3)))),
    "MatMul first": Case("MatMul", (f(7, 10), TOKENS)),
    "MatMul vector": Case("MatMul", (TOKENS, f(8))),
    "Gemm": Case("Gemm", (Feed((1, 8)), f(8, 5), f(5))),
    "Gemm transposed": Case("Gemm", (Feed((1, 8)), f(5, 8), f(1, 5)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Gemm without bias": Case("Gemm", (Feed((1, 8)), f(8, 5)), {"alpha": 0.5}),
    "Gemm first transposed": Case("Gemm", (Feed((8, 1)), f(8, 5)), {"transA": 1}, open_batch=False),
    "MaxPool": Case("MaxPool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "MaxPool default strides": Case("MaxPool", (X,), {"kernel_shape": [2, 3]}),
    "MaxPool padded": Case("MaxPool", (X,), {"kernel_shape": [5, 5], "pads": [2, 2, 2, 2]}),
    "MaxPool asymmetric": Case("MaxPool", (X,), {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "strides": [2, 2]}),
    "MaxPool ceil": Case("MaxPool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "MaxPool ceil 3": Case("MaxPool", (X,), {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "MaxPool ceil drops": Case(
        "MaxPool", (Feed((1, 3, 5, 5)),), {"kernel_shape": [1, 1], "strides": [3, 3], "ceil_mode": 1}
    ),
    "MaxPool ceil padded": Case(
        "MaxPool", (Feed((1, 3, 6, 6)),), {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1, "pads": [0, 0, 1, 1]}
    ),
    "MaxPool same": Case("MaxPool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    "AveragePool": Case("AveragePool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "AveragePool excluded": Case("AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "AveragePool counted": Case(
        "AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    ),
    "AveragePool counted asymmetric": Case(
        "AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "count_include_pad": 1}
    ),
    "AveragePool asymmetric": Case("AveragePool", (X,), {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]}),
    "AveragePool ceil": Case("AveragePool", (X,), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "AveragePool ceil counted": Case(
        "AveragePool",
        (X,),
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1], "count_include_pad": 1},
        opset=19,
    ),
    "GlobalAveragePool": Case("GlobalAveragePool", (X,)),
    "GlobalMaxPool": Case("GlobalMaxPool", (X,)),
    # sampling
    "Resize nearest": Case("Resize", (X, None, np.float32([1, 1, 2, 2]))),
    "Resize nearest asymmetric": Case(
        "Resize",
        (X, None, np.float32([1, 1, 2, 3])),
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "Resize nearest smaller": Case("Resize", (X, None, None, i(1, 3, 3, 4))),
    "Resize nearest corners": Case(
        "Resize", (X, None, None, i(1, 3, 8, 9)), {"coordinate_transformation_mode": "align_corners"}
    ),
    "Resize nearest ceil": Case("Resize", (X, None, None, i(1, 3, 8, 9)), {"nearest_mode": "ceil"}),
    "Resize nearest prefer ceil": Case(
        "Resize", (X, None, None, i(1, 3, 10, 15)), {"nearest_mode": "round_prefer_ceil"}
    ),
    "Resize nearest pytorch": Case(
        "Resize", (X, None, None, i(1, 3, 1, 9)), {"coordinate_transformation_mode": "pytorch_half_pixel"}
    ),
    "Resize linear": Case("Resize", (X, None, np.float32([1, 1, 2, 2])), {"mode": "linear"}),
    "Resize linear smaller": Case("Resize", (X, None, None, i(1, 3, 3, 4)), {"mode": "linear"}),
    "Resize linear pytorch": Case(
        "Resize",
        (X, None, None, i(1, 3, 7, 9)),
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
    "Resize linear corners": Case(
        "Resize", (X, None, None, i(1, 3, 8, 9)), {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    ),
    "Resize linear asymmetric": Case(
        "Resize", (X, None, None, i(1, 3, 8, 9)), {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
    ),
    "Resize cubic": Case("Resize", (X, None, None, i(1, 3, 9, 8)), {"mode": "cubic"}),
    "Resize cubic corners": Case(
        "Resize", (X, None, None, i(1, 3, 9, 8)), {"mode": "cubic", "coordinate_transformation_mode": "align_corners"}
    ),
    "Resize axes": Case("Resize", (X, None, None, i(8, 9)), {"mode": "linear", "axes": [2, -1]}, opset=18),
    "Resize 10": Case("Resize", (X, np.float32([1, 1, 2, 2])), {"mode": "nearest"}, opset=10),
    "Upsample": Case("Upsample", (X, np.float32([1, 1, 2, 2])), {"mode": "nearest"}, opset=9),
    "Upsample 7": Case("Upsample", (X,), {"mode": "nearest", "scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
    "GridSample": Case("GridSample", (X, Feed((1, 4, 4, 2), low=-1.2, high=1.2))),
    "GridSample corners": Case(
        "GridSample",
        (X, Feed((1, 4, 4, 2), low=-1.2, high=1.2)),
        {"align_corners": 1, "padding_mode": "border", "mode": "bilinear"},
    ),
    "GridSample reflection": Case(
        "GridSample", (X, Feed((1, 4, 4, 2), low=-2, high=2)), {"padding_mode": "reflection"}
    ),
    "GridSample nearest": Case("GridSample", (X, Feed((1, 4, 4, 2), low=-1.2, high=1.2)), {"mode": "nearest"}),
    # shapes
    "Reshape": Case("Reshape", (X, i(1, 15, 6))),
    "Reshape rest": Case("Reshape", (X, i(0, -1))),
    "Reshape heads": Case("Reshape", (TOKENS, i(1, 10, 2, 4))),
    "Reshape into batch": Case("Reshape", (Feed((1, 4, 10, 2)), i(4, 10, 2))),
    "Flatten": Case("Flatten", (X,)),
    "Flatten 2": Case("Flatten", (X,), {"axis": 2}),
    "Flatten negative": Case("Flatten", (X,), {"axis": -3}),
    "Unsqueeze unsorted": Case("Unsqueeze", (TOKENS, i(3, 1))),
    "Unsqueeze negative": Case("Unsqueeze", (TOKENS, i(-1, -3))),
    "Unsqueeze 11": Case("Unsqueeze", (TOKENS,), {"axes": [0]}, opset=11),
    "Squeeze": Case("Squeeze", (Feed((1, 1, 4, 1)), i(-1, 1))),
    "Squeeze 11": Case("Squeeze", (Feed((1, 1, 4)),), {"axes": [1]}, opset=11),
    "Transpose": Case("Transpose", (X,), {"perm": [0, 2, 3, 1]}),
    "Transpose batch": Case("Transpose", (TOKENS,), {"perm": [1, 0, 2]}),
    "Transpose default": Case("Transpose", (TOKENS,)),
    "Concat": Case("Concat", (X, X), {"axis": -3}),
    "Concat token": Case("Concat", (f(1, 1, 8), TOKENS), {"axis": 1}),
    "Split": Case("Split", (X,), {"axis": -1}, outputs=3),
    "Split sizes": Case("Split", (X, i(1, 4)), {"axis": 2}, outputs=2),
    "Split 11": Case("Split", (X,), {"axis": 1, "split": [2, 1]}, opset=11, outputs=2),
    "Split 18": Case("Split", (X,), {"axis": 2, "num_outputs": 3}, opset=18, outputs=3),
    "Slice": Case("Slice", (X, i(1, 0), i(4, 100), i(2, 3))),
    "Slice negative": Case("Slice", (X, i(-3), i(2**62), i(-1))),
    "Slice steps": Case("Slice", (X, i(0, 1), i(5, 6), i(-2, -1), i(2, 2))),
    "Slice backwards": Case("Slice", (X, i(-1), i(-(2**62)), i(3), i(-1))),
    "Slice backwards part": Case("Slice", (X, i(4), i(1), i(3), i(-2))),
    "Slice 9": Case("Slice", (X,), {"starts": [1], "ends": [3], "axes": [2]}, opset=9),
    "Tile": Case("Tile", (TOKENS, i(1, 2, 3))),
    "Expand": Case("Expand", (Feed((1, 1, 8)), i(1, 5, 8))),
    "Expand more dimensions": Case("Expand", (Feed((1, 1)), i(4, 1, 3))),
    "Pad": Case("Pad", (X, i(0, 0, 1, 2, 0, 0, 3, 0), np.float32(0.5))),
    "Pad reflect": Case("Pad", (X, i(0, 0, 1, 2, 0, 0, 3, 0)), {"mode": "reflect"}),
    "Pad edge": Case("Pad", (X, i(0, 0, 1, 2, 0, 0, 3, 0)), {"mode": "edge"}),
    "Pad channels": Case("Pad", (X, i(0, 1, 0, 0, 0, 2, 0, 0))),
    "Pad tokens": Case("Pad", (TOKENS, i(0, 1, 0, 0, 2, 3))),
    "Pad negative": Case("Pad", (X, i(0, 0, -1, 2, 0, 0, 0, -1))),
    "Pad axes": Case("Pad", (X, i(1, 2), np.float32(0), i(-1)), opset=18),
    "Pad 2": Case("Pad", (X,), {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 0.5}, opset=9),
    "DepthToSpace": Case("DepthToSpace", (Feed((1, 8, 2, 3)),), {"blocksize": 2}),
    "DepthToSpace CRD": Case("DepthToSpace", (Feed((1, 8, 2, 3)),), {"blocksize": 2, "mode": "CRD"}),
    "SpaceToDepth": Case("SpaceToDepth", (Feed((1, 3, 4, 6)),), {"blocksize": 2}),
    # reductions
    **{
        f"Reduce{kind}": Case(f"Reduce{kind}", (POSITIVE,), {"axes": [-1, 1]}, opset=11)
        for kind in "Sum Mean Max Min Prod L1 L2 SumSquare LogSum LogSumExp".split()
    },
    "ReduceSum input": Case("ReduceSum", (X, i(3, 2)), {"keepdims": 0}),
    "ReduceMean 18": Case("ReduceMean", (X, i(-1)), {"keepdims": 0}, opset=18),
    "ReduceProd two": Case("ReduceProd", (X, i(3, 1)), {"keepdims": 0}, opset=18),
    "ReduceMax all": Case("ReduceMax", (X,), open_batch=False),
    "ReduceL1 signed": Case("ReduceL1", (X, i(2)), opset=18),
    "ReduceSum nothing": Case("ReduceSum", (X,), {"noop_with_empty_axes": 1}),
    "ReduceMax integers": Case("ReduceMax", (INTS,), {"axes": [1]}, opset=13),
    "ReduceSum integers": Case("ReduceSum", (INTS, i(1))),
    "ArgMax": Case("ArgMax", (X,), {"axis": -1, "keepdims": 0}),
    "ArgMin": Case("ArgMin", (X,), {"axis": 1}),
    "CumSum": Case("CumSum", (X, np.int64(-1))),
    "CumSum reversed": Case("CumSum", (X, np.int64(2)), {"reverse": 1, "exclusive": 1}),
    # indexing
    "Gather": Case("Gather", (X, i(2, 0, -1)), {"axis": -1}),
    "Gather scalar": Case("Gather", (X, np.int64(-1)), {"axis": 2}),
    "Gather range": Case("Gather", (X, i(1, 2, 3)), {"axis": 3}),
    "Gather table": Case("Gather", (f(9, 4), Feed((1, 6), "int64", 0, 8))),
    "Gather two": Case("Gather", (X, i(0, 1, 2, 1).reshape(2, 2)), {"axis": 1}),
    "GatherElements": Case("GatherElements", (TOKENS, Feed((1, 4, 8), "int64", 0, 9)), {"axis": 1}),
    "GatherElements constant": Case("GatherElements", (TOKENS, np.tile(i(0, -1, 3).reshape(1, 3, 1), (1, 1, 8))), {"axis": -2}),
    "GatherND": Case("GatherND", (f(5, 4, 3), Feed((1, 6, 2), "int64", 0, 3))),
    "ScatterND": Case("ScatterND", (Feed((6, 3)), i(4, 1).reshape(2, 1), Feed((2, 3))), open_batch=False),
    "ScatterND add": Case(
        "ScatterND", (Feed((6, 3)), i(4, 1).reshape(2, 1), Feed((2, 3))), {"reduction": "add"}, open_batch=False
    ),
    "ScatterElements": Case(
        "ScatterElements", (Feed((6, 3)), i(4, 1, -1).reshape(1, 3), Feed((1, 3))), open_batch=False
    ),
    "TopK": Case("TopK", (TOKENS, i(3)), {"axis": 1}, outputs=2),
    "TopK smallest": Case("TopK", (TOKENS, i(3)), {"largest": 0}, outputs=2),
    "TopK 1": Case("TopK", (TOKENS,), {"k": 2}, opset=9, outputs=2),
    "Trilu": Case("Trilu", (X, np.int64(1))),
    "Trilu lower": Case("Trilu", (X,), {"upper": 0}),
    # normalization
    "Softmax": Case("Softmax", (X,), {"axis": 1}),
    "Softmax 11": Case("Softmax", (X,), opset=11),
    "Softmax 11 last": Case("Softmax", (X,), {"axis": -1}, opset=11),
    "LogSoftmax": Case("LogSoftmax", (X,)),
    "LayerNormalization": Case("LayerNormalization", (TOKENS, f(8), f(8))),
    "LayerNormalization scale only": Case("LayerNormalization", (TOKENS, f(8))),
    "LayerNormalization epsilon": Case("LayerNormalization", (TOKENS, f(8), f(8)), {"epsilon": 0.1}),
    "LayerNormalization two": Case("LayerNormalization", (TOKENS, f(10, 8), f(10, 8)), {"axis": -2}),
    "BatchNormalization": Case("BatchNormalization", (X, f(3), f(3), f(3), np.abs(f(3)) + 0.1)),
    "BatchNormalization epsilon": Case(
        "BatchNormalization", (X, f(3), f(3), f(3), np.abs(f(3)) + 0.1), {"epsilon": 0.5}
    ),
    "InstanceNormalization": Case("InstanceNormalization", (X, f(3), f(3)), {"epsilon": 0.1}),
    "GroupNormalization 18": Case("GroupNormalization", (Feed((1, 4, 3, 3)), f(2), f(2)), {"num_groups": 2}, opset=18),
    "GroupNormalization 21": Case("GroupNormalization", (Feed((1, 4, 3, 3)), f(4), f(4)), {"num_groups": 2}, opset=21),
    "LpNormalization": Case("LpNormalization", (X,), {"axis": 1}),
    "LpNormalization 1": Case("LpNormalization", (X,), {"p": 1}),
}  # fmt: skip
# What has to be refused in one line, with words of the reason.
REFUSED: dict[str, tuple[Case, str]] = {
    "NonMaxSuppression": (
        Case("NonMaxSuppression", (Feed((1, 6, 4)), Feed((1, 2, 6)), i(3))),
        "number of its results depends on values",
    ),
    "NonZero": (Case("NonZero", (X,)), "number of its results"),
    "QuantizeLinear": (Case("QuantizeLinear", (X, np.float32(0.1), np.uint8(3))), "already quantized"),
    "unknown": (Case("StringNormalizer", (X,)), "there is no rule for it"),
    "Conv 3-D": (Case("Conv", (Feed((1, 3, 5, 5, 5)), f(4, 3, 3, 3, 3))), "its weight is float32"),
    "Conv weight": (Case("Conv", (X, Feed((4, 3, 3, 3)))), "its weight .* is computed at run time"),
    "Resize crop": (
        Case(
            "Resize",
            (X, np.float32([0, 0, 0, 0, 1, 1, 0.5, 0.5]), None, i(1, 3, 8, 9)),
            {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
        ),
        "tf_crop_and_resize",
    ),
    "Resize antialias": (
        Case("Resize", (X, None, None, i(1, 3, 3, 4)), {"mode": "linear", "antialias": 1}, opset=18),
        "antialias",
    ),
    "Resize cubic asymmetric": (
        Case("Resize", (X, None, None, i(1, 3, 8, 9)), {"mode": "cubic", "coordinate_transformation_mode": "asymmetric"}),
        "asymmetric",
    ),
    "Resize scales": (
        Case("Resize", (X, None, np.float32([1, 1, 1.3, 1.3])), {"mode": "linear"}),
        "do not give a whole number of pixels",
    ),
    "Resize channels": (Case("Resize", (X, None, None, i(1, 6, 8, 9)), {"mode": "linear"}), "the same N and C"),
    "MaxPool dilated": (Case("MaxPool", (X,), {"kernel_shape": [2, 2], "dilations": [2, 2]}), "dilations"),
    "MaxPool indices": (Case("MaxPool", (X,), {"kernel_shape": [2, 2]}, outputs=2), "is used"),
    "GridSample cubic": (
        Case("GridSample", (X, Feed((1, 4, 4, 2))), {"mode": "bicubic"}),
        "expected bilinear or nearest",
    ),
    "GatherND batch": (
        Case("GatherND", (TOKENS, Feed((1, 2, 1), "int64", 0, 3)), {"batch_dims": 1}),
        "batch_dims is 1, expected 0",
    ),
    "Pad wrap": (Case("Pad", (X, i(0, 0, 1, 1, 0, 0, 1, 1)), {"mode": "wrap"}, opset=19), "wrap"),
    "LayerNormalization mean": (Case("LayerNormalization", (TOKENS, f(8)), outputs=2), "is used"),
    "BatchNormalization training": (
        Case("BatchNormalization", (X, f(3), f(3), f(3), np.ones(3, np.float32)), {"training_mode": 1}, opset=15),
        "training_mode is 1",
    ),
    "ArgMax last": (Case("ArgMax", (X,), {"select_last_index": 1}), "select_last_index"),
    "Range": (Case("Range", (np.int64(0), Feed((), "int64", 3, 3), np.int64(1))), "computed at run time"),
}  # fmt: skip
