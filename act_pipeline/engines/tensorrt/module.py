"""Import of NVIDIA's module: ``tensorrt``, or ``tensorrt_rtx``, which has the same interface for RTX GPUs.

``tensorrt`` builds on the GPU that it builds for. ``tensorrt_rtx`` parses and builds without a GPU and without a
driver; the machine that loads the plan chooses the kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from act_pipeline.core.errors import UserError

INSTALL = 'pip install "act_pipeline[tensorrt-rtx]", or -r requirements/tensorrt-rtx.txt; or NVIDIA\'s tensorrt'


@dataclass(frozen=True)
class Flavour:
    """TensorRT or TensorRT-RTX, and how it is installed.

    Attributes:
        name: ``tensorrt`` or ``tensorrt_rtx``.
        title: the product name, for messages.
        modules: modules to import; the first installed one is used. The sdist ``tensorrt-rtx-cu12`` only adds the
            module ``tensorrt_rtx``, which imports ``tensorrt_rtx_bindings``, to the wheels that it depends on.
        distributions: distributions that may contain it.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]


FLAVOURS = (
    Flavour("tensorrt", "TensorRT", ("tensorrt",), ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-cu11")),
    Flavour(
        "tensorrt_rtx",
        "TensorRT-RTX",
        ("tensorrt_rtx", "tensorrt_rtx_bindings"),
        ("tensorrt-rtx-cu12-bindings", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    ),
)


@dataclass(frozen=True)
class TensorRT:
    """NVIDIA's imported module, or a stand-in.

    Attributes:
        module: the module.
        name: ``tensorrt`` or ``tensorrt_rtx``.
        title: the product name, for messages.
    """

    module: Any
    name: str
    title: str

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which builds without a GPU."""
        return self.name == "tensorrt_rtx"

    def __str__(self) -> str:
        return f"{self.title} {self.version}"


def installed() -> list[Flavour]:
    """Return the installed flavours without importing them, ``tensorrt`` first."""
    return [flavour for flavour in FLAVOURS if any(importlib.util.find_spec(name) for name in flavour.modules)]


def installed_version(flavour: Flavour) -> str:
    """Return the version of a flavour without importing it; empty if no distribution of it is installed."""
    for name in flavour.distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def import_tensorrt(prefer: Iterable[str] = ()) -> TensorRT:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Args:
        prefer: names to try first; then ``tensorrt``, then ``tensorrt_rtx``.

    Returns:
        The first module that can be imported.

    Raises:
        UserError: neither is installed, or no installed one can be imported.
    """
    order = list(prefer)
    flavours = sorted(
        installed(), key=lambda flavour: order.index(flavour.name) if flavour.name in order else len(order)
    )
    failures = []
    for flavour in flavours:
        name = next(name for name in flavour.modules if importlib.util.find_spec(name))
        try:
            return TensorRT(importlib.import_module(name), flavour.name, flavour.title)
        except (ImportError, OSError, AttributeError, RuntimeError) as error:  # such as a wheel without its libraries
            failures.append(f"{name} cannot be imported ({' '.join(str(error).split())})")
    why = " and ".join(failures) or "neither tensorrt nor tensorrt_rtx is installed"
    raise UserError(f"{why}; install it: {INSTALL}")


def make_log(module: Any) -> Any:
    """Return an ``ILogger`` that prints nothing and collects error messages in ``errors``."""
    severity = module.ILogger.Severity

    class Log(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.errors.append(" ".join(str(message).split()))

        def first_error(self) -> str:
            """Return the first error message, which names the cause of the others."""
            return self.errors[0] if self.errors else "it does not say why"

    return Log()


def register_plugins(module: Any, log: Any) -> None:
    """Make NVIDIA's own plugins, such as ``EfficientNMS_TRT``, known to the parser and to the runtime.

    Args:
        module: NVIDIA's module; ``tensorrt_rtx`` has no plugins.
        log: see :func:`make_log`.
    """
    register = getattr(module, "init_libnvinfer_plugins", None)
    if register is not None:
        register(log, "")
