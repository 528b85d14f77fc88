"""Held-out images: several INT8 models are compared on the first images, and the best of these on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from act_pipeline.compress import calibrating
from act_pipeline.compress.held_out import HeldOut
from act_pipeline.compress.judging.judge import Detected, detections
from act_pipeline.evaluation.batches import NotFinite

_IMAGES = 12


class Stub:
    """An engine that gives one box an image; from an image on, another score."""

    def __init__(self, score: float, later: float | None = None) -> None:
        self.score, self.later = score, score if later is None else later
        self.seen: list[int] = []
        self.closed = 0

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        image = int(feed["image"][0])
        self.seen.append(image)
        score = self.score if image < 8 else self.later
        return {"bbox": np.array([[0, score, 0, 0, 10, 10]], np.float32), "bbox_num": np.array([1])}

    def close(self) -> None:
        self.closed += 1


class Loading:
    """A judge that loads stubs, and counts how many are open."""

    def __init__(self) -> None:
        self.open: list[Stub] = []
        self.most = 0

    def load(self, model: Stub, precision: str, reader: Any) -> Stub:
        self.open.append(model)
        self.most = max(self.most, sum(not stub.closed for stub in self.open))
        return model

    def detect(self, model: Stub, precision: str, reader: Any, feeds: Sequence[Mapping[str, np.ndarray]]) -> Detected:
        return detections(model, feeds)


def held_out(judge: Loading, images: int = _IMAGES) -> HeldOut:
    found = HeldOut(SimpleNamespace(), SimpleNamespace(), judge, Stub(0.9))
    found.__dict__["feeds"] = [{"image": np.array([image])} for image in range(images)]
    return found


def test_the_best_on_the_first_images_run_on_all() -> None:
    models = {"far": Stub(0.2), "near": Stub(0.8), "middle": Stub(0.6), "equal": Stub(0.9, later=0.7)}
    judge = Loading()
    found = held_out(judge).changes(models.items(), 2)
    assert list(found) == ["near", "equal"]
    for name, change in found.items():  # as if they had run on all images at once
        assert change == pytest.approx(held_out(Loading()).change(models[name]))
    assert models["far"].seen == models["middle"].seen == list(range(8))
    assert models["near"].seen[:_IMAGES] == list(range(_IMAGES))
    assert judge.most == 3 and all(stub.closed == 1 for stub in models.values())


def test_with_few_images_all_models_run_on_all() -> None:
    models = {name: Stub(score) for name, score in (("a", 0.2), ("b", 0.8), ("c", 0.6))}
    assert list(held_out(Loading(), 8).changes(models.items(), 2)) == ["a", "b", "c"]


def test_the_model_that_was_written_to_compare_is_the_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write(folder: Path, algo: str) -> SimpleNamespace:
        written.append(algo)
        return SimpleNamespace(model=f"model of {algo}", inventory=None, seconds={"quantize": 1.0})

    monkeypatch.setattr(calibrating, "rescaled", lambda model, thresholds, folder: thresholds)
    monkeypatch.setattr(calibrating, "_calibration_details", lambda *arguments: None)
    post = SimpleNamespace(written={}, write=write, thresholds=lambda algo: algo)
    source = SimpleNamespace(strategy="ptq", model=None, selection=None, smoothing=None)
    compared = SimpleNamespace(changes=lambda models, finalists: {name: 0.1 for name, _ in models})
    job = SimpleNamespace(folder=lambda name: tmp_path, progress=False, held_out=compared)
    changes = calibrating._compare(job, post, ["avg", "mse"])
    assert list(changes) == ["avg", "mse"] and written == ["avg"]
    made = [calibrating._made(job, source, post, algo, changes, {}) for algo in ("avg", "mse")]
    assert [candidate.model for candidate in made] == ["model of avg", "model of mse"] and written == ["avg", "mse"]


def test_engines_are_closed_where_one_fails() -> None:
    first, broken = Stub(0.8), Stub(np.nan)
    with pytest.raises(NotFinite, match="not finite"):
        held_out(Loading()).changes([("first", first), ("broken", broken)], 2)
    assert first.closed == broken.closed == 1
