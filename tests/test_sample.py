"""The built-in sample: deterministic, valid COCO, with disjoint training and validation; its weights fit its config."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from act_pipeline.core.errors import UserError, run_command
from act_pipeline.data import builtin_sample

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "rtdetr" / "rtdetr_sample.yml"
WEIGHTS = ROOT / "act_pipeline" / "data" / "rtdetr_sample.pdparams"
TRAIN, VAL, SEED, SIZE = 4, 3, 5, 128


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "digits"
    assert builtin_sample.make_sample(folder, TRAIN, VAL, SEED, SIZE, progress=False)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(made: Path, tmp_path: Path) -> None:
    builtin_sample.make_sample(tmp_path / "again", TRAIN, VAL, SEED, SIZE, progress=False)
    builtin_sample.make_sample(tmp_path / "other", TRAIN, VAL, SEED + 1, SIZE, progress=False)
    first, again, other = _contents(made), _contents(tmp_path / "again"), _contents(tmp_path / "other")
    assert first == again
    assert first.keys() == other.keys()
    assert not [name for name in first if name.endswith(".jpg") and first[name] == other[name]]


def test_more_scenes_do_not_change_the_first_ones(made: Path, tmp_path: Path) -> None:
    builtin_sample.make_sample(tmp_path / "more", TRAIN + 1, VAL, SEED, SIZE, progress=False)
    first, more = _contents(made), _contents(tmp_path / "more")
    images = [name for name in first if name.endswith(".jpg")]
    assert len(images) == TRAIN + VAL
    assert all(first[name] == more[name] for name in images)


@pytest.mark.parametrize(("split", "count"), [("train", TRAIN), ("val", VAL)])
def test_annotations_are_coco(made: Path, split: str, count: int) -> None:
    import cv2
    from pycocotools.coco import COCO

    coco = COCO(str(made / "annotations" / f"instances_{split}.json"))
    assert [category["id"] for category in coco.dataset["categories"]] == list(range(1, 11))
    assert [category["name"] for category in coco.dataset["categories"]] == list("0123456789")
    assert len(coco.imgs) == len(coco.dataset["images"]) == count
    assert len(coco.anns) == len(coco.dataset["annotations"]) >= count * 2
    for image in coco.dataset["images"]:
        pixels = cv2.imread(str(made / "images" / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        assert max(pixels.shape[:2]) == SIZE and min(pixels.shape[:2]) in (SIZE, SIZE * 3 // 4)
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0 and y >= 0 and width > 0 and height > 0
        assert x + width <= image["width"] and y + height <= image["height"]
        assert annotation["area"] == width * height
        assert 1 <= annotation["category_id"] <= 10
        assert annotation["iscrowd"] == 0


def test_training_and_validation_share_no_scan_and_no_background() -> None:
    train, val = set(builtin_sample.scan_indices("train").tolist()), set(builtin_sample.scan_indices("val").tolist())
    assert not train & val
    assert train | val == set(range(1797))
    _, labels = builtin_sample._digits()
    for digit in range(10):
        share = sum(labels[index] == digit for index in val) / (labels == digit).sum()
        assert share == pytest.approx(builtin_sample.VALIDATION_SHARE, abs=0.01)
    for left, right in zip(
        builtin_sample.background_photographs("train"), builtin_sample.background_photographs("val")
    ):
        assert left.shape[1] + right.shape[1] == 640
        assert left.shape[1] == int(640 * builtin_sample.PHOTOGRAPH_CUT)
    for split, allowed in (("train", train), ("val", val)):
        used = {
            scan for index in range(10) for scan in builtin_sample.make_scene(split, SEED, index, SIZE).scans.tolist()
        }
        assert used <= allowed


def test_scenes_have_small_large_whole_and_hidden_digits() -> None:
    scenes = [builtin_sample.make_scene("val", 1, index) for index in range(40)]
    boxes, labels = (np.concatenate([getattr(scene, name) for scene in scenes]) for name in ("boxes", "labels"))
    visible = np.concatenate([scene.visible for scene in scenes])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert sides.min() < 32 and sides.max() > 80
    assert visible.min() >= builtin_sample.MIN_VISIBLE and visible.max() == 1.0
    assert 0.1 < (visible < 0.9).mean() < 0.7
    assert set(labels.tolist()) == set(range(10))
    assert all(1 <= len(scene.boxes) <= builtin_sample.DIGITS_PER_SCENE[1] for scene in scenes)
    _, classes = builtin_sample._digits()
    assert all((classes[scene.scans] == scene.labels).all() for scene in scenes)


def test_a_second_run_does_nothing_and_a_damaged_folder_is_made_anew(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    assert builtin_sample.make_sample(folder, 2, 1, SEED, SIZE, progress=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not builtin_sample.make_sample(folder, 2, 1, SEED, SIZE, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    image = folder / "images" / "val" / "val_00000.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    assert builtin_sample.make_sample(folder, 2, 1, SEED, SIZE, progress=False)
    assert image.read_bytes() == whole
    assert builtin_sample.make_sample(folder, 3, 1, SEED, SIZE, progress=False)
    assert len(list((folder / "images" / "train").iterdir())) == 3


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin_sample, "make_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builtin_sample.make_sample(tmp_path / "digits", 1, 1, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a sample"):
        builtin_sample.make_sample(tmp_path, 1, 1, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("flags", [["--train", "0"], ["--val", "-1"], ["--seed", "-1"], ["--size", "8"]])
def test_the_command_refuses_bad_numbers_in_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from act_pipeline.cli import make_sample

    assert run_command(make_sample.main, ["--output_dir", str(tmp_path / "digits"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flags[0]} is {flags[1]}, expected at least")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "digits").exists()


def test_weights_fit_the_sample_config() -> None:
    from act_pipeline.rtdetr import build_model

    expected = {name: tuple(value.shape) for name, value in build_model(str(CONFIG)).state_dict().items()}
    with open(WEIGHTS, "rb") as file:
        weights = pickle.load(file)
    assert {name: value.shape for name, value in weights.items()} == expected
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in weights.values())
    assert os.path.getsize(WEIGHTS) <= 20_000_000


def test_weights_find_the_digits() -> None:
    """On scenes outside the sample, nearly every mostly visible digit has a correct detection with a high score."""
    import cv2
    import paddle

    from act_pipeline.rtdetr import build_model

    model = build_model(str(CONFIG), weights=str(WEIGHTS))
    model.eval()
    found = total = 0
    for index in range(12):
        scene = builtin_sample.make_scene("val", 77, index)
        height, width = scene.image.shape[:2]
        pixels = cv2.resize(scene.image[:, :, ::-1], (224, 224), interpolation=cv2.INTER_CUBIC)
        inputs = {
            "image": pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255,
            "im_shape": np.array([[224, 224]], np.float32),
            "scale_factor": np.array([[224 / height, 224 / width]], np.float32),
        }
        with paddle.no_grad():
            detections = model({name: paddle.to_tensor(value) for name, value in inputs.items()})["bbox"].numpy()
        sure = detections[detections[:, 1] > 0.3]
        for box, label in zip(scene.boxes[scene.visible > 0.8], scene.labels[scene.visible > 0.8]):
            same = sure[sure[:, 0] == label, 2:]
            low, high = np.maximum(same[:, :2], box[:2]), np.minimum(same[:, 2:], box[2:])
            shared = np.clip(high - low, 0, None).prod(axis=1)
            union = (same[:, 2:] - same[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod() - shared
            found += bool((shared / union > 0.5).any())
            total += 1
    assert total > 40
    assert found / total > 0.8


def _transformers_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return transformers' names for the weights whose conversion is more than a renaming."""
    owner, theirs = "transformer.decoder.layers.1.self_attn", "model.decoder.layers.1.self_attn"
    state = {
        f"{theirs}.{letter}_proj.{kind}": part.T
        for kind in ("weight", "bias")
        for letter, part in zip("qkv", np.split(weights[f"{owner}.in_proj_{kind}"], 3, axis=-1))
    }
    state["model.denoising_class_embed.weight"] = np.pad(
        weights["transformer.denoising_class_embed.weight"], ((0, 1), (0, 0))
    )
    state["model.enc_score_head.bias"] = weights["transformer.enc_score_head.bias"]
    state["model.enc_score_head.weight"] = weights["transformer.enc_score_head.weight"].T
    state["model.backbone.model.encoder.stages.2.blocks.1.aggregation.0.normalization.running_var"] = weights[
        "backbone.stages.2.blocks.1.aggregation_squeeze_conv.bn._variance"
    ]
    state["model.encoder.pan_blocks.0.conv3.conv.weight"] = weights["neck.pan_blocks.0.conv3.conv.weight"]
    return state


