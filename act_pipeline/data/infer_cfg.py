"""Consistency of a reader's transforms with ``Preprocess`` in the model's ``infer_cfg.yml``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.paddledet import import_ppdet
from act_pipeline.data.padding import PADDING
from act_pipeline.data.reader_settings import ReaderSettings

Step = tuple[str, dict[str, Any]]
# A missing or additional one of these changes the position or the value of pixels.
_COMPARED = ("Resize", "LetterBoxResize", "Pad", "NormalizeImage")
_PIXELS = 255.0
_CLOSE = 1e-5


@dataclass(frozen=True)
class Described:
    """The ``Preprocess`` section of an ``infer_cfg.yml``.

    Attributes:
        steps: (name, arguments) of each step; None if there is no such section or file.
        source: the file, for messages.
    """

    steps: Optional[list[Step]]
    source: str

    @classmethod
    def of(cls, content: Mapping[str, Any], source: str) -> Described:
        """Parse the content of an ``infer_cfg.yml``.

        Args:
            content: the parsed YAML.
            source: the file, for messages.

        Raises:
            UserError: ``Preprocess`` is not a list of mappings with a ``type``.
        """
        steps = content.get("Preprocess")
        if steps is None:
            return cls(None, source)
        if not isinstance(steps, list) or not all(isinstance(step, dict) and "type" in step for step in steps):
            raise UserError(
                f"{source}: Preprocess is no list of steps with a 'type', expected PaddleDetection's; export it again"
            )
        arguments = [{key: value for key, value in step.items() if key != "type"} for step in steps]
        return cls([(str(step["type"]), rest) for step, rest in zip(steps, arguments)], source)

    def has(self, name: str) -> bool | None:
        """Return whether there is a step of this name; None if the steps are unknown."""
        return None if self.steps is None else any(step == name for step, _ in self.steps)


def preprocess_section(settings: ReaderSettings) -> list[dict[str, Any]]:
    """Return a reader's transforms, all but the decoding, as a ``Preprocess`` section."""
    return [
        {"type": name, **(arguments or {})}
        for step in settings.reader.sample_transforms
        for name, arguments in step.items()
        if name != "Decode"
    ]


def normalizes(settings: ReaderSettings) -> bool:
    """Return whether a reader has ``NormalizeImage``."""
    return any("NormalizeImage" in step for step in settings.reader.sample_transforms)


def without_normalization(settings: ReaderSettings) -> list[dict[str, Any]]:
    """Return a reader's ``sample_transforms`` without ``NormalizeImage``."""
    return [step for step in settings.reader.sample_transforms if "NormalizeImage" not in step]


def pads(settings: ReaderSettings) -> Optional[str]:
    """Return the name of the transform with which a reader pads the image; None if it does not pad."""
    names = [name for step in settings.reader.sample_transforms for name in step]
    return next((name for name in names if name in PADDING), None)


def pads_right_and_below(settings: ReaderSettings) -> bool:
    """Return whether padding is added only at the right and the bottom, so that pixel positions do not change."""
    steps = [step["Pad"] or {} for step in settings.reader.sample_transforms if "Pad" in step]
    return pads(settings) == "Pad" and all(step.get("pad_mode", 0) == 0 for step in steps)


