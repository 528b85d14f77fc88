"""Ops that stay float by default are taken back where INT8 costs little, and only there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from inference_fixtures import write_reader
from sam_fixtures import SIZE, make_data, make_pair

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.compress import compress
from act_pipeline.compress.accuracy_control.take_back import spare_ops, take_back
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_inventory import OpInventory
from act_pipeline.compress.plan.op_selection import Selection, mark_float, select
from act_pipeline.compress.ptq.quantizer import Calibration, PostTraining
from act_pipeline.compress.result.candidate_details import CalibrationDetails, CandidateDetails, taken_back_lines
from act_pipeline.compress.result.outcome import Measured
from act_pipeline.compress.result.summary import compression_table
from act_pipeline.config import Quantize, load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.graph.float_by_default import DISTRIBUTION, LINEAR_ATTENTION, NO_MATRIX, SIMILARITY
from act_pipeline.graph.folding import fold, save_folded
from act_pipeline.graph.quantizable_ops import QuantizableOp, quantizable_ops
from act_pipeline.graph.static_graph import static_mode

OPS = tuple(QuantizableOp(name, "matmul_v2", f"m.{name}", "model", (f"{name}.x",), None, -1) for name in "abcde")
REASONS = {"a": LINEAR_ATTENTION, "b": SIMILARITY, "c": LINEAR_ATTENTION, "d": NO_MATRIX}


def selected(**quantize: Any) -> Selection:
    return select(OPS, Quantize(**quantize), Path("c.yml"), REASONS)


@pytest.mark.parametrize(
    ("quantize", "spare"),
    [
        ({}, "abc"),
        ({"exclude": ["m.a"]}, "bc"),
        ({"weight_only": ["b"]}, "ac"),
        ({"include": ["a", "e"]}, ""),
    ],
)
def test_what_the_config_names_is_not_tried(quantize: dict[str, list[str]], spare: str) -> None:
    assert sorted(spare_ops(selected(**quantize))) == sorted(spare)


def test_a_selection_forgets_what_was_taken_back() -> None:
    found = selected(exclude=["b"]).take_back(["a"])
    assert found.int8 == ["a", "e"] and found.by_default == ("c", "d")
    assert found.revert_to_float(["e"], "too hard").by_default == ("c", "d")


class Trials:
    """A job and a calibration whose INT8 models only have a change on the held-out images and a verdict.

    Attributes:
        tried: the ops in INT8 of each model that was tried.
        lines: what was printed.
        added: the candidates that were evaluated.
    """

    def __init__(self, work: Path, changes: dict[str, float | None]) -> None:
        self.tried: list[str] = []
        self.lines: list[str] = []
        self.added: list[Candidate] = []
        self.work = work
        self.folder = lambda name: Job.folder(self, name)  # type: ignore[arg-type]
        self.say = self.lines.append
        self.held_out = SimpleNamespace(feeds=[{}] * 30, change=lambda model: self._change(changes))

    def write(self, folder: Path, algo: str, taken_back: list[str]) -> Calibration:
        self.tried.append("".join(taken_back))
        return Calibration(InferenceModel(folder), OpInventory({}, []), 4, {})

    def _change(self, changes: dict[str, float | None]) -> float:
        found = changes[self.tried[-1]]
        if found is None:
            raise UserError("the boxes are not finite")
        return found

    def run(self, meets: bool = True) -> Candidate:
        def add(candidate: Candidate) -> Candidate:
            self.added.append(candidate)
            return candidate

        calibration = CalibrationDetails("avg", None, 4, 4, 0, True, 0, [])
        without = Candidate(
            "ptq:avg", "ptq", InferenceModel(self.work), None, selected(), OpInventory({}, []),
            CandidateDetails(calibration),
        )  # fmt: skip
        self.without = without
        tried = SimpleNamespace(add=add, meets=lambda candidate: meets)
        job: Any = SimpleNamespace(folder=self.folder, say=self.say, held_out=self.held_out, tried=tried)
        return take_back(job, without, self, "avg", 0.10, 0.115)  # type: ignore[arg-type]


def test_groups_are_tried_one_after_another_and_kept_within_what_is_allowed(tmp_path: Path) -> None:
    trials = Trials(tmp_path, {"ac": 0.115, "acb": 0.116})
    found = trials.run()
    assert trials.tried == ["ac", "acb"] and trials.added == [found]
    assert found.selection.int8 == ["a", "c", "e"] and found.selection.kept["d"] == NO_MATRIX
    assert found.model.directory.exists() and len(list(tmp_path.iterdir())) == 1  # the other one was removed
    details = found.details.as_json()["taken_back"]
    assert [(group["ops"], group["change"], group["taken"]) for group in details["groups"]] == [
        (["a", "c"], 0.115, True),
        (["b"], 0.116, False),
    ]
    assert details["within_limits"] is True and details["images"] == 30
    first, second = trials.lines
    assert "linear attention (2 ops)" in first and first.endswith("0.1150 (without: 0.1000, allowed: 0.1150): INT8")
    assert "similarities that are scores (1 op)" in second and second.endswith("): stays float")
    assert taken_back_lines(details) == trials.lines


@pytest.mark.parametrize(
    ("changes", "meets", "added", "verdict"),
    [
        ({"ac": 0.12, "b": 0.12}, True, 0, None),  # no group is worth it: nothing more is evaluated
        ({"ac": None, "b": 0.12}, True, 0, None),  # it does not even run
        ({"ac": 0.10, "acb": 0.10}, False, 1, False),  # held-out images are content, the limits are not
    ],
)
def test_the_result_is_never_worse_than_without(
    changes: dict[str, float | None], meets: bool, added: int, verdict: bool | None, tmp_path: Path
) -> None:
    trials = Trials(tmp_path, changes)
    found = trials.run(meets)
    assert found is trials.without and len(trials.added) == added
    assert set(found.selection.kept) == set("abcd")
    details = found.details.as_json()["taken_back"]
    assert details["within_limits"] is verdict and len(taken_back_lines(details)) == 2 + added


@pytest.fixture
def decoder(tmp_path: Path) -> InferenceModel:
    return make_pair(tmp_path / "models")[1]


def config_of(model: InferenceModel, folder: Path) -> Path:
    data = make_data(folder / "data").parent
    path = folder / "config.yml"
    path.write_text(
        f"Global: {{reader_config: {write_reader(data / 'reader.yml', data, size=SIZE)}, "
        f"model_dir: {model.directory}}}\nStrategy: {{name: auto, max_drop: 0.1}}\nQuantPost: {{calib_images: 4}}\n",
        encoding="utf-8",
    )
    return path


def test_auto_takes_back_what_costs_nothing(
    decoder: InferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decoder's masks hardly change in INT8, so that the default is given up that its first convolution has here."""
    monkeypatch.setattr(
        "act_pipeline.compress.pipeline.float_by_default", lambda graph, ops: {ops[0].name: DISTRIBUTION}
    )
    monkeypatch.setattr(
        "act_pipeline.compress.calibrating._compare", lambda job, post, algorithms=None: {"avg": 0.1, "mse": 0.2}
    )
    monkeypatch.setattr("act_pipeline.compress.pipeline.measure_chosen", lambda *chosen: Measured())
    config = load_config(config_of(decoder, tmp_path))
    record = compress(config, tmp_path / "int8", "CPU", progress=True).record
    line = "float by default: mean of a distribution (DFL) (1 op): in INT8 the detections"
    assert line in capsys.readouterr().err and line in compression_table(record)
    assert [step["name"] for step in record["steps"]] == ["ptq:avg", "ptq:avg, 1 taken back"]
    assert [step["quantized"] for step in record["steps"]] == [1, 2]
    assert record["chosen"] == "ptq:avg, 1 taken back" and record["quantized_ops"] == {"conv2d": 2}
    assert record["kept_ops"] == [] and record["taken_back"]["groups"][0]["taken"]
    assert record["taken_back"]["allowed"] == pytest.approx(0.115) and record["seconds"]["take_back"] > 0


