"""Export rules, op by op: small Paddle programs in ONNX Runtime and OpenVINO, compared with Paddle's executor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_rule_cases import CASES, F, Inputs, paddle

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.onnx_export import lower
from act_pipeline.onnx_export.float_ops.registry import RULES

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")


def saved(
    directory: Path, cases: dict[str, Callable[[Inputs], Any]], parameter: bool = True
) -> tuple[InferenceModel, Inputs, list[tuple[str, int]]]:
    """Save a program.

    Args:
        directory: the model folder; it is created.
        cases: name -> function that adds ops and returns their outputs.
        parameter: add an output that depends on a parameter, since Paddle writes no file without any.

    Returns:
        The model, its inputs, and the case and the number of each output.
    """
    directory.mkdir()
    with static_mode():
        program, start, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        executor = paddle.static.Executor(paddle.CPUPlace())
        inputs = Inputs()
        with (
            paddle.static.program_guard(program, start),
            paddle.static.scope_guard(scope),
            paddle.utils.unique_name.guard(),
        ):
            outputs, labels = [], []
            for name, program_of in cases.items():
                made = program_of(inputs)
                for number, output in enumerate(made if isinstance(made, (list, tuple)) else [made]):
                    outputs.append(output)
                    labels.append((name, number))
            if parameter:
                outputs.append(inputs.weight(2) * 2)
                labels.append(("a parameter", 0))
            program = program.clone(for_test=True)
            executor.run(start)
            outputs = [program.global_block().var(output.name) for output in outputs]
            model = StaticGraph(program, list(inputs.used), outputs, scope, executor).save(directory)
            return model, inputs, labels


def in_paddle(model: InferenceModel, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    with static_mode():
        graph = StaticGraph.load(model)
        with paddle.static.scope_guard(graph.scope):
            return [graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets) for feed in feeds]


def in_onnxruntime(path: Path, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, feed) for feed in feeds]


def in_openvino(path: Path, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return [[compiled(feed)[output].copy() for output in compiled.outputs] for feed in feeds]


def check(tmp_path: Path, cases: dict[str, Callable[[Inputs], Any]], **options: Any) -> None:
    """Compare programs in all engines, at batches of 1 and 3."""
    model, inputs, labels = saved(tmp_path / "model", cases)
    lowered = lower(model, tmp_path / "model.onnx", **options)
    feeds = [inputs.values(1), inputs.values(3)]
    expected = in_paddle(model, feeds)
    failed = []
    for engine, run in (("ort", in_onnxruntime), ("ov", in_openvino)):
        for wanted, found in zip(expected, run(lowered.path, feeds)):
            assert len(wanted) == len(found) == len(labels)
            for label, one, other in zip(labels, wanted, found):
                same_type = one.dtype == other.dtype or (engine == "ov" and other.dtype in (np.bool_, np.uint8))
                if one.shape != other.shape or not same_type:
                    failed.append(f"{engine} {label}: {other.dtype} {other.shape}, expected {one.dtype} {one.shape}")
                elif not np.allclose(other, one, rtol=1e-5, atol=1e-5, equal_nan=True):
                    difference = np.abs(other.astype(np.float64) - one).max()
                    failed.append(f"{engine} {label}: largest difference {difference}")
    assert not failed, "\n".join(failed)


# Several in one program, which takes far less time than one program for each.
GROUPS = [list(CASES)[first : first + 8] for first in range(0, len(CASES), 8)]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_rules_compute_what_paddle_computes(tmp_path: Path, names: list[str]) -> None:
    check(tmp_path, {name: CASES[name] for name in names})


def test_every_rule_is_compared() -> None:
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program, paddle.static.Program()), paddle.utils.unique_name.guard():
            inputs = Inputs()
            for program_of in CASES.values():
                program_of(inputs)
        compared = {op.type for op in program.global_block().ops}
    # These are other names of ops that are compared, in older programs and in those of Paddle's passes.
    assert set(RULES) - compared == {"top_k", "share_data"}


def described(values: Any) -> dict[str, tuple[str, list[int | str]]]:
    """Return name -> element type and sizes of the inputs or outputs of an ONNX graph."""
    return {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def test_a_fixed_batch_stays_fixed_and_inputs_keep_their_types(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "model", {"": lambda v: [v.fixed * 2, v.rows + 1]})
    lowered = lower(model, tmp_path / "model.onnx")
    graph = onnx.load(lowered.path).graph
    assert (graph.name, lowered.batch) == ("detector", 1)
    assert described(graph.input) == {"fixed": ("float32", [1, 4, 6, 6]), "rows": ("int64", [3])}
    assert lower(model, tmp_path / "same.onnx", batch=1).batch == 1
    with pytest.raises(UserError, match=r"batch is 4, but .* input fixed is \[1, 4, 6, 6\], expected 1;") as raised:
        lower(model, tmp_path / "four.onnx", batch=4)
    assert "\n" not in str(raised.value) and not (tmp_path / "four.onnx").exists()


def test_an_open_batch_is_fixed_where_it_is_open(tmp_path: Path) -> None:
    model, _, _ = saved(tmp_path / "model", {"": lambda v: [v.x * 2, v.i + v.k, v.b & v.c, v.whole + 1]})
    lowered = lower(model, tmp_path / "model.onnx")
    assert lowered.batch is None
    inputs = described(onnx.load(lowered.path).graph.input)
    assert inputs["x"] == ("float32", ["N", 4, 6, 6]) and inputs["i"] == ("int64", ["N", 5])
    assert inputs["b"] == ("bool", ["N", 5]) and inputs["whole"] == ("float32", [4, 5])
    inputs = described(onnx.load(lower(model, tmp_path / "two.onnx", batch=2).path).graph.input)
    assert inputs["x"] == ("float32", [2, 4, 6, 6]) and inputs["whole"] == ("float32", [4, 5])


def test_outputs_keep_their_names_and_types(tmp_path: Path) -> None:
    model, inputs, _ = saved(tmp_path / "model", {"": lambda v: [v.x, v.s > 0, v.i, v.t.sum()]})
    with static_mode():
        names = [target.name for target in StaticGraph.load(model).fetch_targets]
    outputs = described(onnx.load(lower(model, tmp_path / "model.onnx").path).graph.output)
    assert list(outputs) == names
    assert [kind for kind, _ in outputs.values()] == ["float32", "bool", "int64", "float32", "float32"]
    assert [len(sizes) for _, sizes in outputs.values()] == [4, 2, 2, 0, 1]


@pytest.mark.parametrize(
    ("names", "program_of"),
    [
        (["bbox", "bbox_num"], lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.i[:, 0]]),
        (None, lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.s[:, 0]]),  # no number of boxes
        (None, lambda v: [v.x.reshape([-1, 8]) * v.weight(1), v.i[:, 0]]),  # no boxes
        (None, lambda v: [v.x.reshape([-1, 6]) > v.weight(1), v.i[:, 0]]),
        (None, lambda v: [v.x.reshape([-1, 6]) * v.weight(1), v.i[:, 0], v.i]),
    ],
)
def test_only_a_detector_is_renamed(tmp_path: Path, names: list[str] | None, program_of: Callable) -> None:
    model, inputs, _ = saved(tmp_path / "model", {"": program_of}, parameter=False)
    lowered = lower(model, tmp_path / "model.onnx")
    with static_mode():
        names = names or [target.name for target in StaticGraph.load(model).fetch_targets]
    assert [output.name for output in onnx.load(lowered.path).graph.output] == names
    feeds = [inputs.values(2)]
    for one, other in zip(in_paddle(model, feeds)[0], in_onnxruntime(lowered.path, feeds)[0]):
        np.testing.assert_array_equal(one, other)
        assert other.dtype == (np.int32 if names[0] == "bbox" and other.ndim == 1 else one.dtype)


def _suppressed(v: Inputs) -> Any:
    helper = paddle.base.layer_helper.LayerHelper("multiclass_nms3")
    boxes, index, count = (helper.create_variable_for_type_inference(kind) for kind in ("float32", "int32", "int32"))
    helper.append_op(
        type="multiclass_nms3",
        inputs={"BBoxes": v.t[:, :, :4], "Scores": v.t[:, :3, :5]},
        outputs={"Out": boxes, "Index": index, "NmsRoisNum": count},
        attrs={"background_label": -1, "score_threshold": 0.1, "nms_top_k": 4, "nms_threshold": 0.5, "keep_top_k": 4},
    )
    return [boxes, count]


@pytest.mark.parametrize(
    ("program_of", "words"),
    [
        (_suppressed, "op multiclass_nms3 .* outputs that are not behind it"),
        (lambda v: paddle.sinh(v.x), "op sinh .* no rule for it"),
        (lambda v: F.avg_pool2d(v.x, 2, data_format="NHWC"), "its layout is NHWC, expected NCHW"),
        (lambda v: F.pad(v.x, [1, 1, 1, 1], mode="circular"), "its mode is circular, .* needs --opset 19"),
        (lambda v: F.grid_sample(v.volume, v.weight(1, 2, 2, 2, 3)), "it samples volumes"),
    ],
    ids=["nms", "sinh", "layout", "mode", "volume"],
)
def test_what_has_no_rule_is_one_line(tmp_path: Path, program_of: Callable, words: str) -> None:
    model, _, _ = saved(tmp_path / "model", {"": program_of})
    with pytest.raises(UserError, match=words) as raised:
        lower(model, tmp_path / "model.onnx")
    assert "\n" not in str(raised.value) and not (tmp_path / "model.onnx").exists()


def test_half_precision_leaves_out_what_has_none(tmp_path: Path) -> None:
    """Celu, sums by indices and the factors of a Resize are FP32 in the specification or in ONNX Runtime."""

    def program_of(v: Inputs) -> list[Any]:
        grown = F.interpolate(F.celu(v.x), scale_factor=v.weight(1, low=1.5) * 1.0)
        added = paddle.scatter_nd_add(v.whole, v.i.unsqueeze(-1)[0], v.weight(5, 5))
        return [paddle.matmul(grown.mean([2, 3]), v.weight(4, 2)), paddle.matmul(added, v.weight(5, 2))]

    model, inputs, _ = saved(tmp_path / "model", {"": program_of})
    lowered = lower(model, tmp_path / "model.onnx", float16=True)
    feeds = [inputs.values(1)]
    for one, other in zip(in_paddle(model, feeds)[0], in_onnxruntime(lowered.path, feeds)[0]):
        np.testing.assert_allclose(other, one, rtol=0.02, atol=0.02)
        assert other.dtype == np.float32
