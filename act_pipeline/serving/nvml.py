"""Temperature of an NVIDIA GPU by the driver's own library (NVML), without a package for it."""

from __future__ import annotations

import ctypes
from typing import Any, Optional

LIBRARY = "libnvidia-ml.so.1"
_SUCCESS, _GPU_SENSOR = 0, 0


def load_nvml() -> Any:
    """Return NVML, ready for calls; None: there is no driver, or it has no GPU."""
    try:
        library = ctypes.CDLL(LIBRARY)
        return library if library.nvmlInit_v2() == _SUCCESS else None
    except (OSError, AttributeError):
        return None


def hottest_gpu(library: Any) -> Optional[tuple[float, str]]:
    """Return the temperature in degrees Celsius of the hottest GPU, and its name; None: no GPU tells one.

    Args:
        library: what :func:`load_nvml` returned.
    """
    count = ctypes.c_uint()
    if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _SUCCESS:
        return None
    found = []
    for index in range(count.value):
        device, degrees = ctypes.c_void_p(), ctypes.c_uint()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != _SUCCESS:
            continue
        if library.nvmlDeviceGetTemperature(device, _GPU_SENSOR, ctypes.byref(degrees)) == _SUCCESS:
            found.append((float(degrees.value), f"NVML GPU {index}"))
    return max(found, default=None)
