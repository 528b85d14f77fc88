"""ONNX files that the import refuses: one line on stderr, nothing else, exit code 2, and nothing runs before it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_import_onnx import constant, detector, model_of, saved

from act_pipeline.cli.main import main
from act_pipeline.core.errors import UserError
from act_pipeline.families.registry import find_family
from act_pipeline.importers import import_onnx

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")
make = helper.make_node


def refusal(model: onnx.ModelProto, folder: Path, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that the command prints, also counting what ONNX Runtime prints by itself."""
    path = saved(model, folder)
    capfd.readouterr()
    assert main(["import", "--onnx", str(path), "--output", str(folder / "made"), *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    assert printed.err.startswith("error: ") and not (folder / "made").exists()
    return printed.err


def before(model: onnx.ModelProto, *nodes: Any, constants: tuple[Any, ...] = ()) -> onnx.ModelProto:
    """Put nodes between the input ``images`` and the detector, which then reads ``changed``."""
    model.graph.node[0].input[0] = "changed"
    for place, node in enumerate(nodes):
        model.graph.node.insert(place, node)
    model.graph.initializer.extend(constants)
    return model


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("Foo", "op Foo (node 'the_node', output 'a1') cannot be imported: there is no rule for it; docs/import.md"),
        ("Det", "op Det (node 'the_node', output 'a1') cannot be imported: there is no rule for it"),
        ("NonMaxSuppression", "(node 'the_node', output 'a1') cannot be imported: the number of its results depends"),
        ("QuantizeLinear", "the file is already quantized, expected the float model"),
    ],
)
def test_an_op_without_a_rule(op: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = detector()
    model.graph.node[4].op_type, model.graph.node[4].name = op, "the_node"
    assert words in refusal(model, tmp_path, capfd)


def looping(nested: bool) -> onnx.ModelProto:
    """Return a detector with a Loop of 2**62 repetitions before it, or in a branch."""

    def value(name: str, kind: int, shape: list[int]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [make("Identity", ["go"], ["goes"]), make("Identity", ["x"], ["y"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("x", 1, [1, 3, 16, 16])],
        [value("goes", TensorProto.BOOL, []), value("y", 1, [1, 3, 16, 16])],
    )
    constants = (constant("count", 2**62, np.int64), constant("yes", True, bool))
    loop = make("Loop", ["count", "yes", "images"], ["changed"], name="the_loop", body=body)
    if nested:
        branch = helper.make_graph([loop], "branch", [], [onnx.ValueInfoProto(name="changed")])
        loop = make("If", ["yes"], ["changed"], then_branch=branch, else_branch=branch)
    return before(detector(), loop, constants=constants)


@pytest.mark.parametrize("nested", [False, True])
def test_an_endless_loop_never_runs(nested: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    line = refusal(looping(nested), tmp_path, capfd)
    assert "op Loop (node 'the_loop', output 'changed') cannot be imported: its repetitions depend on values" in line
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("node", "constants", "shape"),
    [
        (make("Tile", ["images", "n"], ["changed"]), {"n": np.array([1, 1, 4096, 4096])}, "[1, 3, 65536, 65536]"),
        (
            make("Resize", ["images", "", "n"], ["changed"], mode="nearest"),
            {"n": np.array([1, 1, 40000, 40000], np.float32)},
            "[1, 3, 640000, 640000]",
        ),
        (make("Pad", ["images", "n"], ["changed"]), {"n": np.array([0] * 6 + [10**6] * 2)}, "[1, 3, 1000016, 1000016]"),
        (make("Range", ["a", "b", "c"], ["changed"]), {"a": 0, "b": 10**11, "c": 1}, "[100000000000]"),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_a_huge_value_is_never_computed(
    node: Any, constants: dict[str, Any], shape: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = tuple(numpy_helper.from_array(np.array(value), name) for name, value in constants.items())
    line = refusal(before(detector(), node, constants=arrays), tmp_path, capfd)
    assert f"({node.op_type}, output 'changed') makes {shape}, expected at most 268435456 values" in line


def two_pictures() -> onnx.ModelProto:
    model = before(detector(), make("Add", ["images", "second"], ["changed"]))
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, [1, 3, 16, 16]))
    return model


def test_one_of_several_pictures_has_to_be_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(two_pictures(), tmp_path, capfd)
    assert "has several inputs that may be the picture: images, second, expected one [N, 3, H, W]" in line
    assert "--input_shape images:1,3,16,16" in line
    made = import_onnx(tmp_path / "model.onnx", tmp_path / "made", input_shape={"second": [1, 3, 16, 16]})
    assert made.inputs == {"images": (-1, 3, 16, 16), "image": (-1, 3, 16, 16)}
    assert "nothing feeds the input images, so that the other commands refuse the model" in made.summary()


def test_an_input_without_a_rank(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = detector()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    line = refusal(model, tmp_path, capfd)
    assert "images (of no known rank)" in line and "--input_shape images:1,3,640,640" in line


def rows(count: int, width: int) -> onnx.ModelProto:
    """Return a model with one output [1, count, width]."""
    rng = np.random.default_rng(0)
    nodes = [
        make("Conv", ["images", "w"], ["c"]), make("GlobalAveragePool", ["c"], ["g"]),
        make("Reshape", ["g", "flat"], ["f"]), make("MatMul", ["f", "m"], ["p"]),
        make("Reshape", ["p", "rows"], ["output0"]),
    ]  # fmt: skip
    constants = [
        constant("w", rng.normal(size=(4, 3, 3, 3))), constant("m", rng.normal(size=(4, count * width))),
        constant("flat", [-1, 4], np.int64), constant("rows", [-1, count, width], np.int64),
    ]  # fmt: skip
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 32, 32])
    return model_of(nodes, [images], [onnx.ValueInfoProto(name="output0")], constants)


@pytest.mark.parametrize(
    ("count", "width", "family", "words"),
    [
        # Ultralytics' export with nms=True.
        (300, 6, "yolo", "gives output0 [N, 300, 6], but the family yolo has one array [N, 4 + C, A]"),
        (
            300,
            6,
            "yolo",
            "of boxes before NMS; end2end fits: name it (--family, Global.arch, or arch of infer_cfg.yml)",
        ),
        (300, 85, "detr_raw", "yolo fits: name it"),
        (300, 85, "rtdetr", "but the family rtdetr has bbox [K, 6]"),
        (300, 85, "rtdetr", "yolo fits: name it"),
        (1, 4, "yolo", "no family fits: export the model so that it has the outputs of one"),
    ],
)
def test_a_family_that_does_not_fit(
    count: int, width: int, family: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(rows(count, width), tmp_path, capfd, "--family", family)


def test_a_family_that_does_not_exist_is_refused_before_the_file_is_read(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "--onnx", "there_is_none.onnx", "--family", "yollo"]) == 2
    assert "--family is 'yollo', expected one of rtdetr, " in (line := capfd.readouterr().err)
    assert line.endswith("did you mean 'yolo'?\n")


def test_arch_names_a_family_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"model gives out \[N, 300, 6\], but the family yolo .* end2end fits: name it"):
        find_family({"out": (-1, 300, 6)}, Path("model"), "yolo")


def test_a_model_without_a_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nodes = [make("MatMul", ["x", "w"], ["a"]), make("Reshape", ["a", "rows"], ["output0"])]
    constants = [constant("w", np.eye(10, 840)), constant("rows", [-1, 84, 10], np.int64)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 10])
    line = refusal(model_of(nodes, [x], [onnx.ValueInfoProto(name="output0")], constants), tmp_path, capfd)
    assert "has no input for a picture (its inputs are x [1, 10]), expected one [N, 3, H, W]" in line


def test_a_prompt_for_a_model_without_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That the model takes no text is said before that the prompt has no tokens."""
    assert "takes no text (its inputs are images)" in refusal(detector(), tmp_path, capfd, "--prompt", "a cat .")


def test_a_mask_decoder_that_does_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder, found in ((tmp_path / "nope", "nope does not exist"), (tmp_path, "model.pdmodel is missing")):
        line = refusal(detector(), tmp_path, capfd, "--mask_decoder", str(folder))
        assert found in line and "import the decoder first (tools/import_model.py --onnx decoder.onnx)" in line
        assert "export_model" not in line
