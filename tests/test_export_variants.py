"""Options of PaddleDetection's exporter: normalization in the graph, padded inputs, class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.data import Reader
from act_pipeline.data.model_fit import fit_reader
from act_pipeline.demo import MODEL_CONFIG, WEIGHTS
from act_pipeline.export import _label_list, export_model
from act_pipeline.graph.detector_graph import DetectorGraph, read_detector_graph

cv2 = pytest.importorskip("cv2")

IMAGENET = "{mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"
STEPS = "[{Decode: {}}, {Resize: {target_size: [224, 224], keep_ratio: %s}}, %s{NormalizeImage: %s}, {Permute: {}}]"


def export(folder: Path, *overrides: str) -> InferenceModel:
    return export_model(MODEL_CONFIG, folder, [f"weights={WEIGHTS}", *overrides])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    return export(tmp_path_factory.mktemp("plain"))


@pytest.fixture()
def picture(tmp_path: Path) -> Path:
    """An image with bright shapes, wider than high."""
    image = np.full((90, 120, 3), 40, np.uint8)
    cv2.circle(image, (40, 45), 25, (250, 180, 90), 6)
    cv2.rectangle(image, (80, 20), (100, 80), (60, 240, 120), 5)
    assert cv2.imwrite(str(tmp_path / "shapes.png"), image)
    return tmp_path / "shapes.png"


def reader_of(folder: Path, steps: str) -> Reader:
    (folder / "reader.yml").write_text(
        "EvalDataset: {name: COCODataSet, image_dir: images, anno_path: a.json, dataset_dir: /nowhere}\n"
        f"EvalReader: {{sample_transforms: {steps}, batch_size: 1}}\n"
    )
    return Reader.load(folder / "reader.yml")


def boxes(model: InferenceModel, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the rows in descending order of score."""
    from act_pipeline.engines import create_engine

    rows = create_engine("paddle", model, "fp32", "CPU", 1).run(batch)["bbox"]
    return rows[np.argsort(-rows[:, 1], kind="stable")]


def test_fuse_normalize_puts_the_normalization_into_the_graph(plain, picture, tmp_path) -> None:
    """PaddleDetection 4964: the graph takes pixels of 0 to 255, and infer_cfg.yml has no NormalizeImage."""
    steps = STEPS % ("False", "", IMAGENET)
    fused = export(
        tmp_path,
        "TestReader.fuse_normalize=true",
        "TestReader.inputs_def.image_shape=[3, 224, 224]",
        f"TestReader.sample_transforms={steps}",
    )
    assert [step["type"] for step in fused.infer_cfg()["Preprocess"]] == ["Resize", "Permute"]
    assert read_detector_graph(fused) == DetectorGraph(10, True, False)
    assert read_detector_graph(plain) == DetectorGraph(10, False, False)
    reader = reader_of(tmp_path, steps)
    fit = fit_reader(fused, reader)
    fed = fit.reader.preprocess(picture)
    assert fed["image"].max() > 200 and len(fit.notes) == 1
    expected, found = boxes(plain, reader.preprocess(picture)), boxes(fused, fed)
    np.testing.assert_allclose(found[:10, 1], expected[:10, 1], atol=1e-4)
    np.testing.assert_allclose(found[:5], expected[:5], atol=0.05)


def test_fuse_normalize_needs_something_to_fuse(tmp_path) -> None:
    with pytest.raises(UserError, match="NormalizeImage 0 times, expected once"):
        export(
            tmp_path,
            "TestReader.fuse_normalize=true",
            "TestReader.inputs_def.image_shape=[3, 224, 224]",
            "TestReader.sample_transforms=[{Decode: {}}, {Resize: {keep_ratio: False}}, {Permute: {}}]",
        )


