"""The interface that every runtime implements, and the conversion of runtime exceptions to one-line errors."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from act_pipeline.core.artifacts import Artifact
from act_pipeline.core.errors import UserError

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("CPU", "GPU")
# The option ``requests``: as many parallel requests as the runtime recommends for the highest throughput.
AUTO_REQUESTS = 0
_PASS_STATISTICS = b"---    "
# The Python exceptions that pybind11 raises for a runtime's C++ exceptions.
_RUNTIME_ERRORS = (RuntimeError, ValueError, OSError, MemoryError, NotImplementedError, IndexError, SystemError)


@runtime_checkable
class Engine(Protocol):
    """A model loaded in one runtime, at one precision, on one device.

    Attributes:
        name: the runtime, a key of :data:`act_pipeline.engines.ENGINES`.
        precision: one of :data:`PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        threads: number of CPU threads that compute.
        artifact: what the runtime loaded: the Paddle model folder, or the ONNX file that it was exported to.

    An engine made with the option ``requests`` has it as an attribute, see :func:`parallel_requests`.
    """

    name: str
    precision: str
    device: str
    threads: int
    artifact: Artifact

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Detect objects in a batch; the results are in host memory when it returns.

        Args:
            inputs: ``image [N, 3, H, W]`` float32 as the reader normalizes it, ``im_shape [N, 2]`` float32 (height,
                width of the network's input, pixels), ``scale_factor [N, 2]`` float32 (input size / original size, y
                then x). Arrays of other names are ignored.

        Returns:
            ``bbox [K, 6]`` float32: class index, score, x1, y1, x2, y2 in pixels of the original image, the rows of
            image 0 first; ``bbox_num [N]`` int32: number of rows for each image, K in total.

        Raises:
            UserError: an input is missing or has a shape that the model does not accept, or the runtime fails.
        """

    def close(self) -> None:
        """Free the model. ``run`` must not be called afterwards; a second ``close`` does nothing."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the runtime and of its libraries, by name."""


def parallel_requests(engine: object) -> int:
    """Return from how many threads ``engine.run`` may be called at the same time; 1 for most engines."""
    return int(getattr(engine, "requests", 1))


@dataclass(frozen=True)
class EngineSupport:
    """Whether this machine can run an engine at a precision on a device.

    Attributes:
        engine: a name for :func:`act_pipeline.engines.create_engine`.
        precision: one of :data:`PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        available: whether the machine can run it.
        why: if not available, what is missing; otherwise the runtime version and the kernels used.
        remedy: what the user can do if it is not available; otherwise empty.
    """

    engine: str
    precision: str
    device: str
    available: bool
    why: str
    remedy: str = ""

    def require(self) -> None:
        """Check that the engine is available.

        Raises:
            UserError: it is not; the message names what is missing and the remedy.
        """
        if not self.available:
            raise UserError(
                f"{self.engine} {self.precision} on {self.device} cannot run here: {self.why}; {self.remedy}"
            )


def runtime_error_line(error: BaseException) -> str:
    """Return the sentence of a runtime's error that names the cause, without C++ traceback and hints.

    Paddle 2.6 writes ``(InvalidArgument) Sentence.``, then ``[Hint: ...]`` and ``(at file.cc:123)`` on further lines.
    The other runtimes put the cause in the last line. The exception is an op that OpenVINO does not support: its last
    line names a consequence, and an earlier one the op.

    Args:
        error: the exception.

    Returns:
        One line; the name of the exception type if the message is empty.
    """
    text = str(error)
    unknown = re.search(r"No conversion rule found for operations: .*", text)
    if unknown:
        return unknown.group(0)
    found = re.search(
        r"^\s*(\([A-Z]\w+\) .*?)(?=\n\s*\[Hint|\s*\(at /|\n\s*\[operator|\Z)", text, re.DOTALL | re.MULTILINE
    )
    sentence = found.group(1) if found else next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return " ".join(sentence.split()) or type(error).__name__


@contextlib.contextmanager
def refusals(what: str, remedy: str = "", also: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Convert a runtime's exceptions to UserError while the block runs; a UserError is passed on unchanged.

    Args:
        what: the failed operation, such as ``OpenVINO cannot load DIR``.
        remedy: what the user can do, appended to the message.
        also: exception types of the runtime that derive from ``Exception`` alone.

    Raises:
        UserError: the runtime raised.
    """
    refused: tuple[type[BaseException], ...] = (*_RUNTIME_ERRORS, *also)
    try:
        yield
    except refused as error:
        raise UserError(f"{what}: {runtime_error_line(error)}{remedy}") from error


@contextlib.contextmanager
def without_pass_log() -> Iterator[None]:
    """Suppress the pass statistics that Paddle writes to stderr while the block runs; other lines are written.

    The oneDNN INT8 passes of Paddle 2.6.2 print some thirty lines (``---    squashed 0 quantize with ...``) that
    ``disable_glog_info`` does not suppress. C++ writes them, so file descriptor 2 is redirected to a temporary file
    during the block.
    """
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed: Paddle cannot write to it either
        yield
        return
    with tempfile.TemporaryFile() as log:
        try:
            os.dup2(log.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            log.seek(0)
            for line in log:
                if _PASS_STATISTICS not in line:
                    os.write(kept, line)
            os.close(kept)