def test_spare_ops_change_no_model_until_they_are_taken_back(decoder: InferenceModel, tmp_path: Path) -> None:
    """Without them, the model is that of a calibration that knows of no spare ops; with them, of one without defaults."""
    config = load_config(config_of(decoder, tmp_path))
    rng = np.random.default_rng(0)
    box = np.array([[[8, 6, 40, 22]]], np.float32)
    feeds = [{"image_embeddings": rng.random((1, 4, 32, 32), np.float32), "boxes": box} for _ in range(2)]

    def calibrated(kept: bool, *spare: str, taken_back: tuple[str, ...] = ()) -> Calibration:
        name = f"{kept}_{len(spare)}_{len(taken_back)}"
        graph = fold(decoder)
        ops = quantizable_ops(graph, config.op_types)
        sensitive = {ops[0].name: DISTRIBUTION} if kept else {}
        mark_float(graph, list(sensitive))
        model = save_folded(graph, tmp_path / f"float_{name}")
        selection = select(ops, Quantize(), Path("c.yml"), sensitive)
        post = PostTraining(model, config, lambda: iter(feeds), "CPU", selection, spare)
        (tmp_path / name).mkdir()
        return post.write(tmp_path / name, "avg", taken_back)

    with static_mode():
        op = quantizable_ops(fold(decoder), config.op_types)[0].name
        plain, spared = calibrated(True), calibrated(True, op)
        everything, taken = calibrated(False), calibrated(True, op, taken_back=(op,))
    assert spared.inventory.quantized == {"conv2d": 1} and taken.inventory.quantized == {"conv2d": 2}
    assert spared.model.content_hash() == plain.model.content_hash() and spared.thresholds == plain.thresholds
    assert taken.model.content_hash() == everything.model.content_hash() != plain.model.content_hash()
