"""A category list of the size of LVIS', 1,203 classes, through import, compression, evaluation, picture and report."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

from act_pipeline.cli.main import main

pytest.importorskip("onnxruntime", reason="needs the extra importers")
pytest.importorskip("openvino", reason="needs the extra openvino")
CLASSES, SIZE, IMAGES, MOST_SECONDS = 1203, 64, 24, 120


def write_model(path: Path) -> None:
    """Write a DETR's outputs from one convolution: logits [1, 64, 1203] and boxes [1, 64, 4]."""
    rng = np.random.default_rng(0)
    arrays = {
        "w0": rng.normal(size=(32, 3, 8, 8)) * 0.1, "w1": rng.normal(size=(32, CLASSES)) * 0.9,
        "b1": np.full(CLASSES, -4.0), "w2": rng.normal(size=(32, 4)) * 0.6, "b2": np.array([0.0, 0.0, -1.0, -1.0]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["images", "w0"], ["c"], strides=[8, 8]),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["t"]),
        helper.make_node("Transpose", ["t"], ["q"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "w1"], ["l"]),
        helper.make_node("Add", ["l", "b1"], ["logits"]),
        helper.make_node("MatMul", ["q", "w2"], ["m"]),
        helper.make_node("Add", ["m", "b2"], ["s"]),
        helper.make_node("Sigmoid", ["s"], ["pred_boxes"]),
    ]
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    constants.append(numpy_helper.from_array(np.array([0, 32, -1]), "shape"))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    outputs = [onnx.ValueInfoProto(name=name) for name in ("logits", "pred_boxes")]
    graph = helper.make_graph(nodes, "g", [images], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"names": str({index: f"category {index}" for index in range(CLASSES)})})
    onnx.save(model, str(path))


def write_data(folder: Path) -> Path:
    """Write pictures annotated with what the model finds in them, 12 boxes each, and the reader; return the reader."""
    import cv2
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    images, annotations = [], []
    for index in range(IMAGES):
        picture = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"{index}.png"), picture)
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": SIZE, "width": SIZE})
        fed = np.ascontiguousarray(picture[None, :, :, ::-1].transpose(0, 3, 1, 2)).astype(np.float32) / 255
        logits, boxes = session.run(None, {"images": fed})
        for best in np.argsort(-logits.reshape(-1))[:12]:
            query, label = divmod(int(best), CLASSES)
            x, y, width, height = (float(value) * SIZE for value in boxes[0, query])
            annotations.append({
                "id": len(annotations) + 1, "image_id": index + 1, "category_id": label + 1, "iscrowd": 0,
                "bbox": [x - width / 2, y - height / 2, width, height], "area": width * height,
            })  # fmt: skip
    categories = [{"id": index + 1, "name": f"category {index}"} for index in range(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))
    dataset = f"  !COCODataSet {{image_dir: images, anno_path: all.json, dataset_dir: {folder}}}"
    steps = [
        {"Decode": {}},
        {"Resize": {"target_size": [SIZE, SIZE], "keep_ratio": False, "interp": 2}},
        {"NormalizeImage": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "norm_type": "none"}},
        {"Permute": {}},
    ]
    lines = ["metric: COCO", f"num_classes: {CLASSES}", "worker_num: 0"]
    lines += [f"{split}:\n{dataset}" for split in ("TrainDataset", "EvalDataset")]
    lines.append(yaml.safe_dump({"EvalReader": {"sample_transforms": steps, "batch_size": 1}}, sort_keys=False))
    reader = folder / "reader.yml"
    reader.write_text("\n".join(lines))
    return reader


@pytest.mark.slow
def test_1203_classes_go_through_all_steps(tmp_path: Path) -> None:
    write_model(tmp_path / "model.onnx")
    reader = write_data(tmp_path)
    config = {
        "Global": {"reader_config": str(reader), "model_dir": str(tmp_path / "float"), "Evaluation": True},
        "Strategy": {"name": "ptq", "max_drop": 0.9},
        "QuantPost": {"calib_images": 8},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    int8, arguments = str(tmp_path / "int8"), ["--reader_config", str(reader), "--engine", "openvino"]
    start = time.process_time()
    assert main(["import", "--onnx", str(tmp_path / "model.onnx"), "--output", str(tmp_path / "float")]) == 0
    assert main(["compress", "-c", str(tmp_path / "config.yml"), "--save_dir", int8]) == 0
    assert main(["eval", "--model_path", int8, *arguments, "--json", str(tmp_path / "eval.json")]) == 0
    picture = ["--image_file", str(tmp_path / "images" / "0.png"), "--output_dir", str(tmp_path / "shown")]
    assert main(["eval", "--model_path", int8, *arguments, *picture]) == 0
    assert main(["report", "--model_path", int8]) == 0
    assert time.process_time() - start < MOST_SECONDS
    labels = yaml.safe_load((tmp_path / "int8" / "infer_cfg.yml").read_text())["label_list"]
    assert len(labels) == CLASSES and (tmp_path / "shown" / "0.png").is_file()
    record = json.loads((tmp_path / "eval.json").read_text())
    assert len(record["per_class"]) == CLASSES and record["map"] > 0
    assert len((tmp_path / "int8" / "report.html").read_bytes()) < 10e6
