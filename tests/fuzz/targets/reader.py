"""The reader YAML: ``data.Reader``, down to the transforms of ppdet that it names, made and run on a picture."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from hypothesis import strategies as st

from act_pipeline.core.paddledet import import_ppdet
from act_pipeline.data import Reader
from tests.fuzz.harness import Target
from tests.fuzz.mutate import odd_values, yaml_files

_STEPS = """
    - Decode: {}
    - Resize: {target_size: [32, 32], keep_ratio: False, interp: 2}
    - NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}
    - Permute: {}
"""
_SLIM = f"""
metric: COCO
num_classes: 2
TrainDataset:
  !COCODataSet
    image_dir: images
    anno_path: annotations.json
    dataset_dir: data
EvalDataset:
  !COCODataSet
    image_dir: images
    anno_path: annotations.json
    dataset_dir: data
worker_num: 0
EvalReader:
  sample_transforms:{_STEPS}  batch_transforms:
    - PadBatch: {{pad_to_stride: 32}}
  batch_size: 2
  shuffle: false
  drop_last: false
"""
_DETECTION = f"""
EvalDataset:
  name: COCODataSet
  image_dir: images
  anno_path: annotations.json
  dataset_dir: data
  allow_empty: true
TestDataset:
  name: ImageFolder
  anno_path: data/annotations.json
TestReader:
  inputs_def:
    image_shape: [3, 32, 32]
  sample_transforms:{_STEPS}"""


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    from inference_fixtures import make_tiny_data

    make_tiny_data(folder / "data", images=2)
    transforms = import_ppdet("ppdet.data.transform")
    arguments = {
        name: list(inspect.signature(found.__init__).parameters)[1:]
        for name, found in vars(transforms).items()
        if inspect.isclass(found) and issubclass(found, transforms.BaseOperator)
    }

    @st.composite
    def steps(draw: st.DrawFn) -> bytes:
        name = draw(st.sampled_from(sorted(arguments)))
        chosen = draw(st.lists(st.sampled_from(arguments[name] or ["x"]), unique=True, max_size=3))
        values = st.one_of(st.integers(0, 64), st.floats(0, 2), st.lists(st.integers(0, 64), max_size=4), odd_values())
        body = json.dumps({name: {argument: draw(values) for argument in chosen}})
        body = body.replace("NaN", ".nan").replace("Infinity", ".inf")
        lines = _SLIM.splitlines()
        place = draw(st.sampled_from([index for index, line in enumerate(lines) if line.startswith("    - ")]))
        lines[place : place + draw(st.integers(0, 1))] = [f"    - {body}"]
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    return st.one_of(yaml_files([_SLIM, _DETECTION]), steps())


def _read(folder: Path, content: bytes) -> None:
    path = folder / "reader.yml"
    path.write_bytes(content)
    reader = Reader.load(path)
    splits = [split for split in ("eval", "train", "test") if split in reader.settings.datasets]
    reader.check(*splits)
    reader.num_classes, reader.class_names, reader.category_ids  # noqa: B018  (a property that reads)
    for split in splits:
        reader.fingerprint(split)
        next(iter(reader.loader(split, workers=0)))
    reader.input_size  # noqa: B018  (a property that reads)
    reader.with_input_size(16, 16)


READER = Target("reader", _examples, _read)
