"""The built-in sample, made once for all tests: its exported model, the reader of its scenes, the whole pipeline."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from inference_fixtures import TRAINED
from together import made_once

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.data import Reader
from act_pipeline.demo import MODEL_CONFIG, READER_CONFIG, WEIGHTS, Demo, run_demo
from act_pipeline.export import export_model
from act_pipeline.onnx_export import lowered_onnx


def scenes_in(folder: Path) -> list[str]:
    """Return the overrides that set the sample's reader to a folder written by `make_sample`."""
    return [f"{name}.dataset_dir={folder}" for name in ("TrainDataset", "EvalDataset", "TestDataset")]


def reader_of_scenes(folder: Path, *overrides: str) -> Reader:
    """Return the sample's reader for the scenes in a folder."""
    return Reader.load(READER_CONFIG, [*scenes_in(folder), *overrides])


@dataclasses.dataclass
class TestedDemo(Demo):
    """Result of the demo and its folder.

    Attributes:
        root: the folder with ``data`` and ``output``.
    """

    __test__ = False

    root: Path

    @property
    def places(self) -> list[str]:
        """The overrides that set the sample's reader to the demo's scenes."""
        return scenes_in(self.root / "data")

    def reader(self, *overrides: str) -> Reader:
        """Return the sample's reader of the demo's scenes."""
        return reader_of_scenes(self.root / "data", *overrides)


@pytest.fixture(scope="session")
def sample_model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """The sample's float model, exported for 224 x 224; its folder must not be modified."""

    def make(folder: Path) -> InferenceModel:
        if not WEIGHTS.exists():
            pytest.fail(f"{WEIGHTS} is missing: the sample's weights belong to the repository")
        model = export_model(MODEL_CONFIG, folder, [f"weights={WEIGHTS}", "trt=True"])
        lowered_onnx(model)  # it is in the model's folder, to which two processes must not write at once
        return model

    return made_once(tmp_path_factory, "sample", make)


@pytest.fixture(scope="session")
def demo(sample_model: InferenceModel, tmp_path_factory: pytest.TempPathFactory) -> TestedDemo:
    """The whole pipeline on the sample, trained for a few iterations."""

    def make(folder: Path) -> TestedDemo:
        # The demo reuses an existing export.
        shutil.copytree(sample_model.directory, folder / "output" / sample_model.directory.name)
        made = run_demo(folder / "data", folder / "output", TRAINED)
        return TestedDemo(made.fp32, made.compressed, made.evaluations, folder)

    return made_once(tmp_path_factory, "demo", make)
