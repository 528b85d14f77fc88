"""Placement of Q/DQ for TensorRT: candidates, ``measure.sh`` with a stand-in for ``trtexec``, and the decision."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from placement_fixtures import GROUPS, WEIGHTS, Compressed, Device
from test_bundle_device import OPTIONS, recorded
from test_placement import Clock, groups

from act_pipeline.cli.main import main
from act_pipeline.compress.candidates import Candidates
from act_pipeline.compress.plan.on_device.foresight import Question, Recorded
from act_pipeline.compress.plan.on_device.study import ROUNDS, Study
from act_pipeline.compress.plan.placement import Placement, place
from act_pipeline.compress.plan.placement_cache import key_of
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record, write_record
from act_pipeline.engines.tensorrt.targets import VERSIONS, timing_flags
from act_pipeline.engines.tensorrt.trtexec_records import LayerTime, read_compute_ms, read_layer_times
from act_pipeline.evaluation.act_json import ActRecord
from act_pipeline.graph.model_files import inspect_model

OPS = tuple(f"conv2d_{number}.tmp_0" for number in range(4))
TIMES = (
    '[\n  { "startEnqMs" : 1, "computeMs" : 2.5, "latencyMs" : 9 }\n, { "computeMs" : 1.5 }\n, { "computeMs" : 2 }\n]\n'
)
PROFILE = '[\n  { "count" : 3 }\n, { "name" : "a + b", "timeMs" : 3, "averageMs" : 1, "percentage" : 100 }\n]\n'


# --- records of trtexec ----------------------------------------------------------------------------------------------


def test_the_median_of_the_gpus_time_is_read(tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(TIMES)
    assert read_compute_ms(tmp_path / "times.json") == 2.0
    (tmp_path / "profile.json").write_text(PROFILE)
    assert read_layer_times(tmp_path / "profile.json") == [LayerTime("a + b", 1.0)]


@pytest.mark.parametrize(
    "text",
    ["", "[", "{}", "[]", "[1]", '[{"latencyMs": 1}]', '[{"computeMs": -1}]', '[{"computeMs": NaN}]', '[{"computeMs": "2"}]',
     TIMES.replace("1.5", "inf"), "\xff", "[" * 5000],
)  # fmt: skip
def test_what_are_no_times_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "times.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"times\.json is no file of trtexec --exportTimes \(.*run measure\.sh again"):
        read_compute_ms(tmp_path / "times.json")


def test_only_what_is_damaged_is_measured_again(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "step1" / "round03"
    folder.mkdir(parents=True)
    (folder / "int8.json").write_text("[")
    (folder.parents[1] / "profile_int8.json").write_text("[")
    with pytest.raises(UserError, match=r"; where it was measured, delete step1/round03 in results/ "):
        read_compute_ms(folder / "int8.json")
    with pytest.raises(UserError, match=r"; where it was measured, delete profile_int8\.json in results/ "):
        read_layer_times(folder.parents[1] / "profile_int8.json")


@pytest.mark.parametrize("text", ["[]", '[{"count": 3}]', PROFILE.replace('"averageMs" : 1', '"averageMs" : nan'),
                                  PROFILE.replace("a + b", 'a "b" c')])  # fmt: skip
def test_what_is_no_profile_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(UserError, match=r"profile\.json is no file of trtexec --exportProfile"):
        read_layer_times(tmp_path / "profile.json")


@pytest.mark.parametrize("version", ["8.5", "8.6", "10", "11"])
def test_every_flag_of_measure_sh_is_one_of_its_trtexec(version: str) -> None:
    profile = {"image": [[1, 3, 8, 8], [8, 3, 8, 8], [8, 3, 8, 8]]}
    flags = timing_flags(VERSIONS[version], profile)
    own = {"--onnx", "--saveEngine", "--loadEngine", "--exportTimes", "--exportProfile", "--timingCacheFile"}
    given = own | {flag.split("=")[0] for flag in (*flags.build, *flags.run, *flags.profile)}
    for options in OPTIONS[version]:
        assert given <= recorded(f"options_{options}.txt"), options
    assert "--shapes=image:8x3x8x8" in flags.run and "--shapes=image:8x3x8x8" in flags.profile
    assert ("--useCudaGraph" in flags.run) == (version != "11")
    assert flags.build == (("--buildOnly",) if version == "8.5" else ("--skipInference",))
    assert not any(flag.startswith("--shapes") for flag in timing_flags(VERSIONS[version]).run)


# --- which measurements are asked for -----------------------------------------------------------------------------------


def visits(clock: Clock, *names: str) -> tuple[list[list[Question]], Placement]:
    """Return what every visit to the device measures, and the decision."""
    answers: dict[str, Mapping] = {}
    steps = []
    for _ in range(9):
        asked = Recorded(answers)
        found = place(groups(*names), asked, ["fp16"])
        if not asked.missing:
            return steps, found
        steps.append(asked.missing)
        answers.update({key_of(question): clock(question) for question in asked.missing})
    raise AssertionError("it does not end")


def test_one_visit_is_enough_where_no_group_gains() -> None:
    clock = Clock({"a": 10, "b": 8}, {"a": 40, "b": 30})
    steps, found = visits(clock, "a", "b")
    assert [[list(question) for question in step] for step in steps] == [[["all", "A", "B"], ["all", "fp16"]]]
    assert (found.verdict, found.ops) == ("int8", ())


def test_two_visits_are_enough_where_all_that_gains_gains_together() -> None:
    clock = Clock({"a": 10, "b": 8, "c": 5, "d": 5}, {"a": 40, "b": 4, "c": 1.5, "d": 2})
    steps, found = visits(clock, "a", "b", "c", "d")
    assert found.ops == ("b", "c", "d") and found.verdict == "mixed"
    assert [[list(question) for question in step] for step in steps[1:]] == [
        [["before", "after"], ["before", "after"], ["all", "placed", "fp16"]]
    ]


def test_what_is_reverted_is_never_decided_by_the_measurement_that_found_it() -> None:
    clock = Clock({"a": 10, "b": 8}, {"a": 40, "b": 4})
    steps, found = visits(clock, "a", "b")
    assert found.ops == ("b",)
    assert len(steps) == 2 and [list(question) for question in steps[1]] == [["all", "placed", "fp16"]]


def test_a_group_that_does_not_gain_in_addition_costs_a_visit_and_the_decision_is_that_of_the_planner() -> None:
    class Shared(Clock):
        def _rounds(self, of):
            if isinstance(of, str):
                return super()._rounds(of)
            return [(100 - 10 * bool(of & {"a", "b"}) - 20 * ("c" in of)) / 1000] * 15

    times = ({"a": 1, "b": 1, "c": 1, "d": 1}, {})
    steps, found = visits(Shared(*times, fp32=200), "a", "b", "c", "d")
    assert len(steps) == 3
    assert found == place(groups("a", "b", "c", "d"), Shared(*times, fp32=200), ["fp16"])
    assert set(found.ops) == {"c", "a"}


# --- the whole way --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(four_groups: Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `placement write` makes; it must not be modified."""
    folder = tmp_path_factory.mktemp("written") / "study"
    assert main(["placement", "write", "--model_path", str(four_groups.int8.directory), "--target", "t4",
                 "--batch", "2", "--output", str(folder)]) == 0  # fmt: skip
    return folder


