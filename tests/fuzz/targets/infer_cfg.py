"""``infer_cfg.yml`` beside a model, PaddleDetection's file, and those who ask it for names and preprocessing."""

from __future__ import annotations

from pathlib import Path

from hypothesis import strategies as st

from act_pipeline.core.artifacts import INFER_CFG_FILENAME, InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.paddledet import import_ppdet
from act_pipeline.data.infer_cfg import Described, check_transforms
from act_pipeline.data.reader_settings import load_settings
from act_pipeline.inference.picture import class_names
from tests.fuzz.harness import Target
from tests.fuzz.mutate import raw, yaml_files

_CONTENT = """mode: paddle
draw_threshold: 0.5
metric: COCO
use_dynamic_shape: false
arch: DETR
min_subgraph_size: 3
Preprocess:
- interp: 2
  keep_ratio: false
  target_size:
  - 640
  - 640
  type: Resize
- mean: [0.0, 0.0, 0.0]
  norm_type: none
  std: [1.0, 1.0, 1.0]
  type: NormalizeImage
- type: Permute
label_list:
- person
- bicycle
"""


_READER = """EvalDataset: {name: COCODataSet, anno_path: a.json}
EvalReader:
  sample_transforms:
    - Decode: {}
    - Resize: {target_size: [640, 640], keep_ratio: false, interp: 2}
    - NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}
    - Permute: {}
"""


class _NoData:
    """A reader whose annotation file is not here."""

    @property
    def class_names(self) -> list[str]:
        raise UserError("no data")


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    import_ppdet("ppdet.data.transform")  # starts processes as it is imported
    labels = "label_list: [person, bicycle]\n"
    return st.one_of(yaml_files([_CONTENT, labels]), raw([_CONTENT.encode()]))


def _read(folder: Path, content: bytes) -> None:
    model = InferenceModel(folder)
    (folder / INFER_CFG_FILENAME).write_bytes(content)
    assert all(isinstance(name, str) for name in class_names(_NoData(), model))
    assert isinstance(model.infer_cfg(), dict)
    reader = folder / "reader.yml"
    reader.write_text(_READER)
    described = Described.of(model.infer_cfg(), INFER_CFG_FILENAME)
    check_transforms(described, load_settings(reader), size_is_known=False)


INFER_CFG = Target("infer_cfg", _examples, _read)
