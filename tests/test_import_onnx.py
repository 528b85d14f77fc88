"""ONNX files into Paddle models: every rule against ONNX Runtime, files that are refused, and real detectors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_op_cases import CASES, REFUSED, Case, Feed

from act_pipeline.cli.main import main
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers import import_onnx
from act_pipeline.importers.onnx import read
from act_pipeline.importers.onnx.convert import convert
from act_pipeline.importers.onnx.rules import registry
from act_pipeline.importers.onnx.rules.registry import RULES, op_table
from act_pipeline.importers.onnx.verify import compare as difference

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("onnxslim", reason="needs the extra importers")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MODELS = SHARED / "models"
CLOSE = 2e-5
X = Feed((1, 3, 5, 6))


def proto(case: Case, batch: Any = 1) -> onnx.ModelProto:
    """Return the model of one node; inputs are x0, x1, ..., outputs y0, y1, ..."""
    names, inputs, constants = [], [], []
    for index, each in enumerate(case.inputs):
        names.append("" if each is None else f"x{index}")
        if isinstance(each, Feed):
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype))
            shape = [batch, *each.shape[1:]] if each.shape[:1] == (1,) else each.shape
            inputs.append(helper.make_tensor_value_info(names[-1], kind, shape))
        elif each is not None:
            constants.append(numpy_helper.from_array(np.asarray(each), names[-1]))
    outputs = [f"y{index}" for index in range(case.outputs)]
    node = helper.make_node(case.op, names, outputs, name="the_node", **case.attrs)
    return model_of([node], inputs, [onnx.ValueInfoProto(name=name) for name in outputs], constants, case.opset)


def model_of(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any], opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def in_onnxruntime(path: Path, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, sample)


def in_paddle(model: InferenceModel, sample: dict[str, np.ndarray]) -> list[np.ndarray]:
    import paddle

    with static_mode():
        graph = StaticGraph.load(model)
        feed = {name: sample[name] for name in graph.feed_names}
        with paddle.static.scope_guard(graph.scope):
            found = graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)
        graph.close()
    return [np.asarray(each) for each in found]


@pytest.fixture()
def unsimplified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep onnxslim from replacing the op that is tested."""
    monkeypatch.setattr(read, "_simplified", lambda model, *rest: model)


def run_converted(path: Path, samples: list[dict[str, np.ndarray]], batch: bool = False) -> list[Any]:
    """Convert without saving and run: each sample alone, or all as one batch; returns shapes too for a batch."""
    import paddle

    with static_mode():
        source = read.read_onnx(path)
        made = convert(source)
        if batch:
            made = convert(source, made.shapes)
            samples = [{name: np.concatenate([each[name] for each in samples]) for name in samples[0]}]
        graph, found = made.graph, []
        with paddle.static.scope_guard(graph.scope):
            for sample in samples:
                feed = {known: sample[name] for name, known in made.inputs.items()}
                found.append(graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets))
        shapes = [tuple(target.shape) for target in graph.fetch_targets]
    return [found[0], shapes] if batch else found


@pytest.mark.parametrize("name", CASES)
def test_an_op_computes_what_onnx_runtime_does(name: str, tmp_path: Path, unsimplified: None) -> None:
    case = CASES[name]
    path = saved(proto(case), tmp_path)
    rng = np.random.default_rng(7)
    feeds = {f"x{index}": each for index, each in enumerate(case.inputs) if isinstance(each, Feed)}
    samples = [{key: each.sample(rng) for key, each in feeds.items()} for _ in range(3)]
    if "halves" in name:
        samples = [{"x0": np.round(sample["x0"]) / 2} for sample in samples]
    expected = [in_onnxruntime(path, sample) for sample in samples]

    if name == "Cast half":  # the whole file becomes float32
        expected = [[sample["x0"]] for sample in samples]
    for outputs, found in zip(expected, run_converted(path, samples[:2])):
        compare(outputs, found)
    if case.open_batch:
        found, shapes = run_converted(path, samples, batch=True)
        axes = [shape.index(-1) for shape in shapes]
        joined = [np.concatenate([each[index] for each in expected], axis) for index, axis in enumerate(axes)]
        compare(joined, found)


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> None:
    assert len(expected) == len(found)
    for one, other in zip(expected, found):
        assert one.shape == other.shape and one.dtype == other.dtype
        np.testing.assert_allclose(other, one, rtol=CLOSE, atol=CLOSE)


