"""Tiny PP-YOLOEs with random weights, in the form of PaddleDetection's configs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from tools.dev.zoo.ppyoloe import Sizes, config

SIZE = 64
CLASSES = 3
_TINY = Sizes(
    classes=CLASSES, depth_mult=1.0, width_mult=0.125, layers=(1, 1, 1, 1), neck_blocks=1,
    nms={"nms_top_k": 40, "keep_top_k": 25, "score_threshold": 0.2, "nms_threshold": 0.6},
)  # fmt: skip


def ppyoloe_config(architecture: str = "YOLOv3") -> dict:
    """Return the content of a PP-YOLOE+ config with few channels, in the order of PaddleDetection's."""
    return config(SIZE, _TINY, architecture)


def write_model(folder: Path, content: dict, seed: int = 0) -> tuple[Path, Path]:
    """Write a config and random weights of it, with scores on both sides of the threshold; return both paths."""
    import paddle

    from act_pipeline.rtdetr.build import build_model

    folder.mkdir(parents=True, exist_ok=True)
    path, weights = folder / "model.yml", folder / "model_final.pdparams"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    paddle.seed(seed)
    rng = np.random.default_rng(seed)
    model = build_model(str(path))
    state = model.state_dict()
    for name, value in state.items():
        if name.startswith(("yolo_head.pred_cls", "yolo_head.pred_reg")):
            spread = (0.04, 0.0) if name.endswith("weight") else (0.5, -1.5 if "cls" in name else 0.0)
            array = rng.normal(spread[1], spread[0], value.shape)
            if name.endswith("bias") and "reg" in name:  # edges about a cell from the centre
                array -= np.tile(0.8 * np.arange(17), 4)
            value.set_value(array.astype("float32"))
    # BatchNorm with the statistics of the pictures: otherwise all scores of random weights are 0 or 1.
    model.eval()
    for layer in model.sublayers():
        if "BatchNorm" in type(layer).__name__:
            layer.training, layer._momentum = True, 0.0
    batch = pictures(16, seed=2)
    with paddle.no_grad():
        model({name: paddle.to_tensor(array) for name, array in batch.items()})
    paddle.save(state, str(weights))
    return path, weights


def exported(folder: Path, content: dict, *overrides: str) -> InferenceModel:
    """Write and export a model with random weights."""
    from act_pipeline.export import export_model

    path, weights = write_model(folder, content)
    return export_model(path, folder / "exported", [f"weights={weights}", *overrides])


