"""COCO annotation files: ``data.annotations``, the images that they name, and pycocotools on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from act_pipeline.data.annotations import Annotations
from act_pipeline.data.dataset import coco_records
from act_pipeline.data.reader_settings import CocoDataSet
from act_pipeline.evaluation import evaluate
from tests.fuzz.harness import Target
from tests.fuzz.mutate import json_files

_CONTENT: dict[str, Any] = {
    "info": {"description": "two pictures"},
    "images": [
        {"id": 100, "file_name": "0.png", "height": 40, "width": 64},
        {"id": 101, "file_name": "1.png", "height": 48, "width": 64},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 100,
            "category_id": 7,
            "bbox": [1, 2, 30, 20],
            "area": 600,
            "iscrowd": 0,
            "segmentation": [],
        },
        {"id": 2, "image_id": 101, "category_id": 3, "bbox": [1.5, 2, 30.25, 20], "iscrowd": 1, "ignore": 0},
    ],
    "categories": [{"id": 7, "name": "disc", "supercategory": "x"}, {"id": 3, "name": "square"}],
}


class _Engine:
    """Finds the same box of each class in every image."""

    name, precision, device, threads = "none", "fp32", "GPU", 1

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = len(batch["im_id"])
        return {
            "bbox": np.array([[0, 0.9, 1, 2, 31, 22], [1, 0.8, 1, 2, 31, 22]] * images, np.float32),
            "bbox_num": np.array([2] * images, np.int32),
        }


class _Batches:
    def __init__(self, path: Path, ids: list[int]) -> None:
        self.path, self.ids = path, ids

    def annotation_file(self, split: str) -> Path:
        return self.path

    def loader(self, split: str, **options: Any) -> list[dict[str, np.ndarray]]:
        return [{"im_id": np.array([image_id], np.int64)} for image_id in self.ids]


def _examples(folder: Path) -> st.SearchStrategy[bytes]:
    without = copy.deepcopy(_CONTENT)
    del without["annotations"]
    return json_files(
        [_CONTENT, _CONTENT, without], keys=("segmentation", "ignore", "num_keypoints", "file_name", "id", "area")
    )


def _read(folder: Path, content: bytes) -> None:
    path = folder / "annotations.json"
    path.write_bytes(content)
    annotations = Annotations.load(path, "reader.yml: EvalDataset.anno_path")
    annotations.images_with_boxes()
    for training in (False, True):
        coco_records(CocoDataSet("annotations.json", allow_empty=True, empty_ratio=0.5), annotations, folder, training)
    evaluate(_Engine(), _Batches(path, [image["id"] for image in annotations.images[:3]]), progress=False)


ANNOTATIONS = Target("annotations", _examples, _read)
