"""Shares of activations beyond their calibrated ranges: of requests, compared with those of the calibration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import RANGES_SCHEMA, as_number, read_record

# Added to both shares of a ratio: those of tensors of which next to nothing is clipped would be of chance.
LEAST_SHARE = 1e-4
# The last so many images: each has thousands of elements of each tensor.
MOST_IMAGES = 50


@dataclass(frozen=True)
class RangeShares:
    """The activations of an INT8 model on one image.

    Attributes:
        tensors: names of the rounded tensors.
        shares: float [T], share of each one's elements that are beyond its range.
        runtime: what told it.
    """

    tensors: tuple[str, ...]
    shares: np.ndarray
    runtime: str


# Runs the INT8 model on what the server gave to `offer`; a text says why the shares cannot be told here.
RangeProbe = Callable[[Any], Union[RangeShares, str]]


def read_ranges(path: str | os.PathLike[str]) -> dict[str, float]:
    """Return the shares on the calibration images, by tensor; empty: ``compress`` recorded none.

    Raises:
        UserError: the file is damaged.
    """
    if not Path(path).is_file():
        return {}
    return checked_ranges(read_record(path, RANGES_SCHEMA).get("shares"), path)


def checked_ranges(found: Any, where: str | os.PathLike[str]) -> dict[str, float]:
    """Return shares by tensor that were read from JSON.

    Raises:
        UserError: they are no shares.
    """
    shares = {str(name): as_number(share) for name, share in found.items()} if isinstance(found, Mapping) else None
    if shares is None or not all(share is not None and 0 <= share <= 1 for share in shares.values()):
        raise UserError(f"{where}: the shares of activations beyond their ranges are damaged; compress again")
    return {name: share for name, share in shares.items() if share is not None}


def range_figures(seen: Sequence[RangeShares], baseline: Mapping[str, float], note: Optional[str]) -> dict[str, Any]:
    """Return the figures of a number of images, values for JSON.

    Args:
        seen: the images.
        baseline: share on the calibration images, by tensor.
        note: why nothing can be told; None: it can.

    Returns:
        ``ranged``: number of images; ``beyond_range_share``: mean share over images and tensors; ``beyond_range``: each
        tensor's share divided by that on the calibration images, mean over the tensors (the ratio of the mean shares is
        that of the few tensors which are clipped most, and varies four times as much); ``beyond_range_tensor``: the
        tensor with the greatest increase, with ``beyond_range_tensor_share`` and ``beyond_range_tensor_baseline``;
        ``beyond_range_source``: the runtime, or why there is none.
    """
    source = seen[-1].runtime if seen else note and f"not available here: {note}"
    found: dict[str, Any] = dict.fromkeys(
        ("beyond_range", "beyond_range_share", "beyond_range_tensor", "beyond_range_tensor_share",
         "beyond_range_tensor_baseline")
    )  # fmt: skip
    found.update(ranged=len(seen), beyond_range_source=source)
    if not seen:
        return found
    tensors = seen[-1].tensors
    shares = np.mean([one.shares for one in seen if one.tensors == tensors], axis=0)
    # Another version of the export may round some tensors more or less.
    known = np.array([name in baseline for name in tensors])
    compared = 2 * known.sum() > len(tensors)
    usual = np.array([baseline.get(name, 0.0) for name in tensors])
    worst = int(np.where(known, shares - usual, -1.0).argmax()) if compared else int(shares.argmax())
    found.update(
        beyond_range_share=float(shares.mean()),
        beyond_range_tensor=tensors[worst],
        beyond_range_tensor_share=float(shares[worst]),
    )
    if compared:
        ratios = (shares[known] + LEAST_SHARE) / (usual[known] + LEAST_SHARE)
        found.update(beyond_range=float(ratios.mean()), beyond_range_tensor_baseline=float(usual[worst]))
    return found
