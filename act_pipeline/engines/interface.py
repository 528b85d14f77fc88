"""What every runtime answers to, and how an :class:`EngineSupport` turns into one line for the user."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Union, runtime_checkable

import numpy as np

from act_pipeline.core.artifacts import InferenceModel, OnnxModel
from act_pipeline.core.errors import UserError

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
DEVICES = ("CPU", "GPU")
Artifact = Union[InferenceModel, OnnxModel]
_PASS_STATISTICS = b"---    "
# What pybind11 makes of a runtime's C++ exceptions.
_RUNTIME_ERRORS = (RuntimeError, ValueError, OSError, MemoryError, NotImplementedError, IndexError, SystemError)


@runtime_checkable
class Engine(Protocol):
    """A model loaded in one runtime, at one precision, on one device.

    Attributes:
        name: the runtime, a key of :data:`act_pipeline.engines.ENGINES`.
        precision: one of :data:`PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        threads: CPU threads that compute.
        artifact: what the runtime loaded: the model's folder, or the ONNX file that it was lowered to.
    """

    name: str
    precision: str
    device: str
    threads: int
    artifact: Artifact

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Detect objects in a batch; when it returns, the results are in host memory.

        Args:
            inputs: ``image [N, 3, H, W]`` float32 as the reader normalizes it, ``im_shape [N, 2]`` float32 (height,
                width of the network's input, pixels), ``scale_factor [N, 2]`` float32 (input size / original size, y
                then x). Arrays of other names are ignored.

        Returns:
            ``bbox [K, 6]`` float32: class index, score, x1, y1, x2, y2 in pixels of the original image, the rows of
            image 0 first; ``bbox_num [N]`` int32: rows of each image, K in all.

        Raises:
            UserError: an input is missing or of a shape that the model does not take, or the runtime refuses.
        """

    def close(self) -> None:
        """Free the model; ``run`` must not be called after it. A second call does nothing."""

    def versions(self) -> dict[str, str]:
        """Return the versions of what computes: the runtime and the libraries under it."""


@dataclass(frozen=True)
class EngineSupport:
    """Whether this machine can run an engine at a precision on a device.

    Attributes:
        engine: a name for :func:`act_pipeline.engines.create_engine`.
        precision: one of :data:`PRECISIONS`.
        device: ``CPU`` or ``GPU``.
        available: it can.
        why: what is missing; for an available one, how it computes.
        remedy: what to do about it; empty for an available one.
    """

    engine: str
    precision: str
    device: str
    available: bool
    why: str
    remedy: str = ""

    def require(self) -> None:
        """Raise a UserError saying what is missing and what would work, unless available."""
        if not self.available:
            raise UserError(
                f"{self.engine} {self.precision} on {self.device} cannot run here: {self.why}; {self.remedy}"
            )


def location(model: Artifact) -> Path:
    """Return what a user calls a model: the folder, or the ONNX file."""
    return model.path if isinstance(model, OnnxModel) else model.directory


def runtime_error_line(error: BaseException) -> str:
    """Return the one sentence of a runtime's error that says what happened, without C++ traceback and hints.

    Paddle 2.6 writes ``(InvalidArgument) Sentence.`` then, on more lines, ``[Hint: ...]`` and ``(at file.cc:123)``; the
    others have it in their last line, but OpenVINO, which names there what follows from an op that it does not know.
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
    """Turn a runtime's exceptions into a UserError while the block runs; errors of ours pass.

    Args:
        what: what was tried, such as ``OpenVINO cannot load DIR``.
        remedy: what the user can do, appended.
        also: exception types of the runtime that derive from none of Python's usual ones.
    """
    refused: tuple[type[BaseException], ...] = (*_RUNTIME_ERRORS, *also)
    try:
        yield
    except refused as error:
        raise UserError(f"{what}: {runtime_error_line(error)}{remedy}") from error


@contextlib.contextmanager
def without_pass_log() -> Iterator[None]:
    """Drop the pass statistics that Paddle writes to stderr while the block runs; everything else gets through.

    Paddle 2.6.2's oneDNN INT8 passes print some thirty lines (``---    squashed 0 quantize with ...``) past its own log
    switch. They come from C++, so the file descriptor is turned to a file for as long as a model loads.
    """
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed: nothing can be written there anyway
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
