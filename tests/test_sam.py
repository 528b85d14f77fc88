"""Segment Anything: masks of box prompts, by an encoder and a decoder, and their scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import SHARED, write_reader
from sam_fixtures import OBJECTS, SIZE, change_annotations, make_data, make_pair

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.compress import compress
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader
from act_pipeline.engines import create_engine
from act_pipeline.evaluation import GroundTruth, detection_change, evaluate
from act_pipeline.evaluation.confidence import miou_difference
from act_pipeline.evaluation.detections_file import load_detections, save_detections
from act_pipeline.evaluation.masks import mask_sums, mean_iou
from act_pipeline.families.registry import find_family
from act_pipeline.families.sam import run_lengths
from act_pipeline.importers.import_model import import_onnx
from act_pipeline.inference import InferenceRequest, run_inference

PAD = f"{{size: [{SIZE}, {SIZE}], pad_mode: 1, fill_value: [0., 0., 0.]}}"
NAMES = {100 + index: f"{index}.png" for index in range(8)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[InferenceModel, InferenceModel]:
    return make_pair(tmp_path / "models")


def reader_of(data: Path, model: InferenceModel, **options: object) -> Reader:
    path = write_reader(data.parent / "reader.yml", data.parent, size=SIZE, **options)  # type: ignore[arg-type]
    return fit_reader(model, Reader.load(path)).reader


def config_of(data: Path, model: InferenceModel, **keys: str) -> Path:
    reader = write_reader(data.parent / "reader.yml", data.parent, size=SIZE)
    path = data.parent / "config.yml"
    settings = {"Evaluation": "true", "name": "ptq", "max_drop": "0.1", **keys}
    path.write_text(
        f"Global: {{reader_config: {reader}, model_dir: {model.directory}, Evaluation: {settings.pop('Evaluation')}}}\n"
        f"Strategy: {{{', '.join(f'{key}: {value}' for key, value in settings.items() if value)}}}\n"
        "QuantPost: {calib_images: 4}\n",
        encoding="utf-8",
    )
    return path


def test_outputs_decide_which_of_the_two_a_model_is() -> None:
    for arch in (None, "sam"):
        assert find_family({"image_embeddings": (-1, 256, 64, 64)}, Path("m"), arch).name == "sam"
    assert find_family({"masks": (-1, 1, 1, 128, 128), "iou": (-1, 1, 1)}, Path("m")).name == "sam_decoder"
    assert find_family({"iou": (-1, 4), "low_res_masks": (-1, 4, 256, 256)}, Path("m")).name == "sam_decoder"
    with pytest.raises(UserError, match="expected bbox"):
        find_family({"features": (-1, 8, 16, 16), "scores": (-1, 5)}, Path("m"))
    with pytest.raises(UserError, match="the family sam has image embeddings"):
        find_family({"masks": (-1, 4, 256, 256), "iou": (-1, 4)}, Path("m"), "sam")


@pytest.mark.parametrize("options", [{}, {"keep_ratio": True, "pad": PAD}])
def test_masks_of_the_boxes_are_those_of_the_original_image(
    data: Path, pair: tuple[InferenceModel, InferenceModel], options: dict[str, object]
) -> None:
    reader = reader_of(data, pair[0], **options)
    engine = create_engine("openvino", pair[0], batch_size=3)
    batch = next(iter(reader.loader("eval", batch_size=3, shuffle=False)))
    found = engine.run(batch)
    assert found["bbox_num"].tolist() == [2, 2, 2]
    assert found["bbox"][:2, 0].tolist() == [0, 1]  # classes in the order of the categories: 7, then 3
    for row, mask, (box, _) in zip(found["bbox"], found["masks"], OBJECTS):
        assert mask["size"] == [48, 96]
        np.testing.assert_allclose(row[2:], box, atol=2)
    evaluation = evaluate(engine, reader, progress=False)
    assert evaluation.miou is not None and evaluation.miou > 0.8
    assert evaluation.map > 0.7 and evaluation.per_class.keys() == {"disc", "square"}


def test_without_prompts_the_encoder_runs_alone(data: Path, pair: tuple[InferenceModel, InferenceModel]) -> None:
    reader = reader_of(data, pair[0])
    batch = dict(next(iter(reader.loader("eval", batch_size=2, shuffle=False))))
    del batch["prompts"]
    found = create_engine("openvino", pair[0], batch_size=2).run(batch)
    assert found["bbox_num"].tolist() == [0, 0] and "masks" not in found


def test_the_decoder_alone_gives_the_same_masks(data: Path, pair: tuple[InferenceModel, InferenceModel]) -> None:
    results = []
    for model in pair:
        reader = reader_of(data, model)
        results.append(evaluate(create_engine("openvino", model), reader, progress=False))
    assert results[1].images == results[0].images == 8
    np.testing.assert_allclose(results[1].detections, results[0].detections, atol=1e-4)
    assert results[1].masks == results[0].masks and results[1].miou == results[0].miou
    some = evaluate(create_engine("openvino", pair[1]), reader_of(data, pair[1]), limit=3, progress=False)
    assert some.images == 3 and len(some.detections) == 6


@pytest.mark.parametrize("part", [0, 1])
def test_each_part_is_compressed_and_judged_by_its_masks(
    tmp_path: Path, data: Path, pair: tuple[InferenceModel, InferenceModel], part: int
) -> None:
    config = load_config(config_of(data, pair[part]))
    done = compress(config, tmp_path / "deep" / "int8", "CPU", progress=False)
    fp32, int8 = done.record["fp32"], done.record["int8"]
    assert 0.85 < fp32["miou"] < 1 and abs(int8["miou"] - fp32["miou"]) < 0.05
    assert done.record["quantized_ops"] == {"conv2d": 2}
    interval = done.record["miou_drop_interval"]
    assert interval["low"] <= fp32["miou"] - int8["miou"] <= interval["high"]
    # The other part is found from the new folder too, and the float masks were kept beside the INT8 model.
    reader = Reader.load(config.global_.reader_config)
    fit_reader(done.model, reader)
    # The imported model does not tell its preprocessing, the compressed one does.
    other = reader.with_transforms([*reader.settings.reader.sample_transforms, {"NormalizeImage": {}}])
    with pytest.raises(UserError, match="have NormalizeImage|lack|NormalizeImage"):
        fit_reader(done.model, other)
    kept = load_detections(done.model.directory / "detections.npz")
    assert len(kept.masks["fp32"]) == len(kept.rows["fp32"]) == 8  # of 4 images; the others calibrated


def test_the_verdict_without_masks_in_the_data_is_the_agreement_of_the_masks(
    tmp_path: Path, data: Path, pair: tuple[InferenceModel, InferenceModel]
) -> None:
    change_annotations(data, segmentation=None)
    config = load_config(config_of(data, pair[0], Evaluation="agreement", max_drop="", min_agreement="0.5"))
    done = compress(config, tmp_path / "int8", "CPU", progress=False)
    assert done.record["fp32"]["map"] is None
    assert 0.5 < done.record["agreement_interval"]["value"] <= 1


def test_bad_data_in_one_line(data: Path, pair: tuple[InferenceModel, InferenceModel]) -> None:
    (pair[0].infer_cfg_path).write_text("arch: sam\n")
    with pytest.raises(UserError, match=r"infer_cfg.yml has no mask_decoder, expected the folder"):
        reader_of(data, pair[0])
    (pair[0].infer_cfg_path).write_text("arch: sam\nmask_decoder: nowhere\n")
    with pytest.raises(UserError, match=r"mask_decoder is nowhere, and .*nowhere is no folder"):
        reader_of(data, pair[0])
    (pair[0].infer_cfg_path).write_text("arch: sam\nmask_decoder: ../decoder\n")
    with pytest.raises(UserError, match=r"TrainDataset has pictures alone, expected a !COCODataSet with boxes"):
        reader = data.parent / "folder.yml"
        text = write_reader(data.parent / "reader.yml", data.parent, size=SIZE).read_text().splitlines()
        text = [f"TrainDataset: !ImageFolder {{image_dir: {data.parent}}}" if "Train" in row else row for row in text]
        reader.write_text("\n".join(text))
        fit_reader(pair[0], Reader.load(reader)).reader.dataset("train")
    change_annotations(data, bbox=[100, 10, 5, 5])
    with pytest.raises(UserError, match=r"the box \[100, 10, 5, 5\] of image 100 \(0.png\) is outside its 96 x 48"):
        reader_of(data, pair[0]).dataset("eval")
    change_annotations(data, bbox=[8, 6, 32, 16], segmentation=None)
    with pytest.raises(UserError, match=r"16 of 16 annotations have no segmentation .*Global.Evaluation: agreement"):
        evaluate(create_engine("openvino", pair[0]), reader_of(data, pair[0]), progress=False)


def test_a_picture_without_boxes_and_several_processes_for_a_decoder_are_refused(
    data: Path, pair: tuple[InferenceModel, InferenceModel]
) -> None:
    reader_config = str(write_reader(data.parent / "reader.yml", data.parent, size=SIZE))
    places = {"reader_config": reader_config, "engine": "openvino", "device": "CPU"}
    with pytest.raises(UserError, match="segments what is in a box, and --image_file=.* comes without boxes"):
        image = str(data.parent / "images" / "0.png")
        run_inference(InferenceRequest(str(pair[0].directory), image_file=image, **places))
    with pytest.raises(UserError, match="takes one box of an image at a time"):
        run_inference(InferenceRequest(str(pair[1].directory), shards=2, **places))


def masks_of(*widths: int) -> list[dict[str, object]]:
    masks = []
    for width in widths:
        mask = np.zeros((48, 96), bool)
        mask[6:22, 8 : 8 + width] = True
        masks.append(run_lengths(mask))
    return masks


def test_mean_iou_of_the_objects_and_its_interval(data: Path) -> None:
    reader = Reader.load(write_reader(data.parent / "reader.yml", data.parent))
    truth = GroundTruth.load(reader, "eval")
    # Of the first object of two images: 32 columns wide, and 24 and 16 are found.
    rows = np.array([[place, 8, 6, 32, 16, 0.9, 7] for place in (0, 1)], np.float64)
    whole, part = (mask_sums(truth, rows, masks_of(*widths), [100, 101]) for widths in ((32, 32), (24, 16)))
    assert mean_iou(whole) == 1 and mean_iou(part) == pytest.approx((24 + 16) / 64)
    difference = miou_difference(whole, part)
    assert difference is not None and difference.difference == pytest.approx(-0.375)
    assert difference.low == pytest.approx(-0.5) and difference.high == pytest.approx(-0.25)


def test_the_agreement_is_that_of_the_masks_not_of_the_boxes() -> None:
    rows = np.array([[0, 8, 6, 32, 16, 0.9, 7]], np.float64)
    one, half = masks_of(32), masks_of(16)
    assert detection_change(rows, rows) == 0
    assert detection_change(rows, rows, masks=(one, half)) == pytest.approx(0.5)


def test_masks_are_kept_with_the_detections(
    tmp_path: Path, data: Path, pair: tuple[InferenceModel, InferenceModel]
) -> None:
    evaluation = evaluate(create_engine("openvino", pair[0]), reader_of(data, pair[0]), progress=False)
    path = tmp_path / "detections.npz"
    save_detections(path, {"fp32": evaluation}, NAMES)
    kept = load_detections(path)
    assert kept.masks["fp32"] == evaluation.masks
    np.testing.assert_allclose(kept.rows["fp32"], evaluation.detections, atol=1e-5)
    assert evaluation.masks is not None
    for counts in ("", "zzzz", "1" * 40, evaluation.masks[0]["counts"][:-1]):  # pycocotools would read past its array
        masks = [{**mask, "counts": counts} for mask in evaluation.masks]
        damaged = replace(evaluation, masks=masks)
        save_detections(path, {"fp32": damaged}, NAMES)
        with pytest.raises(UserError, match="fp32_masks is damaged"):
            load_detections(path)


@pytest.mark.skipif(not (SHARED / "models").exists(), reason="needs ../shared/models beside the repository")
@pytest.mark.slow
def test_the_trained_pair_keeps_its_masks_in_int8(tmp_path: Path) -> None:
    folder = SHARED / "models" / "open_vocabulary"
    import_onnx(folder / "efficientvit_sam_decoder.onnx", tmp_path / "decoder")
    made = import_onnx(
        folder / "efficientvit_sam_encoder.onnx", tmp_path / "encoder", mask_decoder=tmp_path / "decoder"
    )
    assert made.max_difference < 1e-4
    assert InferenceModel.load(tmp_path / "decoder").infer_cfg()["image_encoder"] == "../encoder"
    reader = tmp_path / "reader.yml"
    data, steps = SHARED / "data" / "digit_masks", "mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none"
    text = write_reader(reader, data, "annotations/instances_test.json", 256).read_text()
    text = text.replace(steps, "mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]")
    training = text.index("TrainDataset")
    reader.write_text(text[:training] + text[training:].replace("instances_test", "instances_train"))
    config = tmp_path / "config.yml"
    config.write_text(
        f"Global: {{reader_config: {reader}, model_dir: {made.model.directory}, Evaluation: true}}\n"
        "Strategy: {name: auto, max_drop: 0.005}\nQuantPost: {calib_images: 32}\n"
    )
    done = compress(load_config(config), tmp_path / "int8", "CPU", progress=False)
    assert done.record["fp32"]["miou"] == pytest.approx(0.9147, abs=1e-4)
    assert done.record["int8"]["miou"] >= 0.9130
    assert done.record["quantized_ops"] == {"conv2d": 59, "depthwise_conv2d": 22}
