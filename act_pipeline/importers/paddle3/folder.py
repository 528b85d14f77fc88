"""A model folder of Paddle 3: its files, and ``inference.yml`` as the ``infer_cfg.yml`` of PaddleDetection."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import INFER_CFG_FILENAME, PIR_FILENAMES, is_pir
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number
from act_pipeline.core.yaml_files import load_yaml

_DESCRIPTIONS = ("inference.yml", INFER_CFG_FILENAME)
_DEFAULTS = {"mode": "paddle", "draw_threshold": 0.5, "metric": "COCO", "use_dynamic_shape": False}
# Keys that PaddleDetection has too, and that are read from infer_cfg.yml.
_KEPT = ("mode", "draw_threshold", "metric", "use_dynamic_shape", "min_subgraph_size", "NMS")
# Steps that PaddleDetection's Preprocess does not name: pictures are decoded by the reader, and batches are made by it.
_LEFT_OUT = ("Decode", "DecodeImage", "ReadImage", "KeepKeys", "ToBatch")
_CHANNELS_FIRST = ("Permute", "ToCHWImage", "ToCHW")
_INTERPOLATIONS = {"NEAREST": 0, "LINEAR": 1, "BILINEAR": 1, "CUBIC": 2, "BICUBIC": 2, "AREA": 3, "LANCZOS": 4}
_NO_DESCRIPTION = "correct it, or take the key out, and nothing will check the reader"


@dataclass(frozen=True)
class Paddle3Folder:
    """The files of a model of Paddle 3.

    Attributes:
        directory: the folder.
        program: ``inference.json`` or ``model.json``.
        parameters: the ``.pdiparams``.
        description: ``inference.yml`` or ``infer_cfg.yml``; None without one.
    """

    directory: Path
    program: Path
    parameters: Path
    description: Path | None

    @classmethod
    def find(cls, folder: Path) -> Paddle3Folder:
        """Find the files of a model.

        Args:
            folder: the folder, or the ``.json`` file in it.

        Raises:
            UserError: one is missing or empty, several match, or the model is one of Paddle 2.
        """
        if folder.suffix == ".json" and folder.is_file():
            directory, program = folder.parent, folder
        elif folder.is_dir():
            directory, program = folder, _find_program(folder)
        else:
            found = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"{folder} {found}, expected a model folder of Paddle 3, with inference.json")
        if not is_pir(program):
            raise UserError(
                f"{program} is no program of Paddle 3 (PIR), expected inference.json as Paddle 3 exports it"
            )
        parameters = program.with_suffix(".pdiparams")
        if not parameters.is_file() or parameters.stat().st_size == 0:
            state = "is empty" if parameters.exists() else "is missing"
            raise UserError(f"{parameters} {state}, expected the parameters of {program.name}; copy both of the export")
        descriptions = [directory / name for name in _DESCRIPTIONS if (directory / name).is_file()]
        return cls(directory, program, parameters, descriptions[0] if descriptions else None)

    def infer_cfg(self) -> dict[str, Any]:
        """Return the content of the ``infer_cfg.yml`` to write.

        Raises:
            UserError: the description is not as PaddleX or PaddleDetection write it.
        """
        content = {} if self.description is None else load_yaml(self.description)
        return translate_description(content, str(self.description))


def translate_description(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return PaddleX's ``inference.yml`` as PaddleDetection's ``infer_cfg.yml``.

    Args:
        content: the parsed file. ``Preprocess`` is taken as it is, a list of steps with a ``type``;
            ``PreProcess.transform_ops``, a list of ``{name: arguments}``, is translated. Class names are
            ``label_list``, ``names``, or ``label_list`` in ``PostProcess``.
        where: the file, for messages.

    Raises:
        UserError: a step is not known, or a value has another type.
    """
    result: dict[str, Any] = {**_DEFAULTS, **{key: content[key] for key in _KEPT if key in content}}
    arch = content.get("arch")
    if isinstance(arch, str):
        result["arch"] = arch
    steps = _steps(content, where)
    if steps is not None:
        result["Preprocess"] = steps
    names = _class_names(content, where)
    if names:
        result["label_list"] = names
    return result