def test_weights_of_transformers_get_paddledetections_names_and_layout() -> None:
    from act_pipeline.rtdetr.hf_weights import convert_state_dict

    rng = np.random.default_rng(0)
    shapes = {
        "transformer.decoder.layers.1.self_attn.in_proj_weight": (128, 384),
        "transformer.decoder.layers.1.self_attn.in_proj_bias": (384,),
        "transformer.denoising_class_embed.weight": (10, 128),
        "transformer.enc_score_head.weight": (128, 10),
        "transformer.enc_score_head.bias": (10,),
        "backbone.stages.2.blocks.1.aggregation_squeeze_conv.bn._variance": (256,),
        "neck.pan_blocks.0.conv3.conv.weight": (128, 64, 1, 1),
    }
    weights = {name: rng.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    converted = convert_state_dict(_transformers_names(weights))
    assert converted.keys() == weights.keys()
    assert all(np.array_equal(converted[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match="enc_score_head.bias is missing"):
        convert_state_dict({"vit.layers.0.weight": np.zeros(1)})


def test_reader_and_model_config_agree_with_the_sample(made: Path) -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!COCODataSet", lambda loader, node: loader.construct_mapping(node))
    reader = yaml.load((ROOT / "configs" / "readers" / "sample_reader.yml").read_text(encoding="utf-8"), Loader)
    model = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    resize = next(step["Resize"] for step in reader["EvalReader"]["sample_transforms"] if "Resize" in step)
    assert resize["target_size"] == model["eval_size"]
    assert reader["num_classes"] == model["num_classes"] == len(builtin_sample.CLASS_NAMES)
    for section, split in (("TrainDataset", "train"), ("EvalDataset", "val"), ("TestDataset", "val")):
        annotations = json.loads((made / reader[section]["anno_path"]).read_text(encoding="utf-8"))
        images = made / reader[section]["image_dir"]
        assert reader[section]["anno_path"] == f"annotations/instances_{split}.json"
        assert all((images / image["file_name"]).is_file() for image in annotations["images"])
        assert reader[section]["dataset_dir"] == "dataset/sample"
