"""Versions of the sample's real models in service: what is broken is found and taken back, what is healthy stays.

Each model runs once on each picture, in OpenVINO; the requests of a stream draw from these answers.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from serving_fixtures import audit_of, decision_of, serve_until_changed

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.serving import Monitor, Repository, load_rules, promote
from act_pipeline.serving.temperature import Sensor

pytestmark = pytest.mark.slow
PICTURES = 100
# Degrees Celsius of a processor under load whose fan has stopped, one reading a check.
HEATING = (52, 55, 61, 66, 72, 77, 81, 84, 86, 88, 90, 91, 92, 93)
Answers = list[tuple[np.ndarray, float]]


def scales_off(model: InferenceModel, folder: Path, factor: float = 0.25) -> Path:
    """Write a copy of an INT8 model with the scales of all activations multiplied, so that most values are clipped."""
    folder.mkdir()
    with static_mode():
        graph = StaticGraph.load(model)
        ops = graph.program.global_block().ops
        for name in {op.input("Scale")[0] for op in ops if op.type == "quantize_linear"}:
            graph.set_parameter(name, graph.parameter(name) * np.float32(factor))
        graph.save(folder)
        graph.close()
    for name in ("act.json", "detections.npz", "infer_cfg.yml"):
        shutil.copyfile(model.directory / name, folder / name)
    return folder


def darkened(files: list[Path], folder: Path, factor: float) -> list[Path]:
    folder.mkdir()
    for path in files:
        cv2.imwrite(str(folder / f"{path.stem}.png"), (cv2.imread(str(path)) * factor).astype(np.uint8))
    return [folder / f"{path.stem}.png" for path in files]


def detect(model: InferenceModel, precision: str, reader: Reader, files: list[Path]) -> Answers:
    engine, found = create_engine("openvino", model, precision), []
    for path in files:
        batch = reader.preprocess(path)
        engine.run(batch)
        started = time.perf_counter()
        rows = engine.run(batch)["bbox"]
        found.append((rows, time.perf_counter() - started))
    engine.close()
    return found


@dataclass(frozen=True)
class Lab:
    """Folders of the models to promote, and their answers by kind of picture."""

    models: dict[str, Path]
    float_model: Path
    answers: dict[tuple[str, str], Answers]
    category_ids: list[int]


@pytest.fixture(scope="module")
def lab(demo, tmp_path_factory) -> Lab:
    folder = tmp_path_factory.mktemp("lab")
    reader = demo.reader()
    int8 = demo.compressed.model
    models = {"before": int8.directory, "healthy": folder / "healthy", "broken": scales_off(int8, folder / "broken")}
    shutil.copytree(int8.directory, models["healthy"], ignore=shutil.ignore_patterns("onnx"))
    with open(models["healthy"] / "infer_cfg.yml", "a") as file:
        file.write("# another version\n")
    files = [Path(record.file) for record in reader.dataset("eval").records[:PICTURES]]
    dark = {kind: darkened(files, folder / kind, factor) for kind, factor in (("night", 0.06), ("dusk", 0.15))}
    pictures = {"usual": files, **dark}
    answers = {}
    for kind, paths in pictures.items():
        answers["float", kind] = detect(demo.fp32, "fp32", reader, paths)
        answers["before", kind] = detect(int8, "int8", reader, paths)
    answers["broken", "usual"] = detect(InferenceModel.load(models["broken"]), "int8", reader, files)
    ids = reader.class_ids(reader.annotations("eval"))
    return Lab(models, demo.fp32.directory, answers, ids)


class Stream:
    """Requests to two versions, half each: the one before, and a new one."""

    def __init__(self, lab: Lab, root: Path, new: str, seed: int, sensor: Callable | None = None) -> None:
        self.lab, self.repository, self.now = lab, Repository.open(root / "repository", create=True), 0.0
        self.random, self.kind = np.random.default_rng(seed), "usual"
        for name, share in (("before", 100), (new, 50)):
            promote(
                self.repository, lab.models[name], share, force=True, category_ids=lab.category_ids,
                float_model=lab.float_model,
            )  # fmt: skip
        rules = load_rules(overrides=["shadow.share=20", f"seed={seed}"])
        cool = Sensor(root / "no_sensors", None)
        self.monitor = Monitor(self.repository, rules, self._float, sensor or cool, lambda: self.now)

    def _float(self, picture: int) -> np.ndarray:
        return self.lab.answers["float", self.kind][picture][0]

    def serve(self, requests: int, new: str = "before", delay: float = 0.0, kind: str = "usual") -> int | None:
        """Answer requests; return the number after which a rule took the new version back, None if none did."""
        self.kind = kind

        def answer(number: int, version: int) -> tuple[np.ndarray, float, int]:
            picture = int(self.random.integers(PICTURES))
            rows, seconds = self.lab.answers[new if version == 2 else "before", kind][picture]
            self.now += 0.05
            return rows, seconds + delay * (version == 2), picture

        return serve_until_changed(self.monitor, self.repository, requests, answer)

    def decision(self) -> dict:
        return decision_of(self.repository)


@pytest.mark.parametrize("seed", range(3))
def test_a_broken_int8_is_taken_back(lab, tmp_path, seed) -> None:
    stream = Stream(lab, tmp_path, "broken", seed)
    found = stream.serve(600, new="broken")
    assert found is not None and stream.repository.state().shares() == {1: 100}
    assert stream.decision()["metric"] in ("disagreement", "psi")
    print(f"seed {seed}: {found} requests, {stream.decision()['metric']} {stream.decision()['value']:.3f}")


@pytest.mark.parametrize("seed", range(3))
def test_pictures_at_night_are_found_and_told_from_a_bad_model(lab, tmp_path, seed) -> None:
    stream = Stream(lab, tmp_path, "healthy", seed)
    found = stream.serve(600, kind="night")
    assert found is not None
    decision = stream.decision()
    other = decision["others"]["1"]
    assert decision["metric"] == "psi" and other > 0.5 and decision["cause"] == "common", "the stream has changed"
    print(f"seed {seed}: {found} requests, psi {decision['value']:.3f}, of the other version {other:.3f}")


@pytest.mark.parametrize("seed", range(3))
def test_half_of_the_objects_lost_at_dusk_are_found(lab, tmp_path, seed) -> None:
    """The scores of those that are found are as before, so their PSI stays below the bound."""
    stream = Stream(lab, tmp_path, "healthy", seed)
    found = stream.serve(600, kind="dusk")
    decision = stream.decision()
    assert found is not None and stream.repository.state().shares() == {1: 100}
    # INT8 and float are about as far apart as the bound of `disagreement`: it may act first.
    assert decision["metric"] in ("detections_change", "disagreement")
    assert decision["metric"] == "disagreement" or decision["cause"] == "common"
    print(f"seed {seed}: {found} requests, {decision['metric']} {decision['value']:.2f}, {decision['cause']}")


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_version_is_taken_back(lab, tmp_path, seed) -> None:
    stream = Stream(lab, tmp_path, "healthy", seed)
    found = stream.serve(400, delay=0.6)
    assert found is not None and stream.decision()["metric"] == "p99_ms"
    print(f"seed {seed}: {found} requests")


@pytest.mark.parametrize("seed", range(3))
def test_an_overheating_device_is_found_by_its_sensor(lab, tmp_path, seed) -> None:
    chip = tmp_path / "sys" / "class" / "hwmon" / "hwmon0"
    chip.mkdir(parents=True)
    (chip / "name").write_text("coretemp\n")
    readings, sensor = iter(HEATING), Sensor(tmp_path / "sys", None)

    def read():
        (chip / "temp1_input").write_text(f"{next(readings, HEATING[-1]) * 1000}\n")
        return sensor()

    stream = Stream(lab, tmp_path, "healthy", seed, read)
    found = stream.serve(300)
    assert found is not None and stream.decision()["metric"] == "temperature"
    assert stream.decision()["figures"]["source"] == "hwmon coretemp" and stream.decision()["value"] > 85
    print(f"seed {seed}: {found} requests, {stream.decision()['value']} degrees")


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_version_stays(lab, tmp_path, seed) -> None:
    stream = Stream(lab, tmp_path, "healthy", seed)
    assert stream.serve(600) is None
    windows = stream.monitor.figures()["versions"]
    assert not [entry for entry in audit_of(stream.repository.folder) if entry.get("by") == "rule"], windows["2"][
        "window"
    ]
    assert windows["2"]["counters"]["shadowed"] > 30
    print(
        f"seed {seed}: disagreement {windows['2']['window']['disagreement']:.3f}, psi {windows['2']['window']['psi']:.3f}"
    )
