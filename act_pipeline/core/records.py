"""Atomic writing of artifact folders and files, and records in JSON."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from act_pipeline.core.errors import UserError
from act_pipeline.core.version import __version__

# Records that are read by another stage than the one that writes them; other schemas are defined next to their writers.
ACT_SCHEMA, ACT_FILENAME = "act_pipeline.act/1", "act.json"
ANALYSIS_SCHEMA, ANALYSIS_FILENAME = "act_pipeline.analysis/1", "analysis.json"
BENCHMARK_SCHEMA = "act_pipeline.benchmark/1"
# Suffix of the output folder if the best INT8 model is not within Strategy.max_drop.
BELOW_SUFFIX = ".below_max_drop"

_HASHED_CHUNK_BYTES = 1 << 20
_RECORDED_PACKAGES = (
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddleslim",
    "paddledet",
    "numpy",
    "pycocotools",
    "opencv-python",
    "opencv-python-headless",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "nncf",
    "tensorrt",
    "tensorrt-rtx-cu12",
)


@contextlib.contextmanager
def new_artifact(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``directory`` when the block ends without an error.

    An existing folder is replaced as a whole; after an error it is unchanged. A kill between the two renames is
    repaired by :func:`clear_leftovers`.

    Args:
        directory: the folder to create or replace.

    Raises:
        UserError: ``directory`` is a file.
    """
    target = Path(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file, expected a folder to write to: choose another --output_dir or --save_dir")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
        retired = None
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, retired / "was")
        os.replace(staging, target)
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_replaceable(directory: str | os.PathLike[str], record: str, flag: str) -> None:
    """Check that :func:`new_artifact` may replace a folder: it is absent, empty, or what an earlier run wrote.

    Args:
        directory: the folder.
        record: name of the record that every such folder has, ``act.json`` say.
        flag: the command's flag that names another place, for the message.

    Raises:
        UserError: it holds something else, which would be lost.
    """
    folder = Path(directory)
    if not folder.is_dir() or (folder / record).is_file():
        return
    found = sorted(path.name for path in folder.iterdir())
    if found:
        raise UserError(
            f"{folder} holds {', '.join(found[:3])}{' and more' if len(found) > 3 else ''} and no {record}: it is not "
            f"what an earlier run wrote, and would be replaced as a whole; choose another {flag}"
        )


def clear_leftovers(directory: str | os.PathLike[str]) -> None:
    """Remove temporary folders that killed runs of :func:`new_artifact` left; call it when no other run is writing.

    A run killed between its two renames left the previous folder under a temporary name; it is renamed back.

    Args:
        directory: the folder that the runs were to create.
    """
    target = Path(directory)
    # mkdtemp adds eight characters to the prefix: the pattern must not match folders of `name.other`.
    for retired in sorted(target.parent.glob(f".{glob.escape(target.name)}.old.????????")):
        if (retired / "was").is_dir() and not target.exists():
            os.replace(retired / "was", target)
        shutil.rmtree(retired, ignore_errors=True)
    for staging in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        if staging.is_dir():
            shutil.rmtree(staging, ignore_errors=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 atomically: a reader always sees the old or the new file.

    Args:
        path: the file; missing folders are created.
        text: its new content.
    """
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: a reader always sees the old or the new file.

    Args:
        path: the file; missing folders are created.
        content: its new content.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_record(path: str | os.PathLike[str], schema: str, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically.

    Args:
        path: the file to write.
        schema: added as ``schema``, such as ``act_pipeline.eval/1``.
        record: values for JSON, without NaN and infinity; ``versions`` is added unless present.
    """
    body = {"schema": schema, **record}
    body.setdefault("versions", versions())
    write_text_atomically(path, json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_record(path: str | os.PathLike[str], schema: str) -> dict[str, Any]:
    """Read a record written by :func:`write_record`.

    Args:
        path: the file.
        schema: the expected schema.

    Returns:
        The record, including ``schema`` and ``versions``.

    Raises:
        UserError: the file is missing, cannot be read, is not a JSON object, or has another schema.
    """
    source = Path(path)
    try:
        record = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{source} is missing, expected a record ({schema}); the command that makes it has not run here"
        ) from None
    except (IsADirectoryError, NotADirectoryError):
        raise UserError(f"{source} is a folder or lies in a file, expected a record ({schema})") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error.strerror}), expected a record ({schema})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is no JSON: {error}; delete it and run again") from None
    if not isinstance(record, dict) or record.get("schema") != schema:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{source}: schema is {found!r}, expected {schema!r}; delete it and run again")
    return record


def as_number(value: Any) -> float | None:
    """Return a JSON value as a float; None if it is not a number, not finite, or too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with contextlib.suppress(OverflowError):
        return float(value) if math.isfinite(value) else None
    return None


def hash_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return ``sha256:<hex>`` of the concatenated contents of the files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_HASHED_CHUNK_BYTES):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def versions() -> dict[str, str]:
    """Return the versions of this package, Python, the platform and the installed packages that affect results."""
    found = {"act_pipeline": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