@pytest.fixture()
def study(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "study"))


@pytest.fixture(scope="module")
def timed(written: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder after `measure.sh` on a machine where no group gains, and its calls of ``trtexec``."""
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("timed") / "study"))
    device = Device(folder.parent / "device", [300] * 4, [400] * 4)
    assert device.measure(folder).returncode == 0
    return folder, device.called


@pytest.fixture()
def measured(timed: tuple[Path, list[str]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(timed[0], tmp_path / "study"))


def read(study: Path, *more: str) -> int:
    return main(["placement", "read", str(study), "--save_dir", str(study.parent / "placed"), *more])


def placed_of(study: Path) -> ActRecord:
    return ActRecord.from_json(read_record(study.parent / "placed" / "act.json", "act_pipeline.act/1"))


def in_int8(path: Path) -> list[int]:
    """Return the numbers of the convolutions of an ONNX file whose weights are in INT8."""
    content = path.read_bytes()
    return [number for number, name in enumerate(WEIGHTS) if f"{name}.int8".encode() in content]


def test_a_candidate_has_one_group_in_float(written: Path) -> None:
    found = Study.load(written)
    assert tuple(group.name for group in found.groups) == GROUPS and found.ops == 4
    assert {name: in_int8(written / "candidates" / f"{name}.onnx") for name in found.candidates} == {
        "int8": [0, 1, 2, 3], "fp16": [], "group01": [1, 2, 3], "group02": [0, 2, 3], "group03": [0, 1, 3],
        "group04": [0, 1, 2],
    }  # fmt: skip
    assert sorted(path.name for path in (written / "candidates").iterdir()) == sorted(
        f"{name}.onnx" for name in found.candidates
    )
    assert str(written.parent) not in (written / "measure.sh").read_text()


def test_ops_that_are_faster_in_float_are_reverted(
    four_groups: Compressed,
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """The first and the last convolution are: the second visit to the device measures both together."""
    device = Device(tmp_path / "device", [300, 100, 100, 200], [100, 400, 400, 100])
    assert read(study) == 2
    assert "machine.txt is missing: run measure.sh of" in capsys.readouterr().err
    assert device.measure(study).returncode == 0
    capsys.readouterr()
    assert read(study) == 4
    printed = capsys.readouterr()
    assert "not decided yet: ops gain by themselves, so that 4 models have to be timed in turns" in printed.out
    assert f"deploy/placement.py read {study} --save_dir {study.parent / 'placed'}\n" in printed.out
    assert not (tmp_path / "placed").exists()
    before = len(device.called)
    assert device.measure(study).returncode == 0
    calls = [call for call in device.called[before:] if "--onnx" in call]
    assert len(calls) == 1 and "mixed07.onnx" in calls[0], "engines are built once"
    assert read(study) == 0
    printed = capsys.readouterr()
    assert (
        "placement: mixed: 2 of 4 ops in float, since TensorRT 10.3.0 computes them sooner so on Tesla T4"
        in printed.out
    )
    assert "2 images in ms, in turns: INT8 everywhere 1.700, as saved 1.400, FP16 2.000" in printed.out
    assert (
        "layers, all in INT8: 2 in 4.000 ms, 25% of it conversions; slowest: conv2d_0.tmp_0 + relu 3.000" in printed.out
    )
    assert "mAP 1.0000, +0.0000 against the float model" in printed.out
    act = placed_of(study)
    assert act.placement is not None and act.placement.verdict == "mixed"
    assert (act.placement.engine, act.placement.device) == ("TensorRT 10.3.0", "Tesla T4, 570.86.15")
    assert set(act.placement.reverted) == {OPS[0], OPS[3]} and act.placement.batch == 2
    assert act.placement.gains[GROUPS[0]] == pytest.approx(1700 / 1500 - 1, abs=1e-4)
    assert act.quantized_ops == {"conv2d": 2} and {op.output for op in act.kept_ops} == {OPS[0], OPS[3]}
    assert act.kept_ops[0].reason == "faster in float in TensorRT 10.3.0"
    assert [step.chosen for step in act.steps] == [False, True] and act.chosen == "ptq:mse, placed"
    assert act.int8.map == 1.0 and act.evaluation.images == 8 and act.evaluation.engine == "openvino"
    model = InferenceModel.load(tmp_path / "placed")
    assert act.model_hash == model.content_hash()
    assert inspect_model(model).op_counts["quantize_linear"] == 2
    assert (
        main(
            ["onnx", "--model_path", str(model.directory), "--target", "tensorrt", "--output", str(tmp_path / "m.onnx")]
        )
        == 0
    )
    assert in_int8(tmp_path / "m.onnx") == [1, 2]
    assert main(["report", "--model_path", str(model.directory), "--reader_config", str(four_groups.reader)]) == 0
    page = re.sub("<[^>]*>", "", (tmp_path / "placed" / "report.html").read_text(encoding="utf-8"))
    assert "2 of 4 ops are in float, since TensorRT 10.3.0 computes them sooner so on Tesla T4, 570.86.15." in page
    assert "2 images take 1.400 ms, 1.700 ms with all ops in INT8, and 2.000 ms in FP16." in page


def test_one_visit_decides_where_no_group_gains(measured: Path, capsys: pytest.CaptureFixture) -> None:
    assert read(measured) == 0
    line = "INT8 everywhere: no op is worth reverting in TensorRT 10.3.0 on Tesla T4, 570.86.15"
    assert f"placement: {line}" in capsys.readouterr().out
    act = placed_of(measured)
    assert act.placement is not None and not act.placement.reverted and act.chosen == "ptq:mse"
    original = Study.load(measured).model
    placed = InferenceModel.load(measured.parent / "placed")
    assert placed.content_hash() == original.content_hash() == act.model_hash
    assert act.int8.map == 1.0


def test_fp16_is_shipped_where_int8_is_not_faster(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert Device(tmp_path / "device", [300] * 4, [302] * 4).measure(study).returncode == 0
    assert read(study) == 0
    assert "ship FP16: INT8 is not faster in TensorRT 10.3.0 on Tesla T4, 570.86.15" in capsys.readouterr().out
    found = placed_of(study).placement
    assert found is not None and (found.verdict, found.float_precision) == ("float", "fp16")


def test_where_the_data_are_missing_the_accuracy_is_said_to_be_unknown(
    four_groups: Compressed,
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch,
) -> None:
    device = Device(tmp_path / "device", [300, 100, 100, 100], [100, 400, 400, 400])
    device.measure(study)
    assert read(study) == 4
    device.measure(study)
    copy = Path(shutil.copytree(four_groups.int8.directory, tmp_path / "int8"))
    record = read_record(copy / "act.json", "act_pipeline.act/1")
    record["config"]["Global"]["reader_config"] = str(tmp_path / "none.yml")
    write_record(copy / "act.json", "act_pipeline.act/1", record)
    content = json.loads((study / "placement.json").read_text())
    content["model"]["directory"] = str(copy)
    (study / "placement.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert read(study) == 0
    printed = capsys.readouterr()
    assert "its accuracy is not known (" in printed.out and "none.yml" in printed.out and "mAP" not in printed.out
    act = placed_of(study)
    assert act.int8.map is None and act.map_drop is None and act.evaluation.images == 0
    assert act.quantized_ops == {"conv2d": 3}
    shutil.rmtree(tmp_path / "placed")
    assert read(study, "--reader_config", str(tmp_path / "none.yml")) == 2
    assert not (tmp_path / "placed").exists()


def test_a_model_that_is_not_within_the_limits_stays_in_int8(
    four_groups: Compressed, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    """The candidate with the faster op in float is made to lose all of its mAP."""
    device = Device(tmp_path / "device", [300, 100, 100, 100], [100, 400, 400, 400])
    assert device.measure(study).returncode == 0 and read(study) == 4
    assert device.measure(study).returncode == 0
    monkeypatch.setattr(Candidates, "meets", lambda self, candidate: "placed" not in candidate.name)
    assert read(study) == 0
    printed = capsys.readouterr()
    assert "the model with the faster ops in float is not within the limits; all stay in INT8" in printed.err
    assert "placement: INT8 everywhere" in printed.out
    act = placed_of(study)
    assert act.placement is not None and (act.placement.verdict, list(act.placement.reverted)) == ("int8", [])
    assert act.placement.latency_ms["placed"] == act.placement.latency_ms["all"] == pytest.approx(1.6)
    assert [(step.name, step.chosen) for step in act.steps] == [("ptq:mse", True), ("ptq:mse, placed", False)]
    assert act.quantized_ops == {"conv2d": 4} and act.int8.map == 1.0 and act.latency is not None
    assert InferenceModel.load(tmp_path / "placed").content_hash() == four_groups.int8.content_hash()


def test_candidates_of_two_versions_of_the_export_are_not_mixed(study: Path, tmp_path: Path, capsys) -> None:
    Device(tmp_path / "device", [300, 100, 100, 100], [100, 400, 400, 400]).measure(study)
    content = json.loads((study / "placement.json").read_text())
    content["of"]["export"] = "sha256:other"
    (study / "placement.json").write_text(json.dumps(content))
    assert read(study) == 2 and "was written by another version of this package" in capsys.readouterr().err


def test_an_interrupted_measurement_goes_on(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a round that was cut, all is measured again."""
    device = Device(tmp_path / "device", [300] * 4, [400] * 4)
    device.calls = 6 + 6 + 4  # the engines, a round, most of the second round
    ended = device.measure(study)
    assert ended.returncode == 1
    assert "error: trtexec cannot time" in ended.stderr and "[E] Error[1]: out of memory; see logs/" in ended.stderr
    assert sorted(path.name for path in (study / "results" / "step1").iterdir()) == ["round01", "round02.part"]
    assert read(study) == 2
    error = capsys.readouterr().err
    assert f"step1 has 1 of {ROUNDS} rounds: run measure.sh of" in error and error.count("\n") == 1
    device.calls = None
    before = len(device.called)
    assert device.measure(study).returncode == 0
    assert len(device.called) - before == 6 * (ROUNDS - 1) + 2
    before = len(device.called)
    assert device.measure(study).returncode == 0 and len(device.called) == before


def test_every_round_times_each_engine_once_and_the_order_changes(timed: tuple[Path, list[str]]) -> None:
    calls = timed[1]
    order = [call.split()[0].split("/")[1] for call in calls if "--exportTimes" in call]
    turns = [tuple(order[start : start + 6]) for start in range(0, len(order), 6)]
    assert len(turns) == ROUNDS and all(len(set(turn)) == 6 for turn in turns) and len(set(turns)) > 1
    built = [call for call in calls if "--onnx" in call]
    assert all("--stronglyTyped" in call and "--timingCacheFile=engines/timing.cache" in call for call in built)
    assert all("--useCudaGraph --noDataTransfers" in call for call in calls if "--exportTimes" in call)


def test_another_machine_is_refused(study: Path, tmp_path: Path) -> None:
    device = Device(tmp_path / "device", [300] * 4, [400] * 4)
    device.calls = 3
    device.measure(study)
    for name, value in (("gpu", "NVIDIA A10, 570.86.15"), ("version", "101300")):
        other = Device(tmp_path / name, [300] * 4, [400] * 4)
        setattr(other, name, value)
        ended = other.measure(study)
        assert ended.returncode == 2 and not other.called
        assert ended.stderr.startswith("error: results/ and engines/ are of another machine")
        assert "Tesla T4" in ended.stderr and ended.stderr.count("\n") == 1
    device.version = "8602"
    ended = device.measure(study)
    assert ended.returncode == 2 and "these candidates are for TensorRT 10, here is TensorRT 8.6" in ended.stderr


@pytest.mark.parametrize("damage", ["times", "profile", "machine", "version", "a file", "placement", "steps", "names"])
def test_malformed_records_are_one_line(measured: Path, tmp_path: Path, capsys, damage: str) -> None:
    results, record = measured / "results", measured / "placement.json"
    if damage == "times":
        (results / "step1" / "round05" / "group02.json").write_text("[")
    elif damage == "profile":
        (results / "profile_int8.json").write_text("[]")
    elif damage == "machine":
        (results / "machine.txt").write_text("Tesla T4\n")
    elif damage == "version":
        (results / "machine.txt").write_text("trtexec 8502\ngpu x\n")
    elif damage == "a file":
        (results / "step1" / "round05" / "int8.json").unlink()
    elif damage == "placement":
        record.write_text("{")
    else:
        content = json.loads(record.read_text())
        if damage == "steps":
            content["steps"] = [[{"all": "other"}]]
        else:
            content["candidates"]["a; rm"] = []
        record.write_text(json.dumps(content))
    capsys.readouterr()
    assert read(measured) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert not (tmp_path / "placed").exists()


def test_what_was_measured_holds_for_other_weights_of_the_same_ops(
    four_groups: Compressed,
    measured: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """A changed model is refused until `write` has put it in the place of the other."""
    copy = Path(shutil.copytree(four_groups.int8.directory, tmp_path / "int8"))
    with open(copy / "model.pdiparams", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    content = json.loads((measured / "placement.json").read_text())
    content["model"]["directory"] = str(copy)
    (measured / "placement.json").write_text(json.dumps(content))
    assert read(measured) == 2 and "int8 has changed since the candidates were written" in capsys.readouterr().err
    write = ["placement", "write", "--model_path", str(copy), "--target", "t4", "--output", str(measured)]
    assert main([*write, "--batch", "4"]) == 2
    assert "is a placement of something else (batch 2 and not 4)" in capsys.readouterr().err
    assert main([*write, "--batch", "2"]) == 0
    assert "what was measured there holds for this model too" in capsys.readouterr().out
    assert read(measured) == 0 and "INT8 everywhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "cpu"], "--target=cpu has no trtexec .*Strategy.placement: measured places Q/DQ for CPUs"),
        (["--target", "rtx"], "--target=rtx has no trtexec to time candidates with, expected t4, a10, orin or xavier"),
        (["--target", "nano"], "NVIDIA|Jetson Nano .* has no INT8"),
        (["--target", "t4", "--tensorrt", "9"], "--tensorrt is '9', but NVIDIA T4 has 10, 11, 8.6, 8.5"),
        (["--target", "t4", "--float_model_path", "INT8"], "is not the float model that .* was made from"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    four_groups: Compressed,
    tmp_path: Path,
    capsys,
    flags: list[str],
    words: str,
) -> None:
    flags = [str(four_groups.int8.directory) if flag == "INT8" else flag for flag in flags]
    command = ["placement", "write", "--model_path", str(four_groups.int8.directory), "--output", str(tmp_path / "s")]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
    assert not (tmp_path / "s").exists()