def test_every_rule_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == set(RULES)


@pytest.mark.parametrize("name", REFUSED)
def test_what_paddle_cannot_do_is_refused(name: str, tmp_path: Path, unsimplified: None) -> None:
    case, words = REFUSED[name]
    path = saved(proto(case), tmp_path)
    with static_mode(), pytest.raises(UserError, match=words) as error:
        convert(read.read_onnx(path))
    assert str(error.value).startswith(f"{path}: op {case.op} (node 'the_node', output 'y0') cannot be imported: ")
    assert "\n" not in str(error.value)


def test_the_table_in_the_docs_is_the_registry() -> None:
    assert op_table() in (ROOT / "docs" / "import.md").read_text(encoding="utf-8")


def detector(height: Any = 16, width: Any = 16, batch: Any = 1, changes: str = "") -> onnx.ModelProto:
    """Return a small detector: input ``images``, output ``output0`` [N, boxes, 6], with metadata as Ultralytics writes it."""
    rng = np.random.default_rng(1)

    def tensor(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.3, name)

    nodes = [
        helper.make_node("Conv", ["images", "/model.0/conv.weight", "b0"], ["c0"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c0"], ["s0"]),
        helper.make_node("Mul", ["c0", "s0"], ["a0"]),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["a1"]),
        helper.make_node("Reshape", ["a1", "flat"], ["tokens"]),
        helper.make_node("Transpose", ["tokens"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "w2"], ["product"]),
        helper.make_node("Add", ["b2", "product"], ["output0"]),
    ]
    constants = [
        tensor("/model.0/conv.weight", 8, 3, 3, 3), tensor("b0", 8), tensor("w1", 8, 1, 3, 3), tensor("b1", 8),
        tensor("w2", 8, 6), tensor("b2", 6), numpy_helper.from_array(np.array([0, 8, -1]), "flat"),
    ]  # fmt: skip
    if changes == "mixes":  # every image is compared with the largest value of all
        nodes[-1].output[0] = "each"
        nodes.append(helper.make_node("ReduceMax", ["each"], ["most"], axes=[0, 1, 2]))
        nodes.append(helper.make_node("Sub", ["each", "most"], ["output0"]))
    elif changes == "first":
        nodes[-1].output[0] = "each"
        constants.append(numpy_helper.from_array(np.array(0), "zero"))
        nodes.append(helper.make_node("Gather", ["each", "zero"], ["output0"], axis=0))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, height, width])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)
    model = model_of(nodes, [images], [output], constants)
    helper.set_model_props(model, {"names": "{0: 'cell', 1: 'Zelle é'}", "stride": "32", "task": "detect"})
    return model


