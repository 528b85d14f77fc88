"""The two artifacts that a runtime loads: Paddle's folder, and the ONNX file that was lowered from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.errors import UserError
from act_pipeline.records import hash_files, read_record
from act_pipeline.yaml_file import load_yaml

MODEL_FILENAME = "model.pdmodel"
PARAMS_FILENAME = "model.pdiparams"
INFER_CFG_FILENAME = "infer_cfg.yml"
ONNX_SCHEMA = "act_pipeline.onnx/1"


@dataclass(frozen=True)
class InferenceModel:
    """A static graph on disk, in the form PaddleDetection's exporter and PaddleSlim's ACT write.

    Inputs: ``image [N, 3, H, W]`` float32 as the reader normalizes it, ``im_shape [N, 2]`` (height, width of the
    network's input, pixels), ``scale_factor [N, 2]`` (input size / original size, y then x).
    Outputs: ``bbox [K, 6]`` (class, score, x1, y1, x2, y2 in pixels of the original image) and ``bbox_num [N]``.

    Attributes:
        directory: the folder.
        model_filename: the program, a protobuf ``ProgramDesc``.
        params_filename: all parameters in one file.
    """

    directory: Path
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        model_filename: str = MODEL_FILENAME,
        params_filename: str = PARAMS_FILENAME,
    ) -> InferenceModel:
        """Check that the folder holds a whole model.

        Raises:
            UserError: the folder or a file is missing or empty, or the model is of Paddle 3's ``model.json`` kind.
        """
        folder = Path(directory)
        if not folder.exists():
            raise UserError(f"model folder {folder} does not exist; export a model with tools/export_model.py first")
        if not folder.is_dir():
            raise UserError(
                f"{folder} is a file, expected the folder that holds {model_filename} and {params_filename}"
            )
        model = cls(folder, model_filename, params_filename)
        if not model.model_path.exists():
            json_path = model.model_path.with_suffix(".json")
            if json_path.exists():
                raise UserError(
                    f"{json_path} is a model of Paddle 3 (PIR), expected {model_filename}: export it again with "
                    "tools/export_model.py, or in Paddle 3 with FLAGS_enable_pir_api=0"
                )
            raise UserError(
                f"{model.model_path} is missing in the model folder; export a model with tools/export_model.py"
            )
        if not model.params_path.exists():
            raise UserError(f"{model.params_path} is missing beside {model_filename}; copy both files of the export")
        for path in (model.model_path, model.params_path):
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty; copy or export it again")
        return model

    @property
    def model_path(self) -> Path:
        return self.directory / self.model_filename

    @property
    def params_path(self) -> Path:
        return self.directory / self.params_filename

    @property
    def infer_cfg_path(self) -> Path:
        return self.directory / INFER_CFG_FILENAME

    @property
    def bytes(self) -> int:
        """Size of the program and the parameters together, in bytes."""
        return self.model_path.stat().st_size + self.params_path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of the program and the parameters, ``sha256:<hex>``."""
        return hash_files([self.model_path, self.params_path])

    def infer_cfg(self) -> dict[str, Any]:
        """Return ``infer_cfg.yml``, empty if the folder has none.

        Raises:
            UserError: the file is no YAML mapping.
        """
        if not self.infer_cfg_path.exists():
            return {}
        return load_yaml(self.infer_cfg_path)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX file with the inputs and outputs of :class:`InferenceModel`, and the record that the lowering wrote.

    Attributes:
        path: the file.
    """

    path: Path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OnnxModel:
        """Check that the file is there.

        Raises:
            UserError: it is missing, empty or no file.
        """
        file = Path(path)
        if not file.is_file():
            raise UserError(f"ONNX file {file} does not exist; write it with deploy/export_onnx.py")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty; write it again with deploy/export_onnx.py")
        return cls(file)

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def record_path(self) -> Path:
        """Where the lowering writes what it did: ``model_cpu.json`` beside ``model_cpu.onnx``."""
        return self.path.with_suffix(".json")

    @property
    def bytes(self) -> int:
        """Size of the file, in bytes."""
        return self.path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of the file, ``sha256:<hex>``."""
        return hash_files([self.path])

    def record(self) -> dict[str, Any]:
        """Return what the lowering wrote beside the file; empty for a file of other origin.

        Raises:
            UserError: there is a file of that name that is no such record.
        """
        return read_record(self.record_path, ONNX_SCHEMA) if self.record_path.exists() else {}


def open_model(
    path: str | os.PathLike[str], model_filename: str = MODEL_FILENAME, params_filename: str = PARAMS_FILENAME
) -> InferenceModel | OnnxModel:
    """Return the artifact at ``path``: an ONNX file if it ends in ``.onnx``, else a model folder.

    Raises:
        UserError: as the two ``load``.
    """
    if Path(path).suffix == ".onnx":
        return OnnxModel.load(path)
    return InferenceModel.load(path, model_filename, params_filename)
