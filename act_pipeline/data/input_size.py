"""Size of the network's input, as determined by a reader's transforms."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Optional

from act_pipeline.core.errors import UserError
from act_pipeline.data.reader_settings import ReaderSettings

# The size argument of each transform that can determine the input size.
_SIZE_ARGUMENTS = {"Resize": "target_size", "LetterBoxResize": "target_size", "Pad": "size"}


def input_size(settings: ReaderSettings) -> tuple[int, int]:
    """Return height and width in pixels, from the last transform that determines them, otherwise from ``inputs_def``.

    Raises:
        UserError: neither determines them.
    """
    for step in reversed(settings.reader.sample_transforms):
        size = _fixed_size(step)
        if size is not None:
            return size
    shape = settings.inputs_def.get("image_shape")
    if isinstance(shape, list) and len(shape) == 3 and _is_size(shape[1:]):
        return shape[1], shape[2]
    raise _nothing_fixes_it(settings, "add it")


def with_input_size(settings: ReaderSettings, height: int, width: int) -> ReaderSettings:
    """Return the settings with another input size.

    Args:
        settings: the reader's settings; they are not changed.
        height, width: in pixels.

    Raises:
        UserError: no transform determines the input size.
    """
    section = copy.deepcopy(settings.reader)
    if not any(_fixed_size(step) for step in section.sample_transforms):
        raise _nothing_fixes_it(settings, "add it to change the size")
    for step in section.sample_transforms:
        ((name, arguments),) = step.items()
        if name in _SIZE_ARGUMENTS:
            arguments[_SIZE_ARGUMENTS[name]] = [height, width]
    inputs_def = {**settings.inputs_def, "image_shape": [3, height, width]}
    return dataclasses.replace(settings, reader=section, inputs_def=inputs_def)


def _fixed_size(step: dict[str, Any]) -> Optional[tuple[int, int]]:
    """Return the height and width of a transform's output; None if they depend on the image."""
    ((name, arguments),) = step.items()
    arguments = arguments or {}
    if name not in _SIZE_ARGUMENTS or (name == "Resize" and arguments.get("keep_ratio", True)):
        return None
    size: Any = arguments.get(_SIZE_ARGUMENTS[name])
    size = [size, size] if isinstance(size, int) else size
    return (size[0], size[1]) if _is_size(size) else None


def _is_size(size: Any) -> bool:
    return isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)


def _nothing_fixes_it(settings: ReaderSettings, remedy: str) -> UserError:
    where = settings.source.locate(f"{settings.reader_name}.sample_transforms")
    return UserError(f"{where} fix no input size, expected Resize with keep_ratio: False and target_size; {remedy}")
