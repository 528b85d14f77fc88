"""What ``trtexec`` writes with ``--exportTimes`` and ``--exportProfile``.

Formats of NVIDIA/TensorRT, ``samples/common/sampleReporting.cpp``, functions ``exportJSONTrace`` and
``exportJSONProfile``, the same from 8.5 to 11.1:

- times: a list with an object for each inference after the warm-up, with ``startEnqMs``, ``endEnqMs``, ``startH2dMs``,
  ``endH2dMs``, ``startComputeMs``, ``endComputeMs``, ``startD2hMs``, ``endD2hMs``, ``h2dMs``, ``computeMs``, ``d2hMs``
  and ``latencyMs``;
- profile: a list of ``{"count": N}`` and an object for each layer of the engine, with ``name``, ``timeMs``,
  ``averageMs``, ``medianMs`` and ``percentage``. Quotes in names are not escaped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import as_number


@dataclass(frozen=True)
class LayerTime:
    """A layer of an engine.

    Attributes:
        name: as TensorRT calls it: names of fused ONNX nodes, or what it added, such as ``Reformatting CopyNode``.
        ms: average duration, ms.
    """

    name: str
    ms: float


def read_compute_ms(path: Path) -> float:
    """Return the median of the GPU's compute time of a file of ``--exportTimes``, ms.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, or is no such file.
    """
    found = [as_number(entry.get("computeMs")) for entry in _entries(path, "--exportTimes")]
    times = [value for value in found if value is not None and value > 0]
    if not times or len(times) < len(found):
        raise _malformed(path, "--exportTimes", f"{len(times)} of {len(found)} entries have a positive computeMs")
    return float(np.median(times))


def read_layer_times(path: Path) -> list[LayerTime]:
    """Return the layers of a file of ``--exportProfile``, in the order of the engine.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, or is no such file.
    """
    layers = []
    for entry in _entries(path, "--exportProfile"):
        if "name" not in entry:  # {"count": N}
            continue
        ms = as_number(entry.get("averageMs"))
        if ms is None or ms < 0 or not isinstance(entry["name"], str):
            raise _malformed(path, "--exportProfile", f"averageMs of {entry['name']!r} is {entry.get('averageMs')!r}")
        layers.append(LayerTime(entry["name"], ms))
    if not layers:
        raise _malformed(path, "--exportProfile", "no layer has a name")
    return layers


def _entries(path: Path, flag: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing, expected a file of trtexec {flag}; run measure.sh to its end") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _malformed(path, flag, str(error)) from None
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _malformed(path, flag, "it is no list of objects")
    return found


def _malformed(path: Path, flag: str, why: str) -> UserError:
    # measure.sh repeats a round whose folder is missing, and a profile whose file is.
    is_time = path.parent.name.startswith("round")
    again = "/".join(path.parts[-3:-1]) if is_time else path.name
    return UserError(
        f"{path} is no file of trtexec {flag} ({why}); where it was measured, delete {again} in results/ (no more than "
        "that), run measure.sh again, and copy results/ back"
    )
