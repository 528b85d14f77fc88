"""The two artifacts that a runtime loads: Paddle's folder, and the ONNX file that was lowered from it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import hash_files, read_record
from act_pipeline.core.yaml_files import load_yaml

MODEL_FILENAME = "model.pdmodel"
PARAMS_FILENAME = "model.pdiparams"
INFER_CFG_FILENAME = "infer_cfg.yml"
# How PaddleX, and PaddleDetection's later exporter, name the same.
_OTHER_STEM = "inference"
_OTHER_INFER_CFG_FILENAME = "inference.yml"
_PROGRAM_SUFFIX = ".pdmodel"
_PIR_FILENAMES = ("model.json", "inference.json")
_PIR_MARK = re.compile(rb'"magic"\s*:\s*"pir"')
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

        Args:
            directory: the folder, or the ``.pdmodel`` in it.
            model_filename: the program. Where the folder has no ``model.pdmodel``, ``inference.pdmodel`` or the only
                ``.pdmodel`` is taken for it.
            params_filename: the parameters, likewise: else those of the program's name, or the only ``.pdiparams``.

        Raises:
            UserError: the folder or a file is missing or empty, there are several to choose from, or the model is of
                Paddle 3's ``model.json`` kind.
        """
        folder = Path(directory)
        if not folder.exists():
            raise UserError(f"model folder {folder} does not exist; export a model with tools/export_model.py first")
        if folder.suffix == _PROGRAM_SUFFIX and folder.is_file():
            folder, model_filename = folder.parent, folder.name
        if _is_pir(folder):
            raise _of_paddle3(folder)
        if not folder.is_dir():
            raise UserError(
                f"{folder} is a file, expected the folder that holds {model_filename} and {params_filename}"
            )
        if model_filename == MODEL_FILENAME:
            model_filename = _find(folder, "model_filename", MODEL_FILENAME, f"{_OTHER_STEM}{_PROGRAM_SUFFIX}")
        if params_filename == PARAMS_FILENAME:
            of_program = Path(model_filename).with_suffix(Path(PARAMS_FILENAME).suffix).name
            params_filename = _find(folder, "params_filename", of_program, PARAMS_FILENAME)
        model = cls(folder, model_filename, params_filename)
        if _is_pir(model.model_path):
            raise _of_paddle3(model.model_path)
        if not model.model_path.exists():
            programs = (path for path in sorted(folder.glob("*.json")) if path.name in _PIR_FILENAMES or _is_pir(path))
            pir = next(programs, None)
            if pir is not None:
                raise _of_paddle3(pir)
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
        """``infer_cfg.yml``, or ``inference.yml`` where there is that one only."""
        path, other = self.directory / INFER_CFG_FILENAME, self.directory / _OTHER_INFER_CFG_FILENAME
        return other if other.exists() and not path.exists() else path

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


def _find(folder: Path, key: str, *names: str) -> str:
    """Return the first of ``names`` that the folder has, else its only file of that kind, else the first name."""
    suffix = Path(names[0]).suffix
    found = sorted(path.name for path in folder.glob(f"*{suffix}") if path.is_file())
    for name in names:
        if name in found:
            return name
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {len(found)} {suffix} files ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''}), "
            f"expected {names[0]} or one only; say which with {key}"
        )
    return found[0] if found else names[0]


def _is_pir(path: Path) -> bool:
    """Say whether a file is a program of Paddle 3, JSON that begins ``{"base_code":{"magic":"pir"``."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return bool(_PIR_MARK.search(file.read(256)))


def _of_paddle3(path: Path) -> UserError:
    return UserError(
        f"{path} is a model of Paddle 3 (PIR), expected a {_PROGRAM_SUFFIX} of Paddle 2: export it again from its "
        ".pdparams, with tools/export_model.py or in paddlepaddle 2.6"
    )


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
