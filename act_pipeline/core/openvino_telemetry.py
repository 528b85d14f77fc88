"""OpenVINO and NNCF imported without their telemetry."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

_TELEMETRY = "openvino_telemetry"


@contextlib.contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Hide the package ``openvino_telemetry`` from imports during the block, unless it has been imported already.

    ``import openvino`` (2026.4) and ``import nncf`` (3.4) send a report through this package and write ``~/intel``,
    without consent. Both work without it.
    """
    if _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # typeshed: modules only
    try:
        yield
    finally:
        sys.modules.pop(_TELEMETRY, None)
