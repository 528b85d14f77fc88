"""A short run of each fuzz target with fixed examples, and one test for each error that fuzzing found."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from inference_fixtures import export_tiny_model, make_tiny_data

from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.qat.resume.checkpoints import CHECKPOINT_SCHEMA, Checkpoints, Snapshot
from act_pipeline.compress.qat.resume.training_checkpoint import TrainingCheckpoint
from act_pipeline.compress.qat.state import read_random_states
from act_pipeline.compress.qat.training import Training
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.downloads import fetch, is_url
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import read_record
from act_pipeline.core.yaml_files import resolve_path
from act_pipeline.data import Reader
from act_pipeline.data.annotations import Annotations
from act_pipeline.engines.onnx_runtimes.onnx_files import inspect_onnx
from act_pipeline.engines.paddle.dynamic_shape import SCHEMA, ShapeKey, stale_reason
from act_pipeline.evaluation import load_detections
from act_pipeline.graph import model_files
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.inference.picture import class_names
from tests.fuzz.harness import Target, check
from tests.fuzz.targets import TARGETS
from tests.fuzz.targets.infer_cfg import _NoData
from tests.fuzz.targets.onnx_file import _model

# Fewer for the targets that are slowest per example.
EXAMPLES = {
    "paddle_model": 10, "reader": 30, "config": 20, "detections": 15, "onnx_import": 30,
    "live.json": 40, "version.json": 40, "counters.json": 15, "audit.jsonl": 15, "rules": 40,
}  # fmt: skip
# Of each target, with examples drawn anew; 0: the same examples each time.
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_target_finds_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 100),
        derandomize=not SECONDS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(target.examples(tmp_path))
    def read(example: object) -> None:
        check(target, tmp_path, example)

    end = time.monotonic() + SECONDS
    read()
    while time.monotonic() < end:
        read()


# Errors that the harness must detect.


def _write_outside(folder: Path, example: Path) -> None:
    example.write_text("x")


def _start_a_process(folder: Path, example: Path) -> None:
    try:
        os.system("true")
    except BaseException:
        raise UserError("it did not work") from None


def _two_lines(folder: Path, example: Path) -> None:
    class TwoLines(UserError):
        def __str__(self) -> str:
            return "one\ntwo"

    raise TwoLines


def _never_end(folder: Path, example: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize("read", [_write_outside, _start_a_process, _two_lines, _never_end])
def test_the_harness_sees_what_no_reading_does(read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness.SECONDS_AN_EXAMPLE", 0.2)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    with pytest.raises(AssertionError):
        check(Target("x", lambda folder: None, read), inside, outside)
    assert not outside.exists()
    check(Target("x", lambda folder: None, _write_outside), inside, inside / "file")


# Errors found by the targets.


def _refused(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_error_that_quotes_lines_is_one_line() -> None:
    assert str(UserError("a\nb\u2028c  d")) == "a b c d"


@pytest.mark.parametrize("path", ["~nobody_of_this_name/x", "a" * 300, "a\0b", "\ud800"])
def test_a_path_that_no_file_can_have_is_given_back(path: str, tmp_path: Path) -> None:
    assert resolve_path(path, tmp_path / "config.yml") == Path(path)


def test_a_file_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 300)
    assert "too long" in _refused(Annotations.load, path, "reader.yml")
    assert "too long" in _refused(load_config, path)
    assert "too long" in _refused(read_record, path, "x/1")
    assert run_command(lambda argv: InferenceModel.load(path) and 0) == 2


def test_a_schedule_that_fails_on_its_arguments_is_refused(tmp_path: Path) -> None:
    sample = Path(__file__).resolve().parents[1] / "configs" / "sample_qat_dis.yml"
    arguments = "{type: PiecewiseDecay, boundaries: [1], values: 3, last_epoch: 0}"
    assert "PiecewiseDecay" in _refused(load_config, sample, [f"TrainConfig.learning_rate={arguments}"])


@pytest.mark.parametrize(
    "step",
    ["DecodeCache: {cache_root: cache}", "DebugVisibleImage: {output_dir: out}", "VisibleRBox: {output_dir: out}"],
)
def test_transforms_that_write_or_unpickle_are_refused(step: str, tmp_path: Path) -> None:
    make_tiny_data(tmp_path)
    reader = tmp_path / "reader.yml"
    first, second = (
        (step, "Permute: {}")
        if step.startswith("Decode")
        else ("Decode: {}", step.replace("out", str(tmp_path / "out")))
    )
    reader.write_text(
        f"EvalDataset: !COCODataSet {{anno_path: {tmp_path}/annotations.json, image_dir: {tmp_path}/images}}\n"
        f"EvalReader:\n  sample_transforms:\n  - {first}\n  - {second}\n"
    )
    assert "no transform" in _refused(Reader.load(reader).check, "eval")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]"])
def test_a_record_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "act.json").write_bytes(content)
    assert "act.json" in _refused(read_record, tmp_path / "act.json", "x/1")
    _refused(read_record, tmp_path, "x/1")


@pytest.mark.parametrize("number", ["Infinity", "1e999", "[" * 100_000, "{}", "null"])
def test_a_damaged_record_of_shapes_is_a_reason_to_collect_anew(number: str, tmp_path: Path) -> None:
    (tmp_path / "dynamic_shape.txt").write_text("")
    (tmp_path / "dynamic_shape.json").write_text(
        f'{{"schema": "{SCHEMA}", "model_hash": "", "input_size": [{number}, 1], "max_batch_size": 1, "paddle": "", '
        '"shapes_hash": ""}'
    )
    assert "damaged" in stale_reason(InferenceModel(tmp_path), ShapeKey("", (1, 1), 1, ""))


def test_another_version_of_paddle_in_a_record_of_shapes_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "dynamic_shape.txt").write_text("")
    record = {"schema": SCHEMA, "model_hash": "", "input_size": [1, 1], "max_batch_size": 1, "shapes_hash": ""}
    (tmp_path / "dynamic_shape.json").write_text(json.dumps({**record, "paddle": "2.5\n.2"}))
    reason = stale_reason(InferenceModel(tmp_path), ShapeKey("", (1, 1), 1, "2.6.2"))
    assert "Paddle '2.5\\n.2', this is '2.6.2'" in reason and len(reason.splitlines()) == 1


def test_an_infer_cfg_is_read_as_every_other_yaml_file(tmp_path: Path) -> None:
    (tmp_path / "infer_cfg.yml").write_text("a: " + "[" * 2000)
    assert "infer_cfg.yml" in _refused(InferenceModel(tmp_path).infer_cfg)
    (tmp_path / "infer_cfg.yml").write_text("a: !!python/name:os.system\n")
    assert "tag" in _refused(InferenceModel(tmp_path).infer_cfg)
    (tmp_path / "infer_cfg.yml").write_text("label_list: 3\n")
    assert class_names(_NoData(), InferenceModel(tmp_path)) == []


def test_detections_that_unpack_to_more_than_any_evaluation_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("act_pipeline.evaluation.detections_file.MAX_DETECTION_BYTES", 1000)
    np.savez_compressed(tmp_path / "detections.npz", fp32=np.zeros((10_000, 7), np.float32))
    assert "unpacks to" in _refused(load_detections, tmp_path / "detections.npz")


def test_detections_packed_in_a_way_that_zipfile_does_not_know(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("fp32.npy", b"x")
    content = buffer.getvalue()
    at = content.index(b"PK\x01\x02") + 10
    (tmp_path / "detections.npz").write_bytes(content[:at] + b"\x63\x00" + content[at + 2 :])
    assert "holds no detections" in _refused(load_detections, tmp_path / "detections.npz")


@pytest.mark.parametrize(
    "changes", [{"best": 3}, {"best": [1]}, {"best": [1, "x"]}, {"iteration": float("inf")}, {"iteration": None}]
)
def test_a_checkpoint_whose_progress_is_none(changes: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "variables.npz", w=np.ones(1))
    assert "damaged" in _not_resumed(tmp_path, changes)


def test_a_checkpoint_that_holds_more_than_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "variables.npz", "w") as archive:
        archive.writestr("w.npy", b"no array")
    assert "more than arrays" in _not_resumed(tmp_path, {})


def _not_resumed(folder: Path, changes: dict) -> str:
    """Return the message for a checkpoint with the ``variables.npz`` in ``folder`` and modified progress."""
    directory = folder / "int8.checkpoint"
    (directory / "best").mkdir(parents=True)
    (folder / "variables.npz").rename(directory / "variables.npz")
    record = {
        "schema": CHECKPOINT_SCHEMA,
        "identity": {},
        "progress": {**Training(None, OpInventory({}, []), 1).progress(), **changes},
        "variables_hash": hash_files([directory / "variables.npz"]),
    }
    (directory / "checkpoint.json").write_text(json.dumps(record))

    def resume() -> None:
        with Checkpoints(folder / "int8", {}, 1).open(resume=True):
            pass

    return _refused(resume)


def test_a_checkpoint_whose_schedule_lacks_a_key() -> None:
    import paddle

    keeper = TrainingCheckpoint.__new__(TrainingCheckpoint)
    keeper._training, keeper._learning_rate = Training(None, OpInventory({}, [])), paddle.optimizer.lr.StepDecay(0.1, 5)
    more = {"seconds": 0.0, "random": read_random_states(), "scheduler": {"last_lr": 0.1}}
    progress = {**keeper._training.progress(), **more}

    def take_up() -> None:
        keeper._take_up(Snapshot(progress, {}), lambda error: UserError(f"damaged: {error}"), paddle.CPUPlace())

    assert "damaged" in _refused(take_up) and "last_epoch" in _refused(take_up)


def test_a_program_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    from paddle.base.proto import framework_pb2

    model = export_tiny_model(tmp_path / "model", quantized=True)
    whole = model.model_path.read_bytes()

    def refused(change) -> str:
        program = framework_pb2.ProgramDesc.FromString(whole)
        change(program.blocks[0])
        model.model_path.write_bytes(program.SerializePartialToString())
        return _refused(model_files.inspect_model, model)

    feed = [op.type for op in framework_pb2.ProgramDesc.FromString(whole).blocks[0].ops].index("feed")
    assert "contradicts" in refused(lambda block: block.ops[feed].ClearField("outputs"))
    assert "contradicts" in refused(lambda block: block.ops[feed].outputs[0].arguments.__setitem__(0, "nothing"))


@pytest.mark.parametrize(("kind", "column"), [("feed", -1), ("feed", 2**31 - 1), ("feed", 1), ("fetch", 7)])
def test_a_program_whose_inputs_or_outputs_are_misnumbered_is_refused(kind: str, column: int, tmp_path: Path) -> None:
    from paddle.base.proto import framework_pb2

    model = export_tiny_model(tmp_path / "model", quantized=True)
    program = framework_pb2.ProgramDesc.FromString(model.model_path.read_bytes())
    op = next(op for op in program.blocks[0].ops if op.type == kind)
    next(attribute for attribute in op.attrs if attribute.name == "col").i = column
    model.model_path.write_bytes(program.SerializeToString())
    message = _refused(model_files.inspect_model, model)
    assert f"numbers its {'input' if kind == 'feed' else 'output'}s" in message and str(column) in message


def test_a_program_with_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    model = export_tiny_model(tmp_path / "model", quantized=True)
    whole = model.model_path.read_bytes()
    for name in (b"concat", b"image"):
        assert whole.count(name)
        model.model_path.write_bytes(whole.replace(name, b"\xff" + name[1:]))
        assert "a name is no text" in _refused(model_files.inspect_model, model)


def test_what_feeds_a_program_is_no_parameter_whatever_its_name(tmp_path: Path) -> None:
    from paddle.base.proto import framework_pb2

    model = export_tiny_model(tmp_path / "model", quantized=True)
    program = framework_pb2.ProgramDesc.FromString(model.model_path.read_bytes())
    next(variable for variable in program.blocks[0].vars if variable.name == "feed").name = "nothing"
    model.model_path.write_bytes(program.SerializeToString())
    with static_mode():
        graph = StaticGraph.load(model)
        assert graph.is_parameter("w") and not graph.is_parameter("nothing") and not graph.is_parameter("fetch")


def test_an_onnx_file_whose_constants_contradict_themselves_is_refused(tmp_path: Path) -> None:
    def refused(change) -> str:
        model = _model()
        change(model.graph.node)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        return _refused(inspect_onnx, OnnxModel(tmp_path / "model.onnx"))

    def elsewhere(nodes) -> None:
        zero = nodes[0].attribute[0].t
        zero.data_location = 1
        zero.external_data.add(key="location", value="/etc/passwd")

    assert "no ONNX file" in refused(lambda nodes: nodes[0].attribute[0].t.ClearField("raw_data"))
    assert "no ONNX file" in refused(elsewhere)


@pytest.mark.parametrize(
    "url",
    [
        "http://[/model.pdparams",
        "http://h/..",
        "http://h/.hidden",
        f"http://h/{'a' * 300}",
        "http://h/a b",
        "http://h/m#sha265=00",
        "http://h/m#sha256=00",
        "http://h/a\0b",
    ],
)
def test_an_address_that_names_no_file_is_refused_before_anything_is_asked(
    url: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path))
    assert is_url(url)
    _refused(fetch, url, False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["sample_transforms", "batch_transforms"])
def test_a_transform_that_gives_no_sample_is_refused(place: str, tmp_path: Path) -> None:
    make_tiny_data(tmp_path)
    steps = {
        "sample_transforms": "[{Decode: {}}, {Resize: {target_size: 32, keep_ratio: False}}, {Permute: {}}",
        "batch_transforms": "[",
    }
    steps[place] += f"{',' if place.startswith('sample') else ''} {{MOTRandomAffine: {{}}}}"
    reader = tmp_path / "reader.yml"
    reader.write_text(
        f"EvalDataset: !COCODataSet {{anno_path: {tmp_path}/annotations.json, image_dir: {tmp_path}/images}}\n"
        f"EvalReader: {{sample_transforms: {steps['sample_transforms']}],\n"
        f"  batch_transforms: {steps['batch_transforms']}]}}\n"
    )
    assert "MOTRandomAffine gives" in _refused(Reader.load(reader).check, "eval")


@pytest.mark.parametrize("value", ["!!float ''", "!!int ''", "!!bool maybe", "!!int " + "9" * 5000])
def test_a_value_that_is_not_of_the_kind_of_its_tag_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text(f"Global: {value}\n")
    assert "no YAML" in _refused(load_config, tmp_path / "config.yml")


@pytest.mark.parametrize("setting", [f"TrainConfig.train_iter={10**30}", f"Strategy.max_drop={10**400}"])
def test_a_number_larger_than_arrays_hold_is_refused(setting: str) -> None:
    sample = Path(__file__).parents[1] / "configs" / "sample_qat_dis.yml"
    assert setting.split("=")[0] in _refused(load_config, sample, [setting])


def test_a_data_set_whose_kind_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reader.yml").write_text("EvalDataset: {name: {}}\n")
    assert "is of the kind" in _refused(Reader.load, tmp_path / "reader.yml")