def test_a_detector_becomes_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(detector(), tmp_path)
    assert main(["import", "--onnx", str(path), "--output", str(tmp_path / "made")]) == 0
    printed = capsys.readouterr().out
    assert "inputs image [-1, 3, 16, 16]; outputs output0 [-1, 64, 6]" in printed
    assert re.search(
        r"largest difference to ONNX Runtime: \d\.\de-0[5-9], on 3 scenes of the built-in sample ", printed
    )
    assert sorted(each.name for each in (tmp_path / "made").iterdir()) == [
        "import.json", "infer_cfg.yml", "model.pdiparams", "model.pdmodel",
    ]  # fmt: skip
    record = read_record(tmp_path / "made" / "import.json", "act_pipeline.import/1")
    assert record["source"] == "model.onnx" and record["opset"] == 17 and record["fixed_batch"] is None
    assert record["inputs"] == {"image": {"shape": [-1, 3, 16, 16], "dtype": "float32", "onnx_name": "images"}}
    assert record["outputs"] == [{"name": "output0", "shape": [-1, 64, 6]}] and "onnxslim" in record["versions"]
    assert 0 <= record["max_difference"] < 1e-5
    model = InferenceModel.load(tmp_path / "made")
    assert model.infer_cfg()["label_list"] == ["cell", "Zelle é"]
    assert "Preprocess" not in model.infer_cfg()

    rng = np.random.default_rng(3)
    images = rng.random((5, 3, 16, 16), np.float32)
    expected = np.concatenate([in_onnxruntime(path, {"images": image[None]})[0] for image in images])
    np.testing.assert_allclose(in_paddle(model, {"image": images})[0], expected, atol=1e-5)


def test_weights_and_biases_are_where_quantization_looks_for_them(tmp_path: Path) -> None:
    model = import_onnx(saved(detector(), tmp_path), tmp_path / "made").model
    with static_mode():
        graph = StaticGraph.load(model)
        block = graph.program.global_block()
        found = quantizable_ops(graph, ["conv2d", "depthwise_conv2d", "matmul_v2"])
        assert [(op.type, op.weight) for op in found] == [
            ("conv2d", "model.0.conv.weight"), ("depthwise_conv2d", "w1"), ("matmul_v2", "w2"),
        ]  # fmt: skip
        adds = [op for op in block.ops if op.type == "elementwise_add"]
        assert [graph.parameter(op.input("Y")[0]).shape for op in adds[:2]] == [(1, 8, 1, 1)] * 2
        graph.unwrap_outputs()
        assert [target.name for target in graph.fetch_targets] == ["output0"]
        graph.close()


@pytest.mark.parametrize(
    ("changes", "words"), [("mixes", "what three images give together differs by"), ("first", "op Gather")]
)
def test_a_graph_that_mixes_images_keeps_its_batch(changes: str, words: str, tmp_path: Path) -> None:
    made = import_onnx(saved(detector(changes=changes), tmp_path), tmp_path / "made")
    assert made.inputs == {"image": (1, 3, 16, 16)} and words in made.fixed_batch
    assert made.summary().count("the batch is fixed: ") == 1 and made.max_difference < 1e-5
    assert read_record(tmp_path / "made" / "import.json", "act_pipeline.import/1")["fixed_batch"] == made.fixed_batch


def test_the_batch_stays_fixed_where_asked_for(tmp_path: Path) -> None:
    made = import_onnx(saved(detector(batch=2), tmp_path), tmp_path / "made", fixed_batch=True)
    assert made.inputs == {"image": (2, 3, 16, 16)} and made.outputs == (("output0", (2, 64, 6)),)
    assert import_onnx(saved(detector(batch=2), tmp_path), tmp_path / "open").inputs == {"image": (-1, 3, 16, 16)}


def test_half_and_double_precision_become_float32(tmp_path: Path) -> None:
    model = detector()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    made = import_onnx(saved(model, tmp_path), tmp_path / "made")
    assert made.max_difference < 1e-5
    with static_mode():
        graph = StaticGraph.load(made.model)
        assert {str(graph.parameter(name).dtype) for name in ("w1", "w2")} == {"float32"}
        graph.close()


