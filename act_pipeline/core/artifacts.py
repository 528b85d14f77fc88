"""What a runtime loads: a Paddle model folder, an ONNX file, or a TensorRT plan."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import yaml

from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import read_record
from act_pipeline.core.yaml_files import load_yaml

MODEL_FILENAME = "model.pdmodel"
PARAMS_FILENAME = "model.pdiparams"
INFER_CFG_FILENAME = "infer_cfg.yml"
# File names used by PaddleX and by later exporters of PaddleDetection.
_OTHER_STEM = "inference"
_OTHER_INFER_CFG_FILENAME = "inference.yml"
_PROGRAM_SUFFIX = ".pdmodel"
PIR_FILENAMES = ("model.json", "inference.json")
_PIR_MARK = re.compile(rb'"magic"\s*:\s*"pir"')
ONNX_SCHEMA = "act_pipeline.onnx/1"


@dataclass(frozen=True)
class InferenceModel:
    """A static graph on disk, as written by PaddleDetection's exporter, PaddleSlim's ACT and this package's importers.

    Inputs: ``image [N, 3, H, W]`` float32 as the reader normalizes it; where the post-process is in the graph also
    ``im_shape [N, 2]`` float32 (height, width of the network's input, pixels) and ``scale_factor [N, 2]`` float32
    (input size / original size, y then x).
    Outputs: those of a detector family (:mod:`act_pipeline.families`), such as ``bbox [K, 6]`` float32 (class, score,
    x1, y1, x2, y2 in pixels of the original image) and ``bbox_num [N]`` int32.

    Attributes:
        directory: the folder.
        model_filename: file name of the program, a protobuf ``ProgramDesc``.
        params_filename: file name of the parameters, all in one file.
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
        """Find the two files of a model in a folder; their contents are not checked.

        Args:
            directory: the folder, or the ``.pdmodel`` file in it.
            model_filename: file name of the program. If it is the default and does not exist, ``inference.pdmodel`` or
                the only ``.pdmodel`` is used.
            params_filename: file name of the parameters. If it is the default, the ``.pdiparams`` with the stem of the
                program comes first, then ``model.pdiparams``, then the only ``.pdiparams``.

        Returns:
            The model.

        Raises:
            UserError: the folder or a file is missing or empty, several files match, or the model is in Paddle 3's
                format (``model.json``).
        """
        folder = Path(directory)
        if not folder.exists():
            raise UserError(f"model folder {folder} does not exist; export a model with tools/export_model.py first")
        if folder.suffix == _PROGRAM_SUFFIX and folder.is_file():
            folder, model_filename = folder.parent, folder.name
        if is_pir(folder):
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
        if is_pir(model.model_path):
            raise _of_paddle3(model.model_path)
        if not model.model_path.exists():
            programs = (path for path in sorted(folder.glob("*.json")) if path.name in PIR_FILENAMES or is_pir(path))
            pir = next(programs, None)
            if pir is not None:
                raise _of_paddle3(pir)
            raise UserError(
                f"{model.model_path} is missing in the model folder; export a model with tools/export_model.py"
            )
        if not model.params_path.exists():
            raise UserError(f"{model.params_path} is missing next to {model_filename}; copy both files of the export")
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
        """Path of ``infer_cfg.yml``, or of ``inference.yml`` if only that exists."""
        path, other = self.directory / INFER_CFG_FILENAME, self.directory / _OTHER_INFER_CFG_FILENAME
        return other if other.exists() and not path.exists() else path

    @property
    def bytes(self) -> int:
        """Size of the program and the parameters together, bytes."""
        return self.model_path.stat().st_size + self.params_path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of the program and the parameters, ``sha256:<hex>``."""
        return hash_files([self.model_path, self.params_path])

    def infer_cfg(self) -> dict[str, Any]:
        """Return the content of ``infer_cfg.yml``; empty if there is none.

        Raises:
            UserError: the file is not a YAML mapping.
        """
        if not self.infer_cfg_path.exists():
            return {}
        return load_yaml(self.infer_cfg_path)

    def class_names(self) -> list[str]:
        """Return the names in ``label_list`` of ``infer_cfg.yml`` by class index; empty if there are none.

        Raises:
            UserError: the file is not a YAML mapping.
        """
        labels = self.infer_cfg().get("label_list")
        return [str(label) for label in labels] if isinstance(labels, list) else []


# Keys of infer_cfg.yml that name another model folder, relative to the file's own.
PATH_KEYS = ("mask_decoder", "image_encoder")


def copy_infer_cfg(
    model: InferenceModel, folder: Path, final: Path | None = None, defaults: Mapping[str, Any] | None = None
) -> None:
    """Copy a model's ``infer_cfg.yml``, if there is one, into another folder; relative paths in it stay valid.

    Args:
        model: the model.
        folder: where to write it.
        final: the path that ``folder`` will have; None: it keeps its path.
        defaults: keys to add where the file lacks them.
    """
    if not model.infer_cfg_path.is_file():
        return
    content = model.infer_cfg()
    paths = {key: content[key] for key in PATH_KEYS if isinstance(content.get(key), str)}
    added = {key: value for key, value in (defaults or {}).items() if key not in content}
    if not paths and not added:
        shutil.copyfile(model.infer_cfg_path, folder / INFER_CFG_FILENAME)
        return
    moved = {key: os.path.relpath(model.directory / path, final or folder) for key, path in paths.items()}
    text = yaml.safe_dump({**content, **moved, **added}, sort_keys=False, allow_unicode=True)
    (folder / INFER_CFG_FILENAME).write_text(text, encoding="utf-8")


def _find(folder: Path, key: str, *names: str) -> str:
    """Return the first of ``names`` in the folder, else its only file with that suffix, else the first name."""
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


def is_pir(path: Path) -> bool:
    """Return whether a file is a program of Paddle 3: JSON that begins with ``{"base_code":{"magic":"pir"``."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return bool(_PIR_MARK.search(file.read(256)))


def _of_paddle3(path: Path) -> UserError:
    return UserError(
        f"{path} is a model of Paddle 3 (PIR), expected a {_PROGRAM_SUFFIX} of Paddle 2: import it with "
        f"tools/import_model.py --paddle3 {path}, or export it again from its .pdparams with tools/export_model.py"
    )


@dataclass(frozen=True)
class ModelFile:
    """A model in one file.

    Attributes:
        path: the file.
    """

    path: Path

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def bytes(self) -> int:
        """Size of the file, bytes."""
        return self.path.stat().st_size

    def content_hash(self) -> str:
        """Return a hash of the file, ``sha256:<hex>``."""
        return hash_files([self.path])


@dataclass(frozen=True)
class OnnxModel(ModelFile):
    """An ONNX file with the inputs and outputs of :class:`InferenceModel`, and the record of its export."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OnnxModel:
        """Check that the file exists; its content is not checked.

        Args:
            path: the file.

        Raises:
            UserError: it does not exist, is not a file, or is empty.
        """
        return cls(
            _file_with_content(
                path, "ONNX file", "write it with deploy/export_onnx.py", "write it again with deploy/export_onnx.py"
            )
        )

    @property
    def record_path(self) -> Path:
        """Path of the record of the export: ``model_cpu.json`` next to ``model_cpu.onnx``."""
        return self.path.with_suffix(".json")

    def record(self) -> dict[str, Any]:
        """Return the record of the export; empty for a file that this package did not write.

        Raises:
            UserError: the file at :attr:`record_path` is not such a record.
        """
        return read_record(self.record_path, ONNX_SCHEMA) if self.record_path.exists() else {}


# Suffixes of TensorRT's engines on disk.
PLAN_SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True)
class PlanModel(ModelFile):
    """A TensorRT plan. It does not tell what its outputs mean; the ONNX file that it was built from does."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanModel:
        """Check that the file exists; its content is not checked.

        Args:
            path: the file.

        Raises:
            UserError: it does not exist, is not a file, or is empty.
        """
        return cls(
            _file_with_content(
                path, "plan", "build it with deploy/build_engine.py, or a bundle's build.sh", "build it again"
            )
        )


def _file_with_content(path: str | os.PathLike[str], kind: str, if_absent: str, if_empty: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{kind} {file} does not exist; {if_absent}")
    if file.stat().st_size == 0:
        raise UserError(f"{file} is empty; {if_empty}")
    return file


Artifact = Union[InferenceModel, OnnxModel, PlanModel]


def location(model: Artifact) -> Path:
    """Return the path by which messages name a model: the folder, or the file."""
    return model.path if isinstance(model, ModelFile) else model.directory


def described_by(model: Artifact) -> InferenceModel | None:
    """Return the folder whose ``infer_cfg.yml`` describes a model; None: a file without one.

    Exported ONNX files are in ``onnx/`` in their model's folder.
    """
    if isinstance(model, InferenceModel):
        return model
    folders = [InferenceModel(folder) for folder in (model.directory, model.directory.parent)]
    return next((folder for folder in folders if folder.infer_cfg_path.is_file()), None)


def open_model(
    path: str | os.PathLike[str], model_filename: str = MODEL_FILENAME, params_filename: str = PARAMS_FILENAME
) -> Artifact:
    """Return the model at a path: an ONNX file or a TensorRT plan by its suffix, otherwise a Paddle model folder.

    Args:
        path: the ONNX file, the plan, the folder, or a ``.pdmodel`` file.
        model_filename, params_filename: for a folder, see :meth:`InferenceModel.load`.

    Raises:
        UserError: as :meth:`OnnxModel.load`, :meth:`PlanModel.load` and :meth:`InferenceModel.load`.
    """
    if Path(path).suffix == ".onnx":
        return OnnxModel.load(path)
    if Path(path).suffix in PLAN_SUFFIXES:
        return PlanModel.load(path)
    return InferenceModel.load(path, model_filename, params_filename)
