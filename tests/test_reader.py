"""Readers: data sets, preprocessing equal to ppdet's, order, and messages for invalid data."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.classes import ModelClasses

cv2 = pytest.importorskip("cv2")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BCCD = SHARED / "data" / "bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the blood cell data set is not at hand")

READER = """\
metric: COCO
num_classes: 2

TrainDataset:
  !COCODataSet
    image_dir: images
    anno_path: annotations/train.json
    dataset_dir: data/

EvalDataset:
  !COCODataSet
    image_dir: images
    anno_path: annotations/eval.json
    dataset_dir: data/

worker_num: 0

EvalReader:
  sample_transforms:
    - Decode: {}
    - Resize: {target_size: [32, 48], keep_ratio: False, interp: 2}
    - NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}
    - Permute: {}
  batch_size: 2
  shuffle: false
  drop_last: false
"""
# Ids and categories are unsorted on purpose: ppdet sorts images by id and keeps the file's order of categories.
IMAGE_IDS = [70, 12, 35, 8, 99]
CATEGORIES = [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}]


def annotation_content(ids: list[int]) -> dict[str, Any]:
    """Return COCO annotations for images of 40 x 30 pixels; the last one has no box."""
    images = [{"id": id_, "file_name": f"{id_}.png", "width": 40 + id_ % 3, "height": 30} for id_ in ids]
    boxes = [
        {
            "id": number,
            "image_id": id_,
            "category_id": 9 if number % 2 else 4,
            "bbox": [1, 2, 10, 12],
            "area": 120,
            "iscrowd": 0,
        }
        for number, id_ in enumerate(ids[:-1])
    ]
    return {"images": images, "annotations": boxes, "categories": CATEGORIES}


@pytest.fixture()
def reader_file(tmp_path: Path) -> Path:
    """A reader file with five tiny images."""
    random = np.random.default_rng(0)
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "annotations").mkdir()
    for id_ in IMAGE_IDS:
        picture = random.integers(0, 256, (30, 40 + id_ % 3, 3), dtype=np.uint8)
        assert cv2.imwrite(str(tmp_path / "data" / "images" / f"{id_}.png"), picture)
    for split in ("train", "eval"):
        write_annotations(tmp_path, split, annotation_content(IMAGE_IDS))
    path = tmp_path / "reader.yml"
    path.write_text(READER, encoding="utf-8")
    return path


def write_annotations(folder: Path, split: str, content: Any) -> Path:
    path = folder / "data" / "annotations" / f"{split}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def ids_of(loader: Any) -> list[int]:
    return [int(id_) for batch in loader for id_ in batch["im_id"]]


def message_of(reader_file: Path, *overrides: str, split: str = "eval") -> str:
    with pytest.raises(UserError) as caught:
        Reader.load(reader_file, overrides).check(split)
    message = str(caught.value)
    assert "\n" not in message
    return message


def ppdet_batches(dataset: dict[str, Any], transforms: list[dict[str, Any]], batch_size: int) -> tuple[list[Any], Any]:
    """Return the batches of ppdet's COCODataSet and EvalReader, and the data set."""
    from act_pipeline.core.paddledet import import_ppdet

    import_ppdet()
    import paddle
    from ppdet.data.reader import EvalReader
    from ppdet.data.source.coco import COCODataSet

    source = COCODataSet(**dataset)
    source.check_or_download_dataset = lambda: None
    reader = EvalReader(sample_transforms=transforms, batch_size=batch_size, drop_last=False)
    paddle.disable_static()
    sampler = paddle.io.BatchSampler(source, batch_size=batch_size)
    source.parse_dataset()
    loader = reader(source, 0, batch_sampler=sampler, return_list=True)
    return [{key: np.array(value) for key, value in batch.items()} for batch in loader.dataloader], source


def test_importing_the_package_loads_no_framework() -> None:
    code = (
        "import act_pipeline.data, act_pipeline.config, sys\n"
        "print([m for m in ('paddle', 'ppdet', 'paddleslim') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_batches_have_the_shapes_and_types_that_the_graph_takes(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    loader = reader.loader("eval")
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch["im_id"]) for batch in batches] == [2, 2, 1]
    first = batches[0]
    assert {key: (value.shape, str(value.dtype)) for key, value in first.items()} == {
        "image": ((2, 3, 32, 48), "float32"),
        "im_shape": ((2, 2), "float32"),
        "scale_factor": ((2, 2), "float32"),
        "pad_offset": ((2, 2), "float32"),
        "im_id": ((2,), "int64"),
    }
    assert all(value.flags["C_CONTIGUOUS"] for value in first.values())
    assert first["im_shape"].tolist() == [[32, 48]] * 2
    assert ids_of(loader) == sorted(IMAGE_IDS)  # every image, including the one without a box
    width = 40 + 8 % 3
    np.testing.assert_allclose(first["scale_factor"][0], [32 / 30, 48 / width], rtol=1e-6)