def test_a_branch_with_a_constant_condition_is_taken(tmp_path: Path) -> None:
    def branch(op: str) -> Any:
        inner = [helper.make_node(op, ["x"], [f"{op}_out"])]
        return helper.make_graph(inner, op, [], [onnx.ValueInfoProto(name=f"{op}_out")])

    nodes = [
        helper.make_node("If", ["no"], ["chosen"], then_branch=branch("Exp"), else_branch=branch("Sin")),
        helper.make_node("Add", ["chosen", "shift"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 1, 2])
    constants = [numpy_helper.from_array(np.array(False), "no"), numpy_helper.from_array(np.ones(2, "f"), "shift")]
    path = saved(model_of(nodes, [x], [onnx.ValueInfoProto(name="y")], constants), tmp_path)
    made = import_onnx(path, tmp_path / "made")
    sample = np.arange(6, dtype=np.float32).reshape(1, 3, 1, 2)
    np.testing.assert_allclose(in_paddle(made.model, {"image": sample})[0], np.sin(sample) + 1, atol=1e-6)


def test_a_wrong_rule_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.RULES, "Relu", RULES["Sigmoid"])
    with pytest.raises(UserError, match="differs from ONNX Runtime by .*, expected at most 0.001"):
        import_onnx(saved(detector(), tmp_path), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_file_without_weights_is_no_detector(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights that its outputs depend on"):
        import_onnx(saved(proto(CASES["Relu"]), tmp_path), tmp_path / "made")


@pytest.mark.parametrize("module", ["onnxslim", "onnxruntime"])
def test_a_missing_package_is_named(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    remedy = r'pip install "act_pipeline\[importers\]", or -r requirements/importers.txt in a clone'
    with pytest.raises(UserError, match=rf"{module} cannot be imported .*: {remedy}"):
        import_onnx(saved(detector(), tmp_path), tmp_path / "made")


def test_rows_of_a_detr_are_compared_as_sets() -> None:
    rng = np.random.default_rng(0)
    scores, boxes = rng.random((2, 50, 3)), rng.random((2, 50, 4))
    order = rng.permutation(50)
    assert difference([scores, boxes], [scores[:, order], boxes[:, order]]) < 1e-9
    other = boxes[:, order].copy()
    other[1, 7, 2] += 0.5
    assert 0.4 < difference([scores, boxes], [scores[:, order], other]) < 0.6
    assert difference([scores, boxes], [scores[:, order], boxes]) > 0.01, "rows belong together"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([1.0, np.inf], [1.0, np.inf], 0), ([1.0, -np.inf], [1.0, 3.0], np.inf), ([1.0], [np.nan], np.inf),
     ([1000.0], [1001.0], 1e-3), ([0.1], [0.2], 0.1), ([1.0], [1.0, 2.0], np.inf)],
)  # fmt: skip
def test_the_difference_is_relative_above_one(one: list[float], other: list[float], expected: float) -> None:
    assert difference([np.array(one)], [np.array(other)]) == pytest.approx(expected)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which the command fails."""
    assert main(["import", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed
    return printed.err


def test_open_sizes_have_to_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(detector("height", "width", "batch"), tmp_path)
    output = ["--output", str(tmp_path / "made")]
    line = fails(["--onnx", str(path), *output], capsys)
    assert "inputs with open dimensions: images [?, 3, ?, ?]; give their shapes" in line
    assert "--input_shape images:1,3,640,640" in line
    for given, words in (
        ("image:1,3,16,16", "--input_shape names 'image', the file's inputs are images"),
        ("images:1,4,16,16", "gives 'images' the shape [1, 4, 16, 16], the file has [?, 3, ?, ?]"),
        ("images:3,16,16", "the file has [?, 3, ?, ?]"),
        ("images:1,3,x,16", "--input_shape is 'images:1,3,x,16', expected NAME:SIZES"),
        ("3,16,16", "fits several inputs or none"),
        ("images:100,3,60000,60000", "expected at most"),
    ):
        assert words in fails(["--onnx", str(path), "--input_shape", given, *output], capsys)
    for given in ("images:1,3,16,16", "1,3,16,16"):
        assert main(["import", "--onnx", str(path), "--input_shape", given, *output]) == 0
        assert "inputs image [-1, 3, 16, 16]" in capsys.readouterr().out


def test_an_op_of_another_domain_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = detector()
    model.graph.node[4].op_type, model.graph.node[4].domain = "EfficientNMS_TRT", "trt.plugins"
    line = fails(["--onnx", str(saved(model, tmp_path)), "--output", str(tmp_path / "made")], capsys)
    assert "op trt.plugins:EfficientNMS_TRT (output 'a1') cannot be imported: there is no rule for it" in line


def test_all_open_inputs_are_named(tmp_path: Path) -> None:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("a", "b")]
    model = model_of([helper.make_node("Add", ["a", "b"], ["y"])], inputs, [onnx.ValueInfoProto(name="y")], [])
    with pytest.raises(UserError, match=r"open dimensions: a \[1, \?\], b \[1, \?\]; .* --input_shape a:1,... b:1,..."):
        read.read_onnx(saved(model, tmp_path))


def external(location: str, **more: str) -> Any:
    model = detector()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model


def hostile() -> dict[str, tuple[bytes, str]]:
    """Return the content of files, and words of the error."""
    good = detector().SerializeToString()
    loop, unknown, twice, no_output, damaged, huge = (detector() for _ in range(6))
    loop.graph.node[0].input[0] = "output0"
    unknown.graph.node[1].input[0] = "nowhere"
    twice.graph.node[1].output[0] = "c0"
    no_output.graph.output[0].name = "nothing"
    damaged.graph.initializer[2].dims[0] = 10**6
    huge.graph.initializer.append(numpy_helper.from_array(np.array([10**6, 10**6]), "size"))
    huge.graph.node.insert(0, helper.make_node("ConstantOfShape", ["size"], ["zeros"]))
    old, strings, negative, empty, reference = (detector() for _ in range(5))
    reference.graph.node[6].attribute[0].ref_attr_name = "other"
    old.opset_import[0].version = 4
    strings.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    negative.graph.initializer[0].dims[0] = -8
    del empty.graph.node[:]
    return {
        "empty file": (b"", "is empty"),
        "truncated": (good[: len(good) // 2], "is truncated or no ONNX file"),
        "text": (b"this is no model" * 100, "is truncated or no ONNX file"),
        "no nodes": (empty.SerializeToString(), "has 0 nodes and 1 outputs"),
        "loop": (loop.SerializeToString(), "reads 'output0', which only a later node writes: the graph has a loop"),
        "unknown name": (unknown.SerializeToString(), "reads 'nowhere', which nothing writes"),
        "written twice": (twice.SerializeToString(), "writes 'c0' a second time"),
        "unknown output": (no_output.SerializeToString(), "the output 'nothing' is written by no node"),
        "damaged tensor": (damaged.SerializeToString(), "the tensor 'w1' is damaged"),
        "negative tensor": (negative.SerializeToString(), "the tensor '/model.0/conv.weight' is damaged"),
        "huge constant": (huge.SerializeToString(), "makes [1000000, 1000000], expected at most"),
        "attribute": (reference.SerializeToString(), "an attribute of a node cannot be read"),
        "opset 4": (old.SerializeToString(), "is of opset 4, expected 7 to "),
        "strings": (strings.SerializeToString(), "the input 'images' is of element type 8"),
        "external absolute": (external("/etc/passwd").SerializeToString(), "expected a file in the folder of the model"),
        "external above": (external("../secret.bin").SerializeToString(), "expected a file in the folder of the model"),
        "external link": (external("link.bin").SerializeToString(), "expected a file in the folder of the model"),
        "external missing": (external("weights.bin").SerializeToString(), "which is missing; copy it next to the model"),
        "external nothing": (external("").SerializeToString(), "expected a file in the folder of the model"),
        "external short": (external("short.bin", length="9" * 20).SerializeToString(), "the file has 5;"),
        "external offset": (external("short.bin", offset="x").SerializeToString(), "that cannot be read"),
        "external null": (external("a\0b").SerializeToString(), "that cannot be read"),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile())
def test_a_damaged_or_hostile_file_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(8 * 3 * 3 * 3 * 4))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "short.bin").write_bytes(b"12345")
    content, words = hostile()[name]
    (folder / "model.onnx").write_bytes(content)
    line = fails(["--onnx", str(folder / "model.onnx"), "--output", str(tmp_path / "made")], capsys)
    assert words in line and str(folder / "model.onnx") in line
    assert not (tmp_path / "made").exists()


def test_weights_next_to_the_file_are_read(tmp_path: Path) -> None:
    weight = numpy_helper.to_array(detector().graph.initializer[0])
    (tmp_path / "weights.bin").write_bytes(b"1234" + weight.tobytes())
    path = saved(external("weights.bin", offset="4", length=str(weight.nbytes)), tmp_path)
    made = import_onnx(path, tmp_path / "made")
    sample = np.random.default_rng(0).random((1, 3, 16, 16), np.float32)
    (tmp_path / "whole").mkdir()
    whole = in_onnxruntime(saved(detector(), tmp_path / "whole"), {"images": sample})
    np.testing.assert_allclose(in_paddle(made.model, {"image": sample})[0], whole[0], atol=1e-5)


def test_other_files_are_no_model_and_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in fails(["--onnx", str(tmp_path / "none.onnx")], capsys)
    assert "is a folder, expected an ONNX file" in fails(["--onnx", str(tmp_path)], capsys)
    path = saved(detector(), tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    line = fails(["--onnx", str(path), "--output", str(tmp_path / "mine")], capsys)
    assert "holds thesis.txt and no import.json" in line and "choose another --output" in line
    line = fails(["--onnx", str(path), "--output", str(tmp_path / "made"), "--images", str(tmp_path / "mine")], capsys)
    assert "holds no pictures" in line


@pytest.mark.parametrize(
    "text", ["{0: 'a', 2: 'b'}", "__import__('os').system('x')", "(" * 10000, "{0: 1}", "[]", "'a'" * 400000]
)
def test_names_that_are_no_list_of_names_are_left_out(text: str, tmp_path: Path) -> None:
    model = detector()
    helper.set_model_props(model, {"names": text})
    assert read.read_onnx(saved(model, tmp_path)).class_names is None


def images_of(*shape: Any) -> Any:
    return helper.make_tensor_value_info("images", TensorProto.FLOAT, list(shape))


def imported_like_onnx_runtime(model: onnx.ModelProto, folder: Path) -> InferenceModel:
    """Import a model with an open batch of images [3, 8, 8], and compare four images of a batch with ONNX Runtime."""
    path = saved(model, folder)
    made = import_onnx(path, folder / "made")
    assert made.fixed_batch == "" and made.inputs == {"image": (-1, 3, 8, 8)}
    images = np.random.default_rng(3).random((4, 3, 8, 8), np.float32)
    single = [in_onnxruntime(path, {"images": image[None]}) for image in images]
    for index, found in enumerate(in_paddle(made.model, {"image": images})):
        np.testing.assert_allclose(found, np.concatenate([each[index] for each in single]), atol=1e-4)
    return made.model


def constant(name: str, value: Any, dtype: Any = np.float32) -> Any:
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def test_an_anchor_head(tmp_path: Path) -> None:
    """YOLOv5's: Focus (slices with steps), SPPF, nearest upsampling, and boxes decoded from three anchors a place."""
    rng = np.random.default_rng(2)
    quarters = [(0, 0), (1, 0), (0, 1), (1, 1)]
    make = helper.make_node
    nodes = [
        make("Slice", ["images", f"start{index}", "end", "axes", "steps"], [f"quarter{index}"]) for index in range(4)
    ]
    nodes += [
        make("Concat", [f"quarter{index}" for index in range(4)], ["focus"], axis=1),
        make("Conv", ["focus", "w"], ["c"], pads=[1, 1, 1, 1]),
        make("LeakyRelu", ["c"], ["a"], alpha=0.1),
        make("MaxPool", ["a"], ["p"], kernel_shape=[5, 5], pads=[2, 2, 2, 2]),
        make("Resize", ["p", "", "twice"], ["u"], mode="nearest", nearest_mode="floor",
             coordinate_transformation_mode="asymmetric"),
        make("MaxPool", ["u"], ["d"], kernel_shape=[2, 2], strides=[2, 2]),
        make("Concat", ["a", "d"], ["both"], axis=1),
        make("Conv", ["both", "head"], ["raw"]),
        make("Shape", ["raw"], ["shape"]),
        make("Gather", ["shape", "zero"], ["count"], axis=0),
        make("Unsqueeze", ["count", "front"], ["counts"]),
        make("Concat", ["counts", "rest"], ["target"], axis=0),
        make("Reshape", ["raw", "target"], ["anchored"]),
        make("Transpose", ["anchored"], ["places"], perm=[0, 1, 3, 4, 2]),
        make("Sigmoid", ["places"], ["s"]),
        make("Split", ["s", "parts"], ["xy", "wh", "scores"], axis=-1),
        make("Mul", ["xy", "two"], ["xy2"]), make("Add", ["xy2", "grid"], ["xy3"]), make("Mul", ["xy3", "stride"], ["xy4"]),
        make("Mul", ["wh", "two"], ["wh2"]), make("Pow", ["wh2", "two"], ["wh3"]), make("Mul", ["wh3", "anchors"], ["wh4"]),
        make("Concat", ["xy4", "wh4", "scores"], ["decoded"], axis=-1),
        make("Reshape", ["decoded", "flat"], ["output0"]),
    ]  # fmt: skip
    constants = [constant(f"start{index}", quarter, np.int64) for index, quarter in enumerate(quarters)]
    constants += [
        constant("end", [2**40, 2**40], np.int64), constant("axes", [2, 3], np.int64), constant("steps", [2, 2], np.int64),
        constant("w", rng.normal(size=(4, 12, 3, 3)) * 0.3), constant("twice", [1, 1, 2, 2]),
        constant("head", rng.normal(size=(21, 8, 1, 1)) * 0.3), constant("zero", 0, np.int64),
        constant("front", [0], np.int64), constant("rest", [3, 7, 4, 4], np.int64), constant("parts", [2, 2, 3], np.int64),
        constant("two", 2), constant("grid", rng.random((1, 3, 4, 4, 2))), constant("stride", 8),
        constant("anchors", rng.random((1, 3, 1, 1, 2))), constant("flat", [0, -1, 7], np.int64),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info("output0", TensorProto.FLOAT, None)]
    imported_like_onnx_runtime(model_of(nodes, [images_of("batch", 3, 8, 8)], outputs, constants), tmp_path)


def test_a_head_with_distributions(tmp_path: Path) -> None:
    """PP-YOLOE's, as paddle2onnx writes it: swish, squeeze and excitation, softmax over bins, boxes from distances."""
    rng = np.random.default_rng(4)
    make = helper.make_node
    nodes = [
        make("Conv", ["images", "w"], ["c"], pads=[1, 1, 1, 1]),
        make("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        make("Sigmoid", ["n"], ["s"]), make("Mul", ["n", "s"], ["a"]),
        make("ReduceMean", ["a"], ["mean"], axes=[2, 3], keepdims=1),
        make("Conv", ["mean", "squeeze", "squeezed"], ["e"]), make("HardSigmoid", ["e"], ["h"], alpha=1 / 6, beta=0.5),
        make("Mul", ["a", "h"], ["excited"]),
        make("Pad", ["excited", "pads"], ["padded"]),
        make("AveragePool", ["padded"], ["pooled"], kernel_shape=[3, 3], strides=[1, 1]),
        make("Conv", ["pooled", "bins", "shift"], ["raw"]),
        make("Shape", ["raw"], ["shape"]), make("Slice", ["shape", "zero", "one", "zero"], ["count"]),
        make("Concat", ["count", "rest"], ["target"], axis=0), make("Reshape", ["raw", "target"], ["binned"]),
        make("Transpose", ["binned"], ["t"], perm=[0, 2, 3, 1]), make("Softmax", ["t"], ["p"], axis=1),
        make("Conv", ["p", "project"], ["distances4"]), make("Squeeze", ["distances4", "one"], ["distances"]),
        make("Split", ["distances"], ["left", "right"], axis=-1),
        make("Sub", ["centres", "left"], ["from"]), make("Add", ["centres", "right"], ["to"]),
        make("Concat", ["from", "to"], ["boxes0"], axis=-1), make("Mul", ["boxes0", "stride"], ["boxes1"]),
        make("Shape", ["boxes1"], ["full"]), make("Expand", ["factor", "full"], ["factors"]),
        make("Div", ["boxes1", "factors"], ["boxes"]),
        make("ReduceMax", ["p"], ["best"], axes=[1, 3], keepdims=0),
    ]  # fmt: skip
    constants = [
        constant("w", rng.normal(size=(4, 3, 3, 3)) * 0.3), constant("g", rng.random(4)), constant("b", rng.random(4)),
        constant("m", rng.random(4)), constant("v", rng.random(4) + 0.5), constant("squeeze", rng.normal(size=(4, 4, 1, 1))),
        constant("squeezed", rng.random(4)), constant("pads", [0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        constant("bins", rng.normal(size=(20, 4, 1, 1))), constant("shift", rng.random(20)),
        constant("zero", [0], np.int64), constant("one", [1], np.int64), constant("rest", [4, 5, 64], np.int64),
        constant("project", np.arange(5).reshape(1, 5, 1, 1)), constant("centres", rng.random((64, 2)) * 8),
        constant("stride", [[8.0]] * 64), constant("factor", [[[2.0, 1.0, 2.0, 1.0]]]),
    ]  # fmt: skip
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("boxes", "best")]
    model = imported_like_onnx_runtime(model_of(nodes, [images_of("n", 3, 8, 8)], outputs, constants, 13), tmp_path)
    with static_mode():
        graph = StaticGraph.load(model)
        assert "batch_norm" in [op.type for op in graph.program.global_block().ops], "training needs it unfolded"
        graph.close()
    record = read_record(model.directory / "import.json", "act_pipeline.import/1")
    assert record["outputs"] == [{"name": "boxes", "shape": [-1, 64, 4]}, {"name": "best", "shape": [-1, 64]}]


needs_models = pytest.mark.skipif(not MODELS.exists(), reason="needs ../shared/models beside the repository")


@needs_models
@pytest.mark.slow
def test_a_real_yolo(tmp_path: Path) -> None:
    import cv2

    path = MODELS / "bccd_yolov8n" / "yolov8n_bccd.onnx"
    made = import_onnx(path, tmp_path / "made", images=SHARED / "data" / "bccd" / "images")
    assert made.inputs == {"image": (-1, 3, 640, 640)} and made.max_difference < 1e-4
    picture = cv2.imread(str(sorted((SHARED / "data" / "bccd" / "images").glob("*.jp*g"))[-1]))
    image = cv2.resize(picture, (640, 640))[None, :, :, ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
    (expected,) = in_onnxruntime(path, {"images": image})
    (found,) = in_paddle(made.model, {"image": np.concatenate([image, image])})
    assert np.abs(expected[:, 4:]).max() > 0.3, "it finds nothing: the test shows nothing"
    np.testing.assert_allclose(found[1:], expected, rtol=1e-4, atol=1e-4)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientvit_sam_encoder", "efficientvit_sam_decoder", "groundingdino_bccd"])
def test_models_of_open_vocabulary(name: str, tmp_path: Path) -> None:
    made = import_onnx(MODELS / "open_vocabulary" / f"{name}.onnx", tmp_path / "made")
    assert made.max_difference < 1e-4
    assert bool(made.fixed_batch) == (name == "groundingdino_bccd"), made.fixed_batch
