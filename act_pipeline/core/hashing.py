"""Content hashes of files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

_CHUNK_BYTES = 1 << 20


def hash_files(paths: Iterable[str | os.PathLike[str]]) -> str:
    """Return ``sha256:<hex>`` of the concatenated contents of the files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"