def normalization(arguments: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return ``NormalizeImage`` as ``pixel * factor + shift`` for pixels of 0 to 255.

    Args:
        arguments: arguments of ``NormalizeImage``; ppdet's defaults apply to missing ones.
        where: their file and key, for messages.

    Returns:
        factor and shift, float64 [3] each.

    Raises:
        UserError: ppdet does not accept the arguments.
    """
    arguments = {**_defaults("NormalizeImage"), **arguments}
    factor, shift = np.full(3, 1 / _PIXELS if arguments["is_scale"] else 1.0), np.zeros(3)
    if arguments["norm_type"] != "mean_std":
        return factor, shift
    try:
        mean, std = (np.broadcast_to(np.float64(arguments[key]), 3) for key in ("mean", "std"))
    except (TypeError, ValueError):
        mean, std = np.zeros(3), np.zeros(3)
    if not std.all():
        raise UserError(
            f"{where}: NormalizeImage has mean {arguments['mean']!r} and std {arguments['std']!r}, expected three "
            "numbers each, std not 0; correct them"
        )
    return factor / std, shift - mean / std


def check_transforms(described: Described, settings: ReaderSettings, size_is_known: bool) -> None:
    """Compare the transforms that determine the network's input: resizing, padding and normalization.

    Args:
        described: the preprocessing that the model was exported with.
        settings: the reader's settings.
        size_is_known: whether the graph fixes the input size; if so, sizes in ``described`` are not compared.

    Raises:
        UserError: they differ.
    """
    if described.steps is None:
        return
    expected = [step for step in described.steps if step[0] in _COMPARED]
    found = [
        (name, dict(arguments or {}))
        for step in settings.reader.sample_transforms
        for name, arguments in step.items()
        if name in _COMPARED
    ]
    where = settings.source.locate(f"{settings.reader_name}.sample_transforms")
    for name in _COMPARED:
        theirs, ours = ([arguments for step, arguments in steps if step == name] for steps in (expected, found))
        if len(theirs) != len(ours):
            says = ", ".join(step for step, _ in described.steps) or "no step"
            raise UserError(
                f"{where} {f'have {name}' if ours else f'lack {name}'}, but the model was exported with {says} "
                f"({described.source}: Preprocess): feed it what it was trained on, or export it again"
            )
        for one, other in zip(theirs, ours):
            _compare(name, one, other, where, described.source, size_is_known)


def _compare(
    name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, source: str, size_is_known: bool
) -> None:
    defaults = _defaults(name)
    theirs, ours = {**defaults, **theirs}, {**defaults, **ours}
    views: dict[str, Callable[[Any], Any]] = {"keep_ratio": bool, "interp": int, "pad_mode": int, "fill_value": list}
    if not size_is_known:
        views.update(target_size=_pair, size=_pair)
    if name == "NormalizeImage":
        same = np.allclose(_ends(theirs, source), _ends(ours, where), atol=_CLOSE)
        if not same:
            keys = [key for key in ("mean", "std", "is_scale", "norm_type") if theirs.get(key) != ours.get(key)]
            raise _contradiction(name, keys, theirs, ours, where, source)
        return
    keys = []
    for key, view in views.items():
        if key in theirs and key in ours:
            try:
                if view(theirs[key]) != view(ours[key]):
                    keys.append(key)
            except (TypeError, ValueError):  # invalid values are reported by ppdet
                keys += [key] if theirs[key] != ours[key] else []
    if keys:
        raise _contradiction(name, keys, theirs, ours, where, source)


def _contradiction(
    name: str, keys: Sequence[str], theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, source: str
) -> UserError:
    found, expected = (", ".join(f"{key}: {values.get(key)}" for key in keys) for values in (ours, theirs))
    return UserError(
        f"{where}: {name} has {found}, but the model was exported with {expected} ({source}: Preprocess); set it so, "
        "or export the model again as it was trained"
    )


def _ends(arguments: Mapping[str, Any], where: str) -> np.ndarray:
    """Return the values of a black and a white pixel per channel, [2, 3]; equal values mean equal normalizations."""
    factor, shift = normalization(arguments, where)
    return np.stack([shift, _PIXELS * factor + shift])


def _defaults(name: str) -> dict[str, Any]:
    """Return ppdet's default arguments of a transform."""
    operator = getattr(import_ppdet("ppdet.data.transform"), name)
    return {
        key: parameter.default for key, parameter in inspect.signature(operator.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }  # fmt: skip


def _pair(size: Any) -> list[int]:
    return [int(size)] * 2 if isinstance(size, (int, float)) else [int(edge) for edge in size]
