"""Checks of the input and output arrays, the same for every runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from act_pipeline.core.errors import UserError


class InputCheck:
    """Converts a reader's batch to the inputs of a model, or raises a one-line error where they do not match."""

    def __init__(
        self,
        where: Path,
        shapes: Mapping[str, tuple[int, ...]],
        batch_size: int | None = None,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        """Store the expected inputs.

        Args:
            where: path of the model, for error messages.
            shapes: input name -> shape, -1 for a dynamic dimension.
            batch_size: the largest batch; None: no limit.
            dtypes: input name -> dtype; float32 for inputs that are missing here.
        """
        self._where, self._shapes, self._batch_size = where, dict(shapes), batch_size
        self._dtypes = dict(dtypes or {})

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the model's inputs as contiguous arrays of its dtypes.

        Args:
            inputs: arrays by name, the batch dimension first; arrays of other names are ignored.

        Returns:
            The inputs of the model by name, of the model's dtypes, C-contiguous.

        Raises:
            UserError: an input is missing or has a wrong shape, the batch sizes of the inputs differ, or the batch is
                too large.
        """
        checked = {name: self._checked(name, expected, inputs) for name, expected in self._shapes.items()}
        batches = {name: len(array) for name, array in checked.items() if array.ndim}
        if len(set(batches.values())) > 1:
            found = ", ".join(f"{name} of {count}" for name, count in batches.items())
            raise UserError(f"{self._where} takes inputs of one batch, the reader gives {found} images")
        largest = max(batches.values(), default=0)
        if self._batch_size is not None and largest > self._batch_size:
            raise UserError(
                f"{self._where} was loaded for batches up to {self._batch_size}, this one has {largest}; load it with "
                f"--batch_size={largest} (batch_size={largest})"
            )
        return checked

    def _checked(self, name: str, expected: tuple[int, ...], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in inputs:
            raise UserError(
                f"{self._where} takes an input {name!r}, which is none of {sorted(inputs)}; expected image, "
                "im_shape, scale_factor, and the inputs made from a prompt"
            )
        array = np.ascontiguousarray(inputs[name], self._dtypes.get(name, "float32"))
        fits = len(expected) == array.ndim and all(want in (-1, got) for want, got in zip(expected, array.shape))
        if not fits:
            raise UserError(
                f"{self._where} takes {name} {_dimensions(expected)}, the reader gives {_dimensions(array.shape)}"
                f"{_remedy(name, expected, array.shape)}"
            )
        return array


def _remedy(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> str:
    if len(expected) == len(found) and expected[0] not in (-1, found[0]) and expected[1:] == found[1:]:
        return f"; set --batch_size={expected[0]}, or write the file for any batch (deploy/export_onnx.py)"
    if name == "image" and len(expected) == 4 and expected[2] > 0 and expected[3] > 0:
        height, width = expected[2:]
        size = height if height == width else f"{height},{width}"
        return f"; set --img_shape={size} or the reader's target_size so"
    return ""


def _dimensions(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join("N" if size == -1 else str(size) for size in shape) + "]"
