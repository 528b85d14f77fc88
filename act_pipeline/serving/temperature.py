"""Temperature of the device that computes: NVML, then hwmon and the kernel's thermal zones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from act_pipeline.serving.nvml import hottest_gpu, load_nvml

NOT_AVAILABLE = "not available here"
# Drivers of hwmon that measure a processor; others measure disks, fans, networks.
_PROCESSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "armada_thermal")
# Thermal zones that measure a processor: Intel's package, Jetson's CPU and GPU, other Arm boards.
_ZONES = ("x86_pkg_temp", "cpu", "gpu", "soc")
# Sensors that are off say 0 or below, broken ones thousands.
_PLAUSIBLE = (0.0, 150.0)


@dataclass(frozen=True)
class Temperature:
    """A reading.

    Attributes:
        degrees: degrees Celsius; None: there is no sensor.
        source: the sensor, or ``not available here``.
    """

    degrees: Optional[float]
    source: str


class Sensor:
    """The sensors of this machine; a call reads the hottest of the first kind that there is."""

    def __init__(self, sys_folder: Path = Path("/sys"), nvml: Any = "driver") -> None:
        """Find NVML.

        Args:
            sys_folder: the kernel's ``/sys``, or a recording of it.
            nvml: the library, or None for none; by default that of the driver.
        """
        self._sys = sys_folder
        self._nvml = load_nvml() if nvml == "driver" else nvml

    def __call__(self) -> Temperature:
        """Return the temperature now."""
        gpu = hottest_gpu(self._nvml)
        if gpu is not None:
            return Temperature(*gpu)
        found = [*self._hwmon()] or [*self._zones()]
        return Temperature(*max(found)) if found else Temperature(None, NOT_AVAILABLE)

    def _hwmon(self) -> Iterator[tuple[float, str]]:
        for chip in sorted((self._sys / "class" / "hwmon").glob("hwmon*")):
            name = _text(chip / "name")
            if name in _PROCESSORS:
                for path in sorted(chip.glob("temp*_input")):
                    yield from _reading(path, f"hwmon {name}")

    def _zones(self) -> Iterator[tuple[float, str]]:
        for zone in sorted((self._sys / "class" / "thermal").glob("thermal_zone*")):
            kind = _text(zone / "type")
            if kind.lower().startswith(_ZONES):
                yield from _reading(zone / "temp", f"thermal zone {kind}")


def _reading(path: Path, source: str) -> Iterator[tuple[float, str]]:
    with contextlib.suppress(ValueError):
        degrees = int(_text(path)) / 1000
        if _PLAUSIBLE[0] < degrees < _PLAUSIBLE[1]:
            yield degrees, source


def _text(path: Path) -> str:
    """Return a file's text; empty if it cannot be read: a sensor that sleeps gives an input/output error."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
