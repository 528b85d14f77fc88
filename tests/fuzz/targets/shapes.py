"""``dynamic_shape.txt`` and the record beside it: ``engines.paddle.dynamic_shape.stale_reason``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.hashing import hash_files
from act_pipeline.engines.paddle.dynamic_shape import SCHEMA, ShapeKey, record_path, shapes_path, stale_reason
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files, raw

_KEY = ShapeKey(f"sha256:{'0' * 64}", (64, 64), 4, "2.6.2")
_SHAPES = b"""shape_range_info {
  name: "image"
  min_shape: 1
  min_shape: 3
  max_shape: 4
  max_shape: 3
  opt_shape: 1
  opt_shape: 3
}
"""


def _examples(folder: Path) -> st.SearchStrategy[Any]:
    (folder / "shapes").write_bytes(_SHAPES)
    record = {
        "schema": SCHEMA,
        "model_hash": _KEY.model_hash,
        "input_size": list(_KEY.input_size),
        "max_batch_size": 4,
        "paddle": "2.6.2",
        "device": "CPU",
        "shapes_hash": hash_files([folder / "shapes"]),
    }
    valid = json.dumps(record).encode()
    return st.one_of(
        st.tuples(st.just(_SHAPES), json_files([record])),
        st.tuples(raw([_SHAPES]), st.just(valid)),
        st.just((_SHAPES, valid)),
    )


def _read(folder: Path, example: tuple[bytes, bytes]) -> None:
    shapes, record = example
    model = InferenceModel(folder)
    shapes_path(model).write_bytes(shapes)
    record_path(model).write_bytes(record)
    reason = stale_reason(model, _KEY)
    # Paddle aborts on shapes that it did not write: what is not whole must never reach it.
    assert reason is not None or shapes == _SHAPES, "changed shapes are taken for whole ones"
    assert reason is None or len(reason.splitlines()) == 1, f"the reason is no one line: {reason!r}"


SHAPES = Target("shapes", _examples, _read)