def pictures(count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """Return a batch of random pictures whose originals were larger than the input."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 3, 8, 8))
    return {
        "image": np.kron(coarse, np.ones((1, 1, SIZE // 8, SIZE // 8))).astype(np.float32),
        "im_shape": np.full((count, 2), SIZE, np.float32),
        "scale_factor": np.tile(np.array([[0.5, 0.4]], np.float32), (count, 1)),
    }


READER = """metric: COCO
num_classes: {classes}
TrainDataset:
  !COCODataSet {{image_dir: images, anno_path: annotations.json, dataset_dir: {folder}}}
EvalDataset:
  !COCODataSet {{image_dir: images, anno_path: annotations.json, dataset_dir: {folder}}}
worker_num: 0
EvalReader:
  sample_transforms:
    - Decode: {{}}
    - Resize: {{target_size: [{size}, {size}], keep_ratio: False, interp: 2}}
    - NormalizeImage: {{mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}}
    - Permute: {{}}
  batch_size: 2
"""
# The form of PaddleSlim's example/auto_compression/detection/configs/ppyoloe_*_qat_dis.yaml.
ACT = """
Global:
  reader_config: {reader}
  input_list: ['image', 'scale_factor']
  arch: PPYOLOE
  include_nms: {include_nms}
  Evaluation: True
  model_dir: {model}
  model_filename: model.pdmodel
  params_filename: model.pdiparams

Distillation:
  alpha: 1.0
  loss: soft_label

QuantAware:
  onnx_format: true
  use_pact: true
  activation_quantize_type: 'moving_average_abs_max'
  quantize_op_types:
  - conv2d
  - depthwise_conv2d

TrainConfig:
  train_iter: 3
  eval_iter: 3
  learning_rate:
    type: CosineAnnealingDecay
    learning_rate: 0.00003
    T_max: 6000
  optimizer_builder:
    optimizer:
      type: SGD
    weight_decay: 4.0e-05
"""


def write_scenes(folder: Path, model: InferenceModel, count: int = 12) -> Path:
    """Write pictures annotated with what the float model finds in them; return the reader.

    Random weights detect nothing real; annotated so, their mAP is that of an exact copy, and an INT8 model loses it.
    """
    import json

    from PIL import Image

    from act_pipeline.data import Reader
    from act_pipeline.engines import create_engine

    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for index, picture in enumerate(pictures(count, seed=3)["image"]):
        image = Image.fromarray(picture.transpose(1, 2, 0).astype(np.uint8)).resize((160, 128))
        image.save(folder / "images" / f"{index}.png")
        images.append({"id": index + 1, "file_name": f"{index}.png", "height": 128, "width": 160})

    def write() -> None:
        categories = [{"id": index + 1, "name": f"class_{index}"} for index in range(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations.json").write_text(json.dumps(content))

    def annotate(image: int, row: np.ndarray) -> None:
        x1, y1, x2, y2 = (float(edge) for edge in np.clip(row[2:], 0, [160, 128, 160, 128]))
        box = [x1, y1, max(x2 - x1, 1.0), max(y2 - y1, 1.0)]
        annotations.append({
            "id": len(annotations) + 1, "image_id": image + 1, "category_id": int(row[0]) + 1, "bbox": box,
            "area": box[2] * box[3], "iscrowd": 0,
        })  # fmt: skip

    for image in range(count):  # a reader of PaddleDetection leaves out images without boxes
        annotate(image, np.array([0, 1, 10, 10, 50, 50]))
    write()
    reader = folder / "reader.yml"
    reader.write_text(READER.format(classes=CLASSES, folder=folder, size=SIZE))
    annotations.clear()
    engine = create_engine("paddle", model, "fp32", "CPU", 1, batch_size=1)
    for image, batch in enumerate(Reader.load(reader).loader("eval", batch_size=1)):
        rows = engine.run(batch)["bbox"]
        for row in rows[np.argsort(-rows[:, 1])][:8]:
            annotate(image, row)
    engine.close()
    write()
    return reader


def write_act_config(folder: Path, model: InferenceModel, reader: Path, include_nms: bool) -> Path:
    """Write a config in the form of PaddleSlim's and return its path."""
    path = folder / "ppyoloe_qat_dis.yaml"
    path.write_text(ACT.format(reader=reader, model=model.directory, include_nms=include_nms))
    return path


NMS = {
    "background_label": -1, "score_threshold": 0.3, "nms_top_k": 30, "nms_threshold": 0.5, "keep_top_k": 20,
    "normalized": True, "nms_eta": 1.0,
}  # fmt: skip


def nms_model(folder: Path, places: int, classes: int, beside: bool = False, **attrs: object) -> InferenceModel:
    """Save a program of ``multiclass_nms3`` alone; ``beside``: with an output before it."""
    import paddle

    from act_pipeline.graph.static_graph import StaticGraph, static_mode

    folder.mkdir()
    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program), paddle.static.scope_guard(scope):
            boxes = paddle.static.data("image", [-1, places, 4], "float32")
            scores = paddle.static.data("scores", [-1, classes, places], "float32")
            graph = StaticGraph(program, ["image", "scores"], [], scope, paddle.static.Executor(paddle.CPUPlace()))
            moved = paddle.add(boxes, graph.add_parameter("moved", np.zeros(1, np.float32)))
            block = program.global_block()
            kinds = {"Out": "float32", "Index": "int32", "NmsRoisNum": "int32"}
            made = {slot: block.create_var(name=slot.lower(), dtype=kind) for slot, kind in kinds.items()}
            inputs = {"BBoxes": moved, "Scores": scores}
            block.append_op(type="multiclass_nms3", inputs=inputs, outputs=made, attrs=attrs)
            graph.fetch_targets.extend([made["Out"], made["NmsRoisNum"], *([moved] if beside else [])])
            return graph.save(folder)
