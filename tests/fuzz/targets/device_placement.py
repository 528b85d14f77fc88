"""A placement on a device: ``placement.json``, and the records of ``trtexec``."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from act_pipeline.compress.plan.on_device.study import FILENAME, SCHEMA, Study
from act_pipeline.engines.tensorrt.trtexec_records import read_compute_ms, read_layer_times
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files, raw

_MODEL = {"directory": "m", "model_filename": "model.pdmodel", "params_filename": "model.pdiparams", "hash": "x"}
_STUDY = {
    "schema": SCHEMA, "model": _MODEL, "float_model": _MODEL, "profile": {"image": [[1], [2], [2]]},
    "of": {"structure": "s", "target": "t4", "tensorrt": "10", "batch": 2, "export": "e", "int8_weights": False},
    "groups": [{"name": "a", "ops": ["b", "c"]}], "candidates": {"int8": [], "fp16": None, "group01": [0]},
    "steps": [[{"all": "int8", "a": "group01"}, {"all": "int8", "fp16": "fp16"}]], "versions": {},
}  # fmt: skip
_TIMES = [{"startComputeMs": 1.0, "computeMs": 2.5, "latencyMs": 9}, {"computeMs": 1.5}]
_PROFILE = [{"count": 3}, {"name": "a", "timeMs": 3, "averageMs": 1, "medianMs": 1, "percentage": 100}]
_SEEDS = {"study": _STUDY, "times": _TIMES, "profile": _PROFILE}


def _examples(folder: Path) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.sampled_from(list(_SEEDS)).flatmap(
        lambda kind: st.tuples(
            st.just(kind), st.one_of(json_files([_SEEDS[kind]]), raw([json.dumps(_SEEDS[kind]).encode()]))
        )
    )


def _read(folder: Path, example: tuple[str, bytes]) -> None:
    kind, content = example
    path = folder / FILENAME
    path.write_bytes(content)
    if kind == "times":
        assert read_compute_ms(path) > 0
    elif kind == "profile":
        assert read_layer_times(path)
    else:
        study = Study.load(folder)
        for number, questions in enumerate(study.steps, 1):
            assert len(study.turns(number).rounds[0]) == len(study.names(number))
            for asked in questions:
                study.question(asked)
        assert study.ops >= 0


DEVICE_PLACEMENT = Target("device placement", _examples, _read)
