"""The images used for evaluation are not those used for calibration or training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sample_fixtures import reader_of_scenes

from act_pipeline.calibration.feeds import held_out, training_reader
from act_pipeline.config import load_config
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.data.split import separate_splits
from act_pipeline.demo import COMPRESS_CONFIG

ROOT = Path(__file__).resolve().parents[1]
READER = ROOT / "configs" / "readers" / "sample_reader.yml"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_sample(folder, 6, 10, seed=0, size=64)
    return folder


def files(reader: Reader, split: str) -> set[str]:
    return {str(record.file) for record in reader.dataset(split).records}


def paths(reader: Reader) -> dict[str, str]:
    return {split: str(reader.annotation_file(split)) for split in ("train", "eval")}


def test_two_sets_stay_what_they_are(scenes: Path) -> None:
    reader = reader_of_scenes(scenes)
    separated, note = separate_splits(reader)
    assert separated is reader and note is None


def test_one_set_is_dealt_out_in_halves(scenes: Path) -> None:
    reader = reader_of_scenes(scenes)
    same = reader.with_dataset(
        "train", image_dir=reader.settings.datasets["eval"].image_dir, anno_path=paths(reader)["eval"]
    )
    separated, note = separate_splits(same)
    train, judging = files(separated, "train"), files(separated, "eval")
    assert len(train) == len(judging) == 5 and not train & judging
    assert train | judging == files(reader, "eval")
    assert note is not None and "5 images" in note and "share their images" in note
    again, _ = separate_splits(same)
    assert files(again, "train") == train, "the deal is the same each time"
    assert separated.fingerprint("eval") != same.fingerprint("eval")
    batches = list(separated.loader("eval", batch_size=1))
    assert len(batches) == 5
    # A derived reader keeps the restriction.
    assert len(files(separated.with_input_size(32, 32), "train")) == 5


def test_a_reader_without_training_data_is_dealt_out_too(scenes: Path, tmp_path: Path) -> None:
    text = "".join(
        line
        for block in READER.read_text(encoding="utf-8").split("\n\n")
        if not block.lstrip().startswith("TrainDataset")
        for line in (block, "\n\n")
    )
    path = tmp_path / "reader.yml"
    path.write_text(text, encoding="utf-8")
    reader = Reader.load(path, [f"{split}.dataset_dir={scenes}" for split in ("EvalDataset", "TestDataset")])
    assert "train" not in reader.settings.datasets
    separated, note = separate_splits(reader)
    assert not files(separated, "train") & files(separated, "eval")
    assert note is not None and "there is no TrainDataset" in note


def test_images_of_both_are_left_out_of_a_large_training_set(tmp_path: Path) -> None:
    make_sample(tmp_path, 104, 2, seed=1, size=64)
    reader = reader_of_scenes(tmp_path)
    train, judging = (Path(path) for path in paths(reader).values())
    content, other = (json.loads(path.read_text(encoding="utf-8")) for path in (train, judging))
    folder = tmp_path / reader.settings.datasets["train"].image_dir
    for number, image in enumerate(other["images"]):
        source = tmp_path / reader.settings.datasets["eval"].image_dir / image["file_name"]
        target = folder / image["file_name"]
        if not target.exists():
            shutil.copy(source, target)
        content["images"].append({**image, "id": 900 + number})
        first = next(box for box in other["annotations"] if box["image_id"] == image["id"])
        content["annotations"].append({**first, "id": 9000 + number, "image_id": 900 + number})
    train.write_text(json.dumps(content), encoding="utf-8")
    both = reader_of_scenes(tmp_path).with_dataset("eval", image_dir=reader.settings.datasets["train"].image_dir)
    assert len(files(both, "train") & files(both, "eval")) == 2
    separated, note = separate_splits(both)
    assert files(separated, "eval") == files(both, "eval")
    assert len(files(separated, "train")) == len(files(both, "train")) - 2
    assert note is not None and "left out of calibration" in note


def test_a_single_image_cannot_do_both(scenes: Path, tmp_path: Path) -> None:
    reader = reader_of_scenes(scenes)
    path = Path(paths(reader)["eval"])
    content = json.loads(path.read_text(encoding="utf-8"))
    one = content["images"][0]
    content["images"] = [one]
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] == one["id"]]
    single = tmp_path / "one.json"
    single.write_text(json.dumps(content), encoding="utf-8")
    folder = reader.settings.datasets["eval"].image_dir
    one_image = reader.with_dataset("train", folder, str(single)).with_dataset("eval", folder, str(single))
    with pytest.raises(UserError, match="EvalDataset has one image"):
        separate_splits(one_image)


@pytest.mark.parametrize(("calibrating", "shared"), [(3, 0), (6, 1)])
def test_a_share_of_the_training_images_compares_models_and_trains_none(
    scenes: Path, calibrating: int, shared: int
) -> None:
    """Calibration does not use them either if there are enough other images."""
    config = load_config(COMPRESS_CONFIG, [f"QuantPost.calib_images={calibrating}"])
    reader = reader_of_scenes(scenes)
    judging = {record.file for record in held_out(config, reader).dataset.records}
    training = files(training_reader(config, reader), "train")
    settings = config.quant_post
    chosen = reader.loader("train", images=settings.images, seed=settings.seed, batch_size=1).dataset.records
    assert len(judging) == 1 and len(training) == 5
    assert not judging & training and judging | training == files(reader, "train")
    assert len(judging & {record.file for record in chosen}) == shared
    assert files(training_reader(config, reader), "eval") == files(reader, "eval")
    blind = load_config(COMPRESS_CONFIG, ["Global.Evaluation=false", "Strategy.name=qat_dis"])
    assert files(training_reader(blind, reader), "train") == files(reader, "train")
