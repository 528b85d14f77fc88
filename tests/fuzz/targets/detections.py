"""``detections.npz``: ``evaluation.load_detections``."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from act_pipeline.evaluation import best_detections, load_detections
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw

_ROWS = np.array([[0, 1, 2, 30, 20, 0.9, 7], [1, 1, 2, 30, 20, 0.8, 3]], np.float32)
_IMAGES = {"image_ids": np.int64([100, 101]), "image_names": np.uint32([1, 2])}
_HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (99999999999, 7), }",
    "{'descr': '<f4', 'fortran_order': 0, 'shape': (-1, 7), }",
    "{'descr': '<U9', 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': '<c8', 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 30 + ", 0), }",
    "(" * 3000,
    "__import__('os').system('x')",
    "{}",
    "[1]",
    "{'descr': {}, 'fortran_order': False, 'shape': (2, 7), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 7), }",
)


def _archive(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def _array(header: str, data: bytes) -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _bomb() -> bytes:
    """Return an archive that is 600 MB when it is unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("int8.npy", "w") as file:
        file.write(_array("{'descr': '<f4', 'fortran_order': False, 'shape': (21500000, 7), }", b""))
        for _ in range(43):
            file.write(b"\0" * 14_000_000)
    return buffer.getvalue()


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, fp32=_ROWS, int8=np.asfortranarray(_ROWS), **_IMAGES)
    valid = buffer.getvalue()
    plain = _array(_HEADERS[0], _ROWS.tobytes())
    images = {f"{name}.npy": _saved(array) for name, array in _IMAGES.items()}
    # The checksums of a zip file stop most flips, so what is in it is broken before it is packed, too.
    inside = st.one_of(raw([plain]), st.sampled_from(_HEADERS).map(lambda header: _array(header, _ROWS.tobytes())))
    packed = st.builds(
        lambda name, content, method: _archive({"fp32.npy": plain, **images, name: content}, method),
        st.sampled_from(
            [
                "int8.npy",
                "image_ids.npy",
                "image_names.npy",
                "int8",
                "../../x.npy",
                "/tmp/x.npy",
                "fp32.npy",
                "\u202e.npy",
                ".npy",
            ]
        ),
        inside,
        st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]),
    )
    return st.one_of(raw([valid]), packed, inside, st.just(_bomb()))


def _read(folder: Path, content: bytes) -> None:
    path = folder / "detections.npz"
    path.write_bytes(content)
    for rows in load_detections(path).rows.values():
        best_detections(rows)


DETECTIONS = Target("detections", _examples, _read)