def open_input_size(infer_cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width that ``Preprocess`` resizes to, pixels; None if it does not tell them."""
    for step in infer_cfg.get("Preprocess") or ():
        size = step.get("target_size") if step["type"] == "Resize" else None
        if isinstance(size, list) and len(size) == 2 and all(isinstance(edge, int) for edge in size):
            return size[0], size[1]
    return None


def _find_program(folder: Path) -> Path:
    found = [folder / name for name in PIR_FILENAMES if (folder / name).is_file()]
    found = found or [path for path in sorted(folder.glob("*.json")) if is_pir(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(
            f"{folder} holds {len(found)} programs of Paddle 3 ({names}); give the file instead of the folder"
        )
    if found:
        return found[0]
    if any(folder.glob("*.pdmodel")):
        raise UserError(
            f"{folder} is a model of Paddle 2 (.pdmodel), which needs no import: give it as Global.model_dir"
        )
    raise UserError(f"{folder} holds no inference.json, expected a model folder of Paddle 3")


def _steps(content: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    if content.get("Preprocess") is not None:
        steps = content["Preprocess"]
        if not isinstance(steps, list) or not all(isinstance(step, dict) and "type" in step for step in steps):
            raise UserError(
                f"{where}: key 'Preprocess' is no list of steps with a 'type', expected PaddleDetection's; "
                f"{_NO_DESCRIPTION}"
            )
        return [_resolved(dict(step)) for step in steps]
    given = content.get("PreProcess")
    if given is None:
        return None
    steps = given.get("transform_ops") if isinstance(given, dict) else given
    if not isinstance(steps, list) or not all(isinstance(step, dict) and len(step) == 1 for step in steps):
        raise UserError(
            f"{where}: key 'PreProcess.transform_ops' is no list of steps 'name: arguments', expected PaddleX's; "
            f"{_NO_DESCRIPTION}"
        )
    translated = []
    for index, step in enumerate(steps):
        ((name, arguments),) = step.items()
        place = f"{where}: PreProcess.transform_ops[{index}] ({name})"
        if arguments is not None and not isinstance(arguments, dict):
            raise UserError(f"{place} is {arguments!r}, expected arguments by name; {_NO_DESCRIPTION}")
        translated += _translated(str(name), arguments or {}, place)
    return translated


def _translated(name: str, arguments: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Return a step of ``transform_ops`` as steps of ``Preprocess``."""
    if name in _LEFT_OUT:
        if str(arguments.get("img_mode", "RGB")).upper() != "RGB":
            raise UserError(
                f"{place}: img_mode is {arguments['img_mode']!r}, expected RGB, as the readers here decode; "
                f"{_NO_DESCRIPTION}"
            )
        return []
    if name in _CHANNELS_FIRST:
        return [{"type": "Permute"}]
    if name in ("Resize", "ResizeImage"):
        size = arguments.get("target_size", arguments.get("size"))
        edges = [size] * 2 if isinstance(size, int) else size
        if not isinstance(edges, list) or len(edges) != 2 or not all(_is_edge(edge) for edge in edges):
            raise UserError(f"{place}: its size is {size!r}, expected target_size: [height, width]; {_NO_DESCRIPTION}")
        interp = arguments.get("interp", arguments.get("interpolation", 1))
        number = _INTERPOLATIONS.get(str(interp).upper(), interp)
        if number not in range(5):
            raise UserError(f"{place}: the interpolation is {interp!r}, expected {', '.join(_INTERPOLATIONS)}")
        keeps = bool(arguments.get("keep_ratio", False))
        return [{"type": "Resize", "target_size": edges, "keep_ratio": keeps, "interp": int(number)}]
    if name in ("Normalize", "NormalizeImage"):
        return [_normalization(arguments, place)]
    if name == "Pad" and isinstance(arguments.get("size"), list):
        return [{"type": "Pad", **arguments}]
    known = ("Resize", "NormalizeImage", "Pad", "ToCHWImage", *_LEFT_OUT)
    raise UserError(f"{place} is not known, expected one of {', '.join(known)}; {_NO_DESCRIPTION}")


def _normalization(arguments: Mapping[str, Any], place: str) -> dict[str, Any]:
    values = {}
    for key, default in (("mean", 0.0), ("std", 1.0)):
        given = arguments.get(key, [default] * 3)
        numbers = [as_number(value) for value in given] if isinstance(given, Sequence) else []
        if len(numbers) != 3 or None in numbers or (key == "std" and not all(numbers)):
            raise UserError(f"{place}: {key} is {given!r}, expected three numbers, no std 0; {_NO_DESCRIPTION}")
        values[key] = numbers
    if "is_scale" in arguments or "norm_type" in arguments:  # PaddleDetection's own arguments
        kind = arguments.get("norm_type", "mean_std")
        return {
            "type": "NormalizeImage",
            **values,
            "is_scale": bool(arguments.get("is_scale", True)),
            "norm_type": kind,
        }
    scale = _fraction(arguments.get("scale", 1.0))
    if scale is None or not (abs(scale - 1) < 1e-6 or abs(scale * 255 - 1) < 1e-4):
        raise UserError(f"{place}: scale is {arguments.get('scale')!r}, expected 1 / 255 or 1; {_NO_DESCRIPTION}")
    return {"type": "NormalizeImage", **values, "is_scale": scale < 0.5, "norm_type": "mean_std"}


def _fraction(value: Any) -> float | None:
    """Return a number, or text such as ``1./255.``, as a number; None for anything else."""
    text = re.fullmatch(r"\s*([\d.eE+-]+)\s*(?:/\s*([\d.eE+-]+)\s*)?", str(value))
    if text is None or isinstance(value, bool):
        return None
    try:
        return float(text[1]) / float(text[2] or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _is_edge(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _resolved(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step with the size of ``Resize`` as height and width, which PaddleX may write as one number."""
    if step["type"] == "Resize" and _is_edge(step.get("target_size")):
        step["target_size"] = [step["target_size"]] * 2
    return step


def _class_names(content: Mapping[str, Any], where: str) -> list[str]:
    places: list[tuple[str, Any]] = [("label_list", content.get("label_list")), ("names", content.get("names"))]
    post = content.get("PostProcess")
    for name, arguments in post.items() if isinstance(post, dict) else ():
        if name == "label_list":
            places.append(("PostProcess.label_list", arguments))
        elif isinstance(arguments, dict):
            places.append((f"PostProcess.{name}.label_list", arguments.get("label_list")))
    for key, names in places:
        if not names:
            continue
        if isinstance(names, dict) and set(names) == set(range(len(names))):
            names = [names[index] for index in range(len(names))]
        if not isinstance(names, list) or any(isinstance(name, (list, dict)) for name in names):
            raise UserError(f"{where}: key '{key}' is no list, expected the names of the classes in their order")
        return [str(name) for name in names]
    return []