def test_attributes(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    assert reader.input_size == (32, 48)
    assert reader.num_classes == 2 and reader.metric == "COCO"
    assert reader.category_ids == [9, 4] and reader.class_names == ["nine", "four"]
    assert reader.annotation_file("eval") == reader_file.parent / "data" / "annotations" / "eval.json"


def test_equal_to_ppdet_on_odd_ids(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    dataset = {
        "dataset_dir": str(reader_file.parent / "data"),
        "image_dir": "images",
        "anno_path": "annotations/eval.json",
        "allow_empty": True,
    }
    theirs, source = ppdet_batches(dataset, reader.settings.reader.sample_transforms, 1)
    assert {category: index for index, category in enumerate(reader.category_ids)} == source.catid2clsid
    by_id = {int(batch["im_id"]): batch for batch in theirs}
    ours = list(reader.loader("eval", batch_size=1))
    assert len(by_id) == len(ours) == 5
    for batch in ours:
        other = by_id[int(batch["im_id"][0])]
        for key in ("image", "im_shape", "scale_factor"):
            np.testing.assert_array_equal(batch[key], other[key])


@needs_bccd
def test_equal_to_ppdet_on_photographs(tmp_path: Path) -> None:
    text = READER.replace("num_classes: 2", "num_classes: 3").replace("data/", str(BCCD))
    text = text.replace("[32, 48]", "[256, 256]").replace("annotations/eval.json", "annotations/instances_test.json")
    path = tmp_path / "bccd.yml"
    path.write_text(text.replace("annotations/train.json", "annotations/instances_train.json"), encoding="utf-8")
    reader = Reader.load(path)
    reader.check("train", "eval")
    assert reader.class_names == ["RBC", "WBC", "Platelets"]
    assert len(reader.dataset("train")) == 292
    dataset = {"dataset_dir": str(BCCD), "image_dir": "images", "anno_path": "annotations/instances_test.json"}
    theirs, _ = ppdet_batches(dataset, reader.settings.reader.sample_transforms, 8)
    ours = list(reader.loader("eval", batch_size=8, workers=2))
    assert len(ours) == len(theirs) == 9
    for batch, other in zip(ours, theirs):
        np.testing.assert_array_equal(batch["im_id"], other["im_id"].reshape(-1))
        for key in ("image", "im_shape", "scale_factor"):
            np.testing.assert_array_equal(batch[key], other[key])
    assert len(reader.annotations("eval").ground_truth().getAnnIds()) == 945


def test_paddledetections_form_is_the_same(reader_file: Path) -> None:
    base = reader_file.parent / "coco_detection.yml"
    base.write_text(
        "metric: COCO\nnum_classes: 2\n"
        "TrainDataset:\n  name: COCODataSet\n  image_dir: images\n  anno_path: annotations/train.json\n"
        "  dataset_dir: data\n  data_fields: ['image', 'gt_bbox', 'gt_class', 'is_crowd']\n"
        "EvalDataset:\n  name: COCODataSet\n  image_dir: images\n  anno_path: annotations/eval.json\n"
        "  dataset_dir: data\n  allow_empty: true\n"
        "TestDataset:\n  name: ImageFolder\n  anno_path: annotations/eval.json\n  dataset_dir: data\n",
        encoding="utf-8",
    )
    own = reader_file.parent / "own.yml"
    own.write_text(
        "_BASE_: ['coco_detection.yml']\narchitecture: DETR\nworker_num: 4\n"
        + READER[READER.index("EvalReader:") :]
        + "TestReader:\n  inputs_def:\n    image_shape: [3, 32, 48]\n  sample_transforms:\n    - Decode: {}\n",
        encoding="utf-8",
    )
    for ours, theirs in zip(Reader.load(own).loader("eval"), Reader.load(reader_file).loader("eval")):
        assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(UserError, match="TestDataset.image_dir is missing"):
        Reader.load(own).dataset("test")
    assert ids_of(Reader.load(own, ["TestDataset.image_dir=images"]).loader("test")) == [0, 1, 2, 3, 4]


@pytest.mark.skipif(not (SHARED / "official_configs").is_dir(), reason="the published configs are not at hand")
@pytest.mark.parametrize("name", ["r18vd", "r50vd_m", "hgnetv2_x"])
def test_paddledetections_model_files_are_readers_too(name: str) -> None:
    reader = Reader.load(SHARED / "official_configs" / "paddledetection" / "rtdetr" / f"rtdetr_{name}_6x_coco.yml")
    assert reader.input_size == (640, 640) and reader.num_classes == 80
    assert reader.settings.reader.batch_size == 4
    assert reader.annotation_file("train").name == "instances_train2017.json"


@pytest.mark.skipif(not (SHARED / "official_configs").is_dir(), reason="the published configs are not at hand")
def test_paddleslims_reader_loads_with_one_node_a_key(tmp_path: Path) -> None:
    text = (SHARED / "official_configs" / "paddleslim" / "rtdetr_reader.yml").read_text(encoding="utf-8")
    second = (
        "  !COCODataSet\n    image_dir: val2017\n    anno_path: annotations/instances_val2017.json\n"
        "    dataset_dir: dataset/coco/\n"
    )
    path = tmp_path / "rtdetr_reader.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="key 'TrainDataset' has a second !COCODataSet node"):
        Reader.load(path)
    path.write_text(text.replace(second, "", 1), encoding="utf-8")
    reader = Reader.load(path)
    assert reader.settings.datasets["train"].image_dir == "train2017"
    assert reader.input_size == (640, 640)


@pytest.mark.parametrize(
    ("name", "size"),
    [("rtdetr", 640), ("custom", 640), ("yolo", 640), ("grounding_dino", 320), ("sam", 256)],
)
def test_ready_readers(name: str, size: int) -> None:
    reader = Reader.load(ROOT / "configs" / "readers" / f"{name}_reader.yml")
    assert reader.input_size == (size, size)
    assert {"train", "eval"} <= set(reader.settings.datasets)
    assert reader.preprocessing() is not None


def test_training_order_depends_on_seed_and_epoch_alone(reader_file: Path) -> None:
    reader = Reader.load(reader_file, ["TrainDataset.allow_empty=true"])
    loader = reader.loader("train", seed=3)
    epochs = [ids_of(loader) for _ in range(4)]
    assert all(sorted(ids) == sorted(IMAGE_IDS) for ids in epochs)
    assert len({tuple(ids) for ids in epochs}) > 1
    again = reader.loader("train", seed=3, workers=2, batch_size=3)
    assert [ids_of(again) for _ in range(4)] == epochs
    again.epoch = 2
    assert ids_of(again) == epochs[2]
    assert [ids_of(reader.loader("train", seed=seed)) for seed in range(6)] != [epochs[0]] * 6
    assert ids_of(reader.loader("train", shuffle=False)) == sorted(IMAGE_IDS)


def test_training_takes_what_ppdet_trains_on(reader_file: Path) -> None:
    content = annotation_content(IMAGE_IDS)
    content["annotations"][0]["iscrowd"] = 1  # image 70: only a crowd
    content["annotations"][1]["bbox"] = [1, 2, 0, 12]  # image 12: an empty box
    write_annotations(reader_file.parent, "train", content)
    assert sorted(ids_of(Reader.load(reader_file).loader("train"))) == [8, 35]
    assert sorted(ids_of(Reader.load(reader_file, ["TrainDataset.load_crowd=true"]).loader("train"))) == [8, 35, 70]
    assert len(Reader.load(reader_file, ["TrainDataset.allow_empty=true"]).dataset("train")) == 5
    half = ["TrainDataset.allow_empty=true", "TrainDataset.empty_ratio=0.34"]
    assert len(Reader.load(reader_file, half).dataset("train")) == 3
    assert len(Reader.load(reader_file, ["TrainDataset.sample_num=1", "TrainDataset.repeat=3"]).dataset("train")) == 3


def test_a_loader_can_be_called_and_left_early(reader_file: Path) -> None:
    """ACT calls the loader, and reads a single batch to inspect it."""
    before = threading.active_count()
    loader = Reader.load(reader_file).loader("train", workers=2)
    batches = loader()
    assert next(batches)["image"].shape == (2, 3, 32, 48)
    batches.close()
    assert threading.active_count() == before


def test_drop_last_and_short_sets(reader_file: Path) -> None:
    reader = Reader.load(reader_file, ["EvalReader.drop_last=true"])
    assert len(ids_of(reader.loader("eval"))) == 5  # a score needs every image
    train = reader.loader("train", batch_size=3)
    assert len(train) == 1 and len(ids_of(train)) == 3
    with pytest.raises(UserError, match="TrainDataset has 4 images, expected at least one batch of 8: lower"):
        reader.loader("train", batch_size=8)


def test_preprocess_is_the_loaders(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    one = reader.preprocess(reader_file.parent / "data" / "images" / "8.png")
    first = next(iter(reader.loader("eval", batch_size=1)))
    assert one["im_id"].tolist() == [0]
    for key in ("image", "im_shape", "scale_factor"):
        np.testing.assert_array_equal(one[key], first[key])
    with pytest.raises(UserError, match=r"none.png: No such file"):
        reader.preprocess(reader_file.parent / "none.png")
    with pytest.raises(UserError, match=r"reader.yml: it cannot be decoded as an image, expected a picture"):
        reader.preprocess(reader_file)


def test_batch_transforms_are_applied(reader_file: Path) -> None:
    text = READER.replace("keep_ratio: False", "keep_ratio: True").replace(
        "  batch_size: 2", "  batch_transforms:\n    - PadBatch: {pad_to_stride: 64}\n  batch_size: 2"
    )
    reader_file.write_text(text, encoding="utf-8")
    batch = next(iter(Reader.load(reader_file).loader("eval")))
    assert batch["image"].shape == (2, 3, 64, 64)
    reader_file.write_text(READER.replace("keep_ratio: False", "keep_ratio: True"), encoding="utf-8")
    with pytest.raises(UserError, match="the same for a whole batch"):
        list(Reader.load(reader_file).loader("eval", batch_size=5))
    with pytest.raises(UserError, match="fix no input size, expected Resize with keep_ratio: False"):
        assert Reader.load(reader_file).input_size


def test_another_input_size_and_another_data_set(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    larger = reader.with_input_size(64, 96)
    assert larger.input_size == (64, 96) and reader.input_size == (32, 48)
    assert next(iter(larger.loader()))["image"].shape == (2, 3, 64, 96)
    write_annotations(reader_file.parent, "few", annotation_content([8, 35, 12]))
    few = reader.with_dataset("eval", anno_path="annotations/few.json")
    assert ids_of(few.loader("eval")) == [8, 12, 35] and len(reader.dataset("eval")) == 5
    added = reader.with_dataset("test", image_dir="images", anno_path="annotations/few.json", dataset_dir="data")
    assert ids_of(added.loader("test")) == [8, 12, 35]
    with pytest.raises(UserError, match="TestDataset is missing, expected a !COCODataSet"):
        reader.loader("test")
    with pytest.raises(UserError, match="no split 'val', expected one of train, eval, test"):
        reader.loader("val")


def test_fingerprint(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    fingerprint = reader.fingerprint()
    assert fingerprint.startswith("sha256:") and len(fingerprint) == 71
    assert Reader.load(reader_file, ["EvalReader.batch_size=7", "worker_num=3"]).fingerprint() == fingerprint
    assert reader.with_input_size(64, 96).fingerprint() != fingerprint
    assert Reader.load(reader_file, ["EvalDataset.sample_num=2"]).fingerprint() != fingerprint
    assert reader.fingerprint("train") != fingerprint
    content = annotation_content(IMAGE_IDS)
    content["annotations"][0]["bbox"] = [1, 2, 10, 13]
    write_annotations(reader_file.parent, "eval", content)
    assert Reader.load(reader_file).fingerprint() != fingerprint


def test_ground_truth_is_pycocotools_own(reader_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fields that COCOeval needs are filled in, and the id 0, which means "not matched", is replaced."""
    content = annotation_content(IMAGE_IDS)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    content["annotations"].append({"id": 50, "image_id": 8, "category_id": 4, "caption": "no box"})
    write_annotations(reader_file.parent, "eval", content)
    truth = Reader.load(reader_file).annotations("eval").ground_truth()
    annotations = truth.loadAnns(truth.getAnnIds())
    assert [annotation["id"] for annotation in annotations] == [1, 2, 3, 4]
    assert all(annotation["area"] == 120 and annotation["iscrowd"] == 0 for annotation in annotations)
    assert truth.getCatIds() == [9, 4]
    assert capfd.readouterr().out == ""


def test_a_class_count_that_differs(reader_file: Path) -> None:
    message = message_of(reader_file, "num_classes=80")
    assert "num_classes is 80" in message and "eval.json has 2 categories (nine, four)" in message
    assert "set num_classes to 2" in message
    reader_file.write_text(READER.replace("num_classes: 2\n", ""), encoding="utf-8")
    assert Reader.load(reader_file).num_classes == 2


@pytest.mark.parametrize(
    "content, parts",
    [
        ("{'images': []}", ["is no JSON (line 1, column 2", "expected COCO's form", "EvalDataset.anno_path"]),
        ("", ["is no JSON (line 1, column 1"]),
        ("[" * 100_000, ["is no JSON"]),
        ([], ["holds no JSON object"]),
        ({}, ["has no images, expected COCO's form"]),
        ({"images": []}, ["has an empty list of images"]),
        ({"images": [{"id": 1}]}, ["images[0] has no 'file_name'"]),
        ({"images": [{"id": "1", "file_name": "a"}]}, ["images[0].id is '1', expected a whole number"]),
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]},
            ["images[1].id is 1, which another has"],
        ),
        ({"images": [{"id": 1, "file_name": 3}], "categories": CATEGORIES}, ["file_name of image 1 is no text"]),
        ({"images": [{"id": 1, "file_name": "a"}]}, ["has no categories"]),
        ({"images": [{"id": 1, "file_name": "a"}], "categories": CATEGORIES}, ["has no boxes in 'annotations'"]),
    ],
)
def test_annotation_files_that_are_wrong(reader_file: Path, content: Any, parts: list[str]) -> None:
    path = write_annotations(reader_file.parent, "eval", content)
    message = message_of(reader_file)
    assert str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "change, part",
    [
        ({"image_id": 5}, "annotations[1].image_id is 5, which no image has"),
        ({"category_id": 1}, "annotations[1].category_id is 1, which no category has"),
        ({"bbox": [1, 2, 3]}, "annotations[1].bbox is [1, 2, 3], expected four numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotations[1].bbox is [1, 2, 3, nan], expected four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "annotations[1].bbox is"),
        ({"bbox": "1 2 3 4"}, "expected four numbers"),
        ({"area": "12"}, "annotations[1]: area is '12'"),
        ({"iscrowd": 7}, "iscrowd 7, expected a number, and 0 or 1"),
    ],
)
def test_annotations_that_are_wrong(reader_file: Path, change: dict[str, Any], part: str) -> None:
    content = annotation_content(IMAGE_IDS)
    content["annotations"][1].update(change)
    path = write_annotations(reader_file.parent, "eval", content)
    message = message_of(reader_file)
    assert str(path) in message and part in message


def test_a_missing_annotation_file(reader_file: Path) -> None:
    path = reader_file.parent / "data" / "annotations" / "eval.json"
    path.unlink()
    message = message_of(reader_file)
    assert f"annotation file {path} does not exist, named by {reader_file}: EvalDataset.anno_path" in message
    assert "check anno_path and dataset_dir" in message


def test_all_images_missing(reader_file: Path) -> None:
    message = message_of(reader_file, "EvalDataset.image_dir=pictures")
    assert str(Path("data") / "pictures" / "8.png") in message and "missing" in message
    assert "5 of the 5 images" in message and "expected at most 1.0%" in message and "check image_dir" in message


def test_a_missing_image_within_the_share_is_skipped(reader_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = reader_file.parent / "data" / "images" / "12.png"
    gone.unlink()
    assert "1 of the 5 images" in message_of(reader_file)
    reader = Reader.load(reader_file, ["max_bad_share=0.2"])
    loader = reader.loader("eval")
    assert len(loader) == 2 and ids_of(loader) == [8, 35, 70, 99]
    assert str(gone) in caplog.text and "skipped (1 of 5 images so far)" in caplog.text
    assert reader.dataset("eval").skipped == [str(gone)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\x00" * 40])
def test_an_image_that_cannot_be_decoded(
    reader_file: Path, caplog: pytest.LogCaptureFixture, workers: int, broken: bytes
) -> None:
    path = reader_file.parent / "data" / "images" / "35.png"
    path.write_bytes(broken)
    with pytest.raises(UserError) as caught:
        ids_of(Reader.load(reader_file).loader("eval", workers=workers))
    assert f"{path}: not readable (it cannot be decoded as an image); 1 of the 5 images" in str(caught.value)
    assert str(path) in message_of(reader_file)
    reader = Reader.load(reader_file, ["max_bad_share=0.2"])
    loader = reader.loader("eval", workers=workers)
    batches = list(loader)
    assert [batch["im_id"].tolist() for batch in batches] == [[8, 12], [70, 99]]  # replaced by the next image
    assert len(loader) == 2 and ids_of(loader) == [8, 12, 70, 99]
    assert caplog.text.count(str(path)) == 1  # reported once, not once per epoch


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("EvalDataset:", "EvalDatset:", ["{path}: EvalDatset is not a known key; did you mean 'EvalDataset'?"]),
        ("EvalReader:", "EvalRaeder:", ["EvalRaeder is not a known key; did you mean 'EvalReader'?"]),
        ("metric: COCO", "metric: VOC", ["{path}: metric is the text 'VOC', expected COCO"]),
        (
            "num_classes: 2",
            "num_classes: two",
            ["{path}: num_classes is the text 'two', expected a whole number at least 1"],
        ),
        ("num_classes: 2", "max_bad_share: 3", ["max_bad_share is the number 3", "at most 1"]),
        (
            "    anno_path: annotations/eval.json",
            "    ano_path: x",
            ["{path}: EvalDataset.ano_path is not a known key", "did you mean 'anno_path'?"],
        ),
        ("    anno_path: annotations/eval.json\n", "", ["EvalDataset.anno_path is missing"]),
        (
            "    anno_path: annotations/eval.json",
            "    anno_path: [a.json, b.json]",
            ["anno_path is a list of 2, expected text"],
        ),
        (
            "  batch_size: 2",
            "  batch_size: 0",
            ["{path}: EvalReader.batch_size is the number 0, expected a whole number at least 1"],
        ),
        ("  shuffle: false", "  shuffle: 'false'", ["EvalReader.shuffle is the text 'false', expected true or false"]),
        (
            "  batch_size: 2",
            "  batchsize: 2",
            ["EvalReader.batchsize is not a known key", "did you mean 'batch_size'?"],
        ),
        ("    - Decode: {}", "    - Decod: {}", ["begin with Decod, expected Decode"]),
        ("    - Decode: {}\n", "", ["begin with Resize, expected Decode"]),
        (
            "    - Permute: {}",
            "    - Permut: {}",
            ["EvalReader.sample_transforms[3] is Permut", "did you mean 'Permute'?"],
        ),
        (
            "    - Permute: {}",
            "    - Permute: {to_bgr: false}",
            ["sample_transforms[3].Permute.to_bgr is not an argument"],
        ),
        ("    - Permute: {}", "    - Permute", ["sample_transforms[3] is the text 'Permute', expected a mapping"]),
        (
            "    - Permute: {}",
            "    - Permute: 3",
            ["sample_transforms[3]: Permute is the number 3, expected a mapping"],
        ),
        ("    - Permute: {}", "    - {Permute: {}, Decode: {}}", ["sample_transforms[3] has 2 names, expected one"]),
        ("    - Permute: {}\n", "", ["expected [3, height, width]", "end with Permute"]),
        ("target_size: [32, 48], ", "", ["sample_transforms[1].Resize is refused by ppdet"]),
        (
            "target_size: [32, 48]",
            "target_sise: [32, 48]",
            ["Resize.target_sise is not an argument", "did you mean 'target_size'?"],
        ),
        ("interp: 2", "interp: 200", ["Resize fails on", "8.png"]),
        ("std: [1., 1., 1.]", "std: [0., 1., 1.]", ["NormalizeImage is refused by ppdet"]),
    ],
)
def test_mistakes_in_the_reader_file(reader_file: Path, old: str, new: str, parts: list[str]) -> None:
    head, tail = READER.split("EvalDataset:")
    whole = "EvalDataset:" + tail
    changed = head.replace(old, new, 1) + whole if old in head else head + whole.replace(old, new, 1)
    assert changed != READER
    reader_file.write_text(changed, encoding="utf-8")
    message = message_of(reader_file)
    assert str(reader_file) in message
    for part in parts:
        assert part.format(path=reader_file) in message


def test_other_kinds_of_data_sets(reader_file: Path) -> None:
    assert "EvalDataset is of the kind 'VOCDataSet', expected COCODataSet" in message_of(
        reader_file, "EvalDataset={name: VOCDataSet}"
    )
    assert "EvalDataset is a list of 2, expected one !COCODataSet node" in message_of(
        reader_file, "EvalDataset=[{}, {}]"
    )
    reader_file.write_text("metric: COCO\n", encoding="utf-8")
    assert f"{reader_file} has no data set, expected EvalDataset" in message_of(reader_file)
    reader_file.write_text(READER[: READER.index("EvalReader:")], encoding="utf-8")
    assert f"{reader_file}: EvalReader is missing" in message_of(reader_file)


# --- files of other tools, folders and images -------------------------------------------------------------------------


def test_annotations_as_other_tools_write_them(reader_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ids like 3.0, `bbox: []`, no iscrowd, null areas and boxes over the edge: the same truth as the plain file."""
    plain = annotation_content(IMAGE_IDS)
    plain["annotations"][1]["bbox"] = [-3.5, 2.25, 10.5, 12]
    write_annotations(reader_file.parent, "eval", plain)
    expected = Reader.load(reader_file).annotations("eval")
    other = json.loads(json.dumps(plain))
    for entry in (*other["images"], *other["categories"]):
        entry["id"] = float(entry["id"])
    for box in other["annotations"]:
        box["image_id"], box["category_id"] = float(box["image_id"]), float(box["category_id"])
        box["area"] = None
        box["iscrowd"] = None
    plain_areas = {tuple(box["bbox"]): box["bbox"][2] * box["bbox"][3] for box in plain["annotations"]}
    other["annotations"] += [
        {"id": 60, "image_id": 99.0, "category_id": 9, "bbox": []},
        {"id": 61, "image_id": 99, "category_id": 9, "bbox": [5, 5, 0, 4]},
        {"id": 62, "image_id": 99, "category_id": 9, "bbox": [5, 5, -3, -4]},
    ]
    write_annotations(reader_file.parent, "eval", other)
    reader = Reader.load(reader_file)
    reader.check("eval")
    found = reader.annotations("eval")
    assert found.category_ids == [9, 4] and all(type(box["image_id"]) is int for box in found.boxes)
    assert [image["id"] for image in found.images] == [image["id"] for image in expected.images]
    assert [box["bbox"] for box in found.boxes] == [box["bbox"] for box in expected.boxes]
    assert all(box["area"] == plain_areas[tuple(box["bbox"])] and box["iscrowd"] == 0 for box in found.boxes)
    assert "2 of 7 boxes have no width or height (the first is annotations[5]: [5, 5, 0, 4]); left out" in caplog.text
    assert sorted(found.ground_truth().getImgIds()) == sorted(IMAGE_IDS)
    assert ids_of(reader.loader("eval")) == sorted(IMAGE_IDS)


def test_boxes_outside_their_picture_are_reported(reader_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = annotation_content(IMAGE_IDS)
    image = content["images"][0]
    width, height = image["width"], image["height"]
    for bbox in ([5000, 5000, 50, 50], [-9, 2, 9, 5], [2, height, 5, 5], [width - 1, height - 1, 9, 9], [1, 1, 0, 5]):
        content["annotations"].append(
            {"id": 100, "image_id": image["id"], "category_id": content["categories"][0]["id"], "bbox": bbox}
        )
    write_annotations(reader_file.parent, "eval", content)
    reader = Reader.load(reader_file)
    assert len(reader.annotations("eval").boxes) == len(content["annotations"]) - 1  # only the one without a width
    lines = [record.getMessage() for record in caplog.records if "boxes" in record.getMessage()]
    assert len(lines) == 2 and "1 of " in lines[0] and "have no width or height" in lines[0]
    assert "3 of " in lines[1] and "lie wholly outside their picture" in lines[1] and "[5000, 5000, 50, 50]" in lines[1]


@pytest.mark.parametrize("number", [1.5, "1", True, None, 1e300])
def test_an_id_that_is_no_whole_number(reader_file: Path, number: Any) -> None:
    content = annotation_content(IMAGE_IDS)
    content["images"][0]["id"] = number
    write_annotations(reader_file.parent, "eval", content)
    assert f"images[0].id is {number!r}, expected a whole number" in message_of(reader_file)


def test_two_categories_of_one_name_are_told_apart(reader_file: Path) -> None:
    content = annotation_content(IMAGE_IDS)
    content["categories"] = [{"id": 9, "name": "cell"}, {"id": 4, "name": "cell"}]
    write_annotations(reader_file.parent, "eval", content)
    assert Reader.load(reader_file).class_names == ["cell (id 9)", "cell (id 4)"]
    with pytest.raises(UserError, match="have one name, which .* names once"):
        Reader.load(reader_file).with_classes(ModelClasses.named(["cell"], "infer_cfg.yml")).check("eval")


@pytest.mark.parametrize(
    "spelled", ["sub/{}", "sub\\{}", "C:\\Users\\me\\sub\\{}", "/home/elsewhere/data/images/sub/{}"]
)
def test_file_names_with_folders_of_any_machine(reader_file: Path, spelled: str) -> None:
    images = reader_file.parent / "data" / "images"
    (images / "sub").mkdir()
    for id_ in IMAGE_IDS:
        (images / f"{id_}.png").rename(images / "sub" / f"{id_}.png")
    content = annotation_content(IMAGE_IDS)
    for image in content["images"]:
        image["file_name"] = spelled.format(image["file_name"])
    write_annotations(reader_file.parent, "eval", content)
    assert ids_of(Reader.load(reader_file).loader("eval")) == sorted(IMAGE_IDS)


def test_a_backslash_that_is_in_the_name_itself(reader_file: Path) -> None:
    """On Linux, an archive made on Windows can unpack to files with such names."""
    images = reader_file.parent / "data" / "images"
    content = annotation_content(IMAGE_IDS)
    for image in content["images"]:
        (images / image["file_name"]).rename(images / f"sub\\{image['file_name']}")
        image["file_name"] = f"sub\\{image['file_name']}"
    write_annotations(reader_file.parent, "eval", content)
    assert ids_of(Reader.load(reader_file).loader("eval")) == sorted(IMAGE_IDS)


def test_hidden_files_of_notebooks_and_macs_are_no_pictures(reader_file: Path) -> None:
    images = reader_file.parent / "data" / "images"
    expected = [str(images / f"{id_}.png") for id_ in sorted(map(str, IMAGE_IDS))]
    for folder in (".ipynb_checkpoints", "__MACOSX/images", "deep/.ipynb_checkpoints"):
        (images / folder).mkdir(parents=True)
        (images / folder / "8-checkpoint.png").write_bytes((images / "8.png").read_bytes())
    (images / "._8.png").write_bytes(b"a Mac's notes on 8.png")
    (images / ".DS_Store").write_bytes(b"")
    overrides = ["TestDataset={name: ImageFolder, image_dir: images, dataset_dir: data}"]
    dataset = Reader.load(reader_file, overrides).dataset("test")
    assert [record.file for record in dataset.records] == [str(Path(file)) for file in expected]


def test_class_names_from_a_list(reader_file: Path) -> None:
    names = reader_file.parent / "data" / "label_list.txt"
    overrides = [
        "TrainDataset=null",
        "EvalDataset=null",
        "TestDataset={name: ImageFolder, image_dir: images, dataset_dir: data, anno_path: label_list.txt}",
    ]
    names.write_text("\ufeffbackground\nnine\n four \n\n", encoding="utf-8")
    reader = Reader.load(reader_file, overrides)
    assert reader.class_names == ["nine", "four"]
    assert len(ids_of(reader.loader("test"))) == 5
    for text, words in (("", "is empty"), ("a\n\nb\n", "line 2 is empty")):
        names.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            Reader.load(reader_file, overrides).class_names  # noqa: B018  (a property that reads)
    names.write_bytes("类".encode("gbk"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        Reader.load(reader_file, overrides).class_names  # noqa: B018


def pictures(folder: Path) -> dict[str, tuple[int, int]]:
    """Write images of every kind; return name -> height and width as shown by a viewer."""
    from PIL import Image

    folder.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    for mode in ("L", "P", "RGBA", "LA", "1", "I;16"):
        converted = picture.convert("L") if mode == "I;16" else picture.convert(mode)
        if mode == "I;16":
            converted = Image.fromarray(np.asarray(converted, np.uint16) * 256)
        converted.save(folder / f"{mode.replace(';', '')}.png")
    picture.convert("L").save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x112] = 6
    picture.save(folder / "exif.jpg", exif=turned)
    picture.save(folder / "UPPER.JPG")
    picture.save(folder / "ü 中.jpg")
    sizes = {path.name: (30, 40) for path in folder.iterdir()}
    sizes["exif.jpg"] = (40, 30)
    for height, width in ((1, 1), (900, 1), (2, 9000), (4, 70000)):
        picture.resize((width, height)).save(folder / f"{width}x{height}.png")
        sizes[f"{width}x{height}.png"] = (height, width)
    return sizes


def test_pictures_of_every_size_and_mode(reader_file: Path) -> None:
    reader = Reader.load(reader_file)
    for name, (height, width) in pictures(reader_file.parent / "kinds").items():
        batch = reader.preprocess(reader_file.parent / "kinds" / name)
        assert batch["image"].shape == (1, 3, 32, 48) and np.isfinite(batch["image"]).all(), name
        assert 0 <= batch["image"].min() and batch["image"].max() <= 1, name
        np.testing.assert_allclose(batch["scale_factor"][0], [32 / height, 48 / width], rtol=1e-6, err_msg=name)


def test_a_picture_too_narrow_for_a_letterbox_is_skipped(reader_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    narrow = np.zeros((900, 1, 3), np.uint8)
    assert cv2.imwrite(str(reader_file.parent / "data" / "images" / "35.png"), narrow)
    resize = "{Resize: {target_size: [32, 32], keep_ratio: True}}"
    steps = f"[{{Decode: {{}}}}, {resize}, {{Pad: {{size: [32, 32]}}}}, {{Permute: {{}}}}]"
    reader = Reader.load(reader_file, [f"EvalReader.sample_transforms={steps}", "max_bad_share=0.3"])
    assert ids_of(reader.loader("eval")) == [8, 12, 70, 99]
    assert "35.png: not readable (Resize leaves nothing of 900 x 1 pixels); skipped" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "split"),
    [
        (["EvalDataset={name: COCODataSet, dataset_dir: dataset/coco, anno_path: a.json}"], "eval"),
        (["EvalDataset={name: COCODataSet, image_dir: images, anno_path: dataset/a.json}"], "eval"),
        (["TestDataset={name: ImageFolder, image_dir: dataset/coco}"], "test"),
    ],
)
def test_a_relative_path_that_is_nowhere_names_the_folders_that_were_searched(
    reader_file: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], split: str
) -> None:
    elsewhere = reader_file.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    message = message_of(reader_file, *overrides, split=split)
    assert f", looked for in {elsewhere}, {reader_file.parent}, {reader_file.parent.parent} and {ROOT}" in message
    assert "\n" not in message