def test_boxes_of_a_padded_input_are_decoded_as_paddledetection_does(plain, picture, tmp_path) -> None:
    """`bbox_decode_type: pad`: boxes are relative to the canvas, not the image: 120 x 90 fills 224 x 168 of it."""
    padded = export(tmp_path, "DETRPostProcess.bbox_decode_type=pad")
    assert read_detector_graph(padded) == DetectorGraph(10, False, True)
    described = padded.infer_cfg()["Preprocess"]
    assert [step["type"] for step in described] == ["Resize", "Pad", "NormalizeImage", "Permute"]
    assert described[0]["keep_ratio"] is True
    none = "{mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}"
    pad = "{Pad: {size: [224, 224], fill_value: [0., 0., 0.]}}, "
    reader = reader_of(tmp_path, (STEPS % ("True, interp: 2", pad, none)))
    batch = fit_reader(padded, reader).reader.preprocess(picture)
    assert batch["im_shape"].tolist() == [[168, 224]]
    of_picture, of_canvas = boxes(plain, batch), boxes(padded, batch)
    stretched = of_picture * np.float32([1, 1, 1, 224 / 168, 1, 224 / 168])
    np.testing.assert_allclose(of_canvas[:10], stretched[:10], rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match="bbox_decode_type is 'top', expected origin or pad"):
        export(tmp_path, "DETRPostProcess.bbox_decode_type=top")


# --- names of the classes --------------------------------------------------------------------------------------------


def labels(folder: Path, dataset: dict[str, Any], num_classes: int = 2, section: str = "TestDataset") -> list[str]:
    content = {"num_classes": num_classes, section: {"dataset_dir": str(folder), **dataset}}
    return _label_list(folder / "model.yml", content)


def annotations(path: Path, categories: list[dict[str, Any]]) -> None:
    images = [{"id": 1, "file_name": "1.png"}]
    content = [{"image_id": 1, "category_id": category["id"], "bbox": [0, 0, 5, 5]} for category in categories[-2:]]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": content}))


def test_a_list_of_names_is_read(tmp_path, caplog) -> None:
    """PaddleDetection 6245."""
    (tmp_path / "label_list.txt").write_text("disc\nsquare\n")
    assert labels(tmp_path, {"anno_path": "label_list.txt"}) == ["disc", "square"]
    annotations(tmp_path / "val.json", [{"id": 5, "name": "b"}, {"id": 2, "name": "a"}])
    assert labels(tmp_path, {"anno_path": "val.json"}, section="EvalDataset") == ["b", "a"]
    assert caplog.text == ""


def test_a_slip_in_the_path_is_said(tmp_path, caplog) -> None:
    assert labels(tmp_path, {"anno_path": "label_lst.txt"}) == ["class_0", "class_1"]
    assert len(caplog.records) == 1
    assert "TestDataset.anno_path" in caplog.text and "label_lst.txt does not exist" in caplog.text
    assert "class_0" in caplog.text
    assert labels(tmp_path, {"anno_path": "val.json"}, 80)[0] == "person" and "COCO's names" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("names.txt", "disc\n", "names 1 classes, num_classes is 2"),
        ("names.txt", "", "is empty"),
        ("names.csv", "disc,square", "expected an annotation file"),
        ("val.json", "[]", "holds no JSON object"),
    ],
)
def test_names_that_are_wrong_are_one_line(tmp_path, name, text, words) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        labels(tmp_path, {"anno_path": name})


def test_a_root_category_is_named(tmp_path) -> None:
    names = ("shapes", "disc", "square")
    annotations(tmp_path / "val.json", [{"id": index, "name": name} for index, name in enumerate(names)])
    with pytest.raises(UserError, match=r"num_classes is 2, but .* 3 categories .*'shapes' \(id 0\) has no box"):
        labels(tmp_path, {"anno_path": "val.json"})


def test_the_command_says_it(tmp_path, capsys) -> None:
    from act_pipeline.cli import export as command

    (tmp_path / "names.txt").write_text("one\n")
    dataset = f"TestDataset={{name: ImageFolder, anno_path: names.txt, dataset_dir: {tmp_path}}}"
    arguments = ["-c", str(MODEL_CONFIG), "-o", f"weights={WEIGHTS}", dataset, f"--output_dir={tmp_path}"]
    code = run_command(command.main, arguments)
    assert code == 2 and "names 1 classes, num_classes is 10" in capsys.readouterr().err
