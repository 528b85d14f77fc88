"""A list of class names, one a line, which ``anno_path`` may name."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from act_pipeline.data.classes import read_label_list
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    return raw([b"background\nperson\nbicycle\n", "\ufeff人\n自行车\n".encode()])


def _read(folder: Path, content: bytes) -> None:
    path = folder / "label_list.txt"
    path.write_bytes(content)
    names = read_label_list(path, "reader.yml: TestDataset.anno_path")
    assert names and all(isinstance(name, str) and name for name in names)


LABEL_LIST = Target("label_list", _examples, _read)
