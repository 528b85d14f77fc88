"""Download of weights from a URL: once, to a cache, atomically and with a hash."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urldefrag, urlparse

from act_pipeline.core.cache_dir import cache_directory, readable_caches
from act_pipeline.core.errors import UserError
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.progress import Progress

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 20
_FOLDER = "weights"
# No characters that are special to a path, a shell or a file system; shorter than 255, because the cache adds suffixes.
_FILE_NAME = r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,199}"


def is_url(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def fetch(url: str, progress: bool = True) -> Path:
    """Return the local copy of a file, downloaded unless the cache holds an undamaged one.

    Args:
        url: an ``http`` or ``https`` URL that ends in a file name; with ``#sha256=HEX`` at its end the hash is checked.
        progress: show a progress bar on stderr.

    Returns:
        Path of the file in the cache.

    Raises:
        UserError: the URL is malformed, the server cannot be reached or reports an error, the download is incomplete,
            or the hash differs.
    """
    try:
        address, fragment = urldefrag(url)
        name = Path(urlparse(address).path).name
    except ValueError as error:
        raise UserError(f"{url} is no URL ({error}), expected https://HOST/PATH/model.pdparams") from None
    expected = fragment[len("sha256=") :].lower() if fragment else None
    if expected is not None and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise UserError(f"{url} ends in #{fragment}, expected #sha256= and 64 hexadecimal digits, or nothing")
    if not re.fullmatch(_FILE_NAME, name):
        raise UserError(
            f"{address} names no file, expected a URL that ends in a file name such as model.pdparams, of "
            "letters, digits, '.', '-', '_' and '+'"
        )
    for cache in readable_caches():
        if _is_kept(cache / _FOLDER / name, address, expected):
            return cache / _FOLDER / name
    target = cache_directory() / _FOLDER / name
    target.parent.mkdir(parents=True, exist_ok=True)
    found = _download(address, target, expected, progress)
    _seal(target).write_text(f"{found} {address}\n", encoding="utf-8")
    return target


def _is_kept(target: Path, address: str, expected: str | None) -> bool:
    """Return whether ``target`` is an undamaged download from ``address`` and has the expected hash."""
    if not (os.access(target, os.R_OK) and os.access(_seal(target), os.R_OK)):
        return False
    known_hash, _, known_address = _seal(target).read_text(encoding="utf-8", errors="replace").strip().partition(" ")
    found = hash_files([target]).partition(":")[2]
    return known_address == address and found == known_hash and expected in (None, found)


def _seal(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _length(headers: Mapping[str, str]) -> int:
    """Return the size in bytes that a response announces; 0 if it announces none, or that of compressed content."""
    length = headers.get("Content-Length", "")
    encoded = headers.get("Content-Encoding", "identity") != "identity"
    return 0 if encoded or not re.fullmatch("[0-9]{1,18}", length) else int(length)


def _download(address: str, target: Path, expected: str | None, progress: bool) -> str:
    import requests

    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                # Without compression, because Content-Length must be comparable with the size of the file.
                headers = {"Accept-Encoding": "identity"}
                with requests.get(address, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
                    response.raise_for_status()
                    total = _length(response.headers)
                    with Progress(target.name, "B", total or None, shown=progress) as bar:
                        for chunk in response.iter_content(_CHUNK_BYTES):
                            file.write(chunk)
                            bar.update(len(chunk))
            except requests.HTTPError as error:
                raise UserError(f"{address} cannot be downloaded: {error}; check the URL") from None
            except requests.RequestException as error:
                reason = type(error).__name__
                raise UserError(
                    f"{address} cannot be reached ({reason}); offline, download it elsewhere and give its path"
                ) from None
        size = partial.stat().st_size
        if total and size != total:
            raise UserError(f"{address} was cut short: {size} of {total} bytes came; run it again")
        found = hash_files([partial]).partition(":")[2]
        if expected is not None and found != expected:
            raise UserError(f"{address} is not the file that was asked for: sha256 is {found}, expected {expected}")
        os.replace(partial, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return found
