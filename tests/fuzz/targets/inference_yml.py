"""``inference.yml`` beside a model of Paddle 3, PaddleX's file."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import strategies as st

from act_pipeline.core.artifacts import INFER_CFG_FILENAME
from act_pipeline.data.infer_cfg import Described
from act_pipeline.importers.paddle3.folder import Paddle3Folder, open_input_size
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw, yaml_files

_DETECTION = """mode: paddle
Global: {model_name: RT-DETR-L}
arch: DETR
Preprocess:
- {interp: 2, keep_ratio: false, target_size: [640, 640], type: Resize}
- {mean: [0.0, 0.0, 0.0], norm_type: none, std: [1.0, 1.0, 1.0], type: NormalizeImage}
- {type: Permute}
label_list: [person, bicycle]
"""
_TRANSFORM_OPS = """PreProcess:
  transform_ops:
  - DecodeImage: {img_mode: RGB, channel_first: false}
  - ResizeImage: {size: [256, 320], interpolation: BICUBIC}
  - NormalizeImage: {mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], scale: 1./255.}
  - ToCHWImage: null
names: {0: person, 1: bicycle}
"""


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    return st.one_of(yaml_files([_DETECTION, _TRANSFORM_OPS]), raw([_DETECTION.encode()]))


def _read(folder: Path, content: bytes) -> None:
    path = folder / "inference.yml"
    path.write_bytes(content)
    written = Paddle3Folder(folder, folder / "inference.json", folder / "inference.pdiparams", path).infer_cfg()
    assert yaml.safe_load(yaml.safe_dump(written)) == written or "nan" in str(written)
    assert all(isinstance(name, str) for name in written.get("label_list", ()))
    Described.of(written, INFER_CFG_FILENAME)
    open_input_size(written)


INFERENCE_YML = Target("inference_yml", _examples, _read)
