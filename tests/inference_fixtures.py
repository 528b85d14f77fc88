"""A tiny model, a tiny data set and test doubles, to test engines and evaluation without a real model."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines.machine import Machine

SIZE = 32
# The object in every image of `tiny_data`: x1, y1, x2, y2 as shares of the image.
OBJECT = (0.25, 0.25, 0.75, 0.625)
CLASS_NAMES = ("disc", "square")
SHARED = Path(__file__).resolve().parents[2] / "shared"
# The sample with training; max_drop is large, since the accuracy after such a short training is irrelevant.
TRAINED = ["Strategy={name: qat_dis, max_drop: 0.1}", "TrainConfig.train_iter=20", "TrainConfig.eval_iter=20"]
GPU_MACHINE = Machine(
    cpu="test",
    cores=2,
    avx512_vnni=True,
    gpus=("Test GPU",),
    paddle="2.6.2",
    paddle_onednn=True,
    cuda="11.8",
    cudnn="8.6",
    tensorrt_compiled=(8, 5, 3),
    tensorrt_runtime=(8, 5, 3),
)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory) -> InferenceModel:
    """A tiny float model in a folder per test file."""
    return export_tiny_model(tmp_path_factory.mktemp("models") / "fp32")


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory) -> InferenceModel:
    """The tiny model with Q/DQ."""
    return export_tiny_model(tmp_path_factory.mktemp("models") / "int8", quantized=True)


def export_tiny_model(
    directory: Path,
    quantized: bool = False,
    size: int = SIZE,
    class_index: int = 0,
    stored_type: type = np.int8,
    observed: float | None = None,
) -> InferenceModel:
    """Export a network that detects ``OBJECT`` in every image, with a score computed by a convolution.

    It outputs two rows per image: class 0 at ``OBJECT``, and class 1 at the whole image with a score of 0. With
    ``quantized``, the convolution's input and weights pass through Q/DQ in the format of ACT's ``onnx_format``, and with
    ``observed`` the convolution and its ReLU state that calibration saw outputs up to this value.
    """
    import paddle

    paddle.enable_static()
    main, startup = paddle.static.Program(), paddle.static.Program()
    scope = paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 3, size, size], "float32")
        im_shape = paddle.static.data("im_shape", [-1, 2], "float32")
        scale_factor = paddle.static.data("scale_factor", [-1, 2], "float32")
        features = _quantized_conv(image) if quantized else _conv(image)
        pixels = (size if size > 0 else SIZE) ** 2
        brightness = (paddle.nn.functional.relu(features).sum(axis=[1, 2, 3]) / (8 * pixels)).reshape([-1, 1])
        score = paddle.nn.functional.sigmoid(brightness)
        original = im_shape / scale_factor  # [N, 2] height, width
        height, width = original[:, 0:1], original[:, 1:2]
        found = paddle.concat(
            [
                score * 0 + class_index,
                score,
                width * OBJECT[0],
                height * OBJECT[1],
                width * OBJECT[2],
                height * OBJECT[3],
            ],
            1,
        )
        nothing = paddle.concat([score * 0 + 1, score * 0, score * 0, score * 0, width, height], 1)
        bbox = paddle.stack([found, nothing], 1).reshape([-1, 6])
        bbox_num = (paddle.sum(score * 0, axis=1) + 2).astype("int32")
        for op in main.global_block().ops if observed is not None else ():
            if op.type in ("conv2d", "relu"):
                op._set_attr("out_threshold", observed)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        if quantized:  # declared as float32 but stored as int8, as in ACT
            weight = paddle.static.global_scope().find_var("w").get_tensor()
            weight.set(np.array(weight).astype(stored_type), paddle.CPUPlace())
        directory.mkdir(parents=True, exist_ok=True)
        paddle.static.save_inference_model(
            str(directory / "model"), [im_shape, image, scale_factor], [bbox, bbox_num], executor, program=main
        )
    paddle.disable_static()
    return InferenceModel.load(directory)


_WEIGHTS = np.linspace(-0.5, 1.0, 8 * 3 * 3 * 3, dtype=np.float32).reshape(8, 3, 3, 3)


def _conv(image):
    import paddle

    weight = paddle.create_parameter(
        [8, 3, 3, 3], "float32", attr=paddle.ParamAttr("w", initializer=paddle.nn.initializer.Assign(_WEIGHTS))
    )
    return paddle.nn.functional.conv2d(image, weight, padding=1)


def _quantized_conv(image):
    import paddle

    block = paddle.static.default_main_program().global_block()

    def constant(name, value):
        array = np.asarray(value)
        return paddle.static.create_parameter(
            list(array.shape),
            str(array.dtype),
            name,
            attr=paddle.ParamAttr(name, trainable=False, initializer=paddle.nn.initializer.Assign(array)),
        )

    def op(kind, x, scale, zero_point, axis, dtype):
        out = block.create_var(name=paddle.utils.unique_name.generate(kind), dtype=dtype, shape=x.shape)
        block.append_op(
            type=kind,
            inputs={"X": [x], "Scale": [scale], "ZeroPoint": [zero_point]},
            outputs={"Y": [out]},
            attrs={"quant_axis": axis, "bit_length": 8},
        )
        return out

    scale, zero = constant("image@scale", np.float32([1.0])), constant("image@zero_point", np.int32([0]))
    image = op("quantize_linear", image, scale, zero, -1, "float32")
    image = op("dequantize_linear", image, scale, zero, -1, "float32")
    weight_scale = np.abs(_WEIGHTS).reshape(8, -1).max(1)
    rounded = np.round(_WEIGHTS / weight_scale[:, None, None, None] * 127)
    weight = constant("w", rounded)
    weight = op(
        "dequantize_linear",
        weight,
        constant("w@scale", weight_scale),
        constant("w@zero_point", np.zeros(8, np.int32)),
        0,
        "float32",
    )
    return paddle.nn.functional.conv2d(image, weight, padding=1)


def make_tiny_data(directory: Path, images: int = 5) -> Path:
    """Write images of different sizes with one object each, and return the annotation file."""
    import cv2

    (directory / "images").mkdir(parents=True, exist_ok=True)
    # Category ids are neither 0-based nor sorted: the class index is the position in the file.
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "disc"}, {"id": 3, "name": "square"}]}
    for index in range(images):
        height, width = 40 + 8 * index, 64
        x1, y1, x2, y2 = (round(share * side) for share, side in zip(OBJECT, (width, height, width, height)))
        picture = np.zeros((height, width, 3), np.uint8)
        picture[y1:y2, x1:x2] = 255
        name = f"{index}.png"
        cv2.imwrite(str(directory / "images" / name), picture)
        content["images"].append({"id": 100 + index, "file_name": name, "height": height, "width": width})
        content["annotations"].append(
            {
                "id": index + 1,
                "image_id": 100 + index,
                "category_id": 7,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
        )
    path = directory / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_reader(
    path: Path,
    data: Path,
    annotations: str | Path = "annotations.json",
    size: int = SIZE,
    keep_ratio: bool = False,
    pad: str = "",
    settings: str = "",
) -> Path:
    """Write a reader file for a COCO folder, e.g. of `make_tiny_data`, with the same data for training and evaluation.

    Args:
        path: the reader file; returned.
        data: a folder with ``images`` and the annotations.
        annotations: the annotation file, relative to ``data`` or absolute.
        size: the size to which images are resized, in pixels.
        keep_ratio: whether to keep the aspect ratio.
        pad: arguments of a ``Pad`` after it, in YAML; if empty, there is no such step.
        settings: lines before the data sets.
    """
    dataset = f"!COCODataSet {{image_dir: images, anno_path: {annotations}, dataset_dir: {data}}}"
    steps = [
        "Decode: {}",
        f"Resize: {{target_size: [{size}, {size}], keep_ratio: {keep_ratio}, interp: 2}}",
        *([f"Pad: {pad}"] if pad else []),
        "NormalizeImage: {mean: [0., 0., 0.], std: [1., 1., 1.], norm_type: none}",
        "Permute: {}",
    ]
    lines = [
        "metric: COCO",
        *settings.splitlines(),
        f"EvalDataset: {dataset}",
        f"TrainDataset: {dataset}",
        "EvalReader:",
        "  sample_transforms:",
        *(f"    - {step}" for step in steps),
        "  batch_size: 1",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class TinyReader:
    """A minimal reader for `evaluate` and `run_inference`, for any COCO folder."""

    def __init__(self, annotations: Path, images: Path, size: tuple[int, int] = (SIZE, SIZE), interpolation: int = 2):
        self.path = annotations.parent / "reader.yml"
        self.input_size = size
        self._annotations, self._images, self._interpolation = annotations, images, interpolation
        self._content = json.loads(annotations.read_text(encoding="utf-8"))
        self.class_names = [category["name"] for category in self._content["categories"]]
        self.num_classes = len(self.class_names)

    def annotation_file(self, split: str) -> Path:
        return self._annotations

    def fingerprint(self) -> str:
        return "sha256:test"

    def with_input_size(self, height: int, width: int) -> TinyReader:
        return TinyReader(self._annotations, self._images, (height, width), self._interpolation)

    def preprocess(self, image_file) -> dict[str, np.ndarray]:
        import cv2

        picture = cv2.cvtColor(cv2.imread(str(image_file)), cv2.COLOR_BGR2RGB)
        height, width = self.input_size
        resized = cv2.resize(picture, (width, height), interpolation=self._interpolation).astype(np.float32) / 255
        return {
            "image": np.ascontiguousarray(resized.transpose(2, 0, 1)[None], np.float32),
            "im_shape": np.float32([[height, width]]),
            "scale_factor": np.float32([[height / picture.shape[0], width / picture.shape[1]]]),
            "im_id": np.int64([0]),
        }

    def loader(self, split, batch_size=None, shuffle=None, drop_last=None, workers=None):
        return TinyLoader(self, self._content["images"], self._images, batch_size or 1)


class TinyLoader:
    def __init__(self, reader, entries, folder, batch_size):
        self._reader, self._entries, self._folder, self._size = reader, entries, folder, batch_size

    def __len__(self):
        return -(-len(self._entries) // self._size)

    def __iter__(self):
        for start in range(0, len(self._entries), self._size):
            entries = self._entries[start : start + self._size]
            samples = [self._reader.preprocess(self._folder / entry["file_name"]) for entry in entries]
            batch = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
            batch["im_id"] = np.int64([entry["id"] for entry in entries])
            yield batch


Call = namedtuple("Call", "name args kwargs")


class RecordingInference:
    """A test double of ``paddle.inference`` that records every call and computes the tiny model's outputs."""

    PrecisionType = SimpleNamespace(Float32="Float32", Half="Half", Int8="Int8")

    def __init__(self, refuse: Exception | None = None):
        self.calls: list[Call] = []
        self._refuse = refuse

    def Config(self, program, parameters):  # noqa: N802  (Paddle's name)
        self.calls.append(Call("Config", (program, parameters), {}))
        return _RecordingConfig(self.calls)

    def create_predictor(self, config):
        self.calls.append(Call("create_predictor", (), {}))
        if self._refuse is not None:
            raise self._refuse
        return _RecordingPredictor(config.shapes)

    def find(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


class _RecordingConfig:
    def __init__(self, calls):
        self._calls, self.shapes = calls, None

    def __getattr__(self, name):
        def method(*args, **kwargs):
            self._calls.append(Call(name, args, kwargs))
            if name == "collect_shape_range_info":
                self.shapes = args[0]

        return method


class _RecordingPredictor:
    def __init__(self, shapes):
        self._shapes, self._batches = shapes, []
        self._arrays: dict[str, np.ndarray] = {}

    def get_input_names(self):
        return ["im_shape", "image", "scale_factor"]

    def get_output_names(self):
        return ["bbox", "bbox_num"]

    def get_input_handle(self, name):
        return SimpleNamespace(copy_from_cpu=lambda array: self._arrays.__setitem__(name, array))

    def get_output_handle(self, name):
        return SimpleNamespace(copy_to_cpu=lambda: self._output(name))

    def run(self):
        self._batches.append(len(self._arrays["image"]))
        if self._shapes:  # Paddle writes it when the predictor is destroyed; it is not read earlier
            Path(self._shapes).write_text(f"batches {self._batches}\n", encoding="utf-8")

    def _output(self, name):
        count = len(self._arrays["image"])
        if name == "bbox_num":
            return np.ones(count, np.int32)
        original = self._arrays["im_shape"] / self._arrays["scale_factor"]
        return np.float32([[0, 0.9, OBJECT[0] * w, OBJECT[1] * h, OBJECT[2] * w, OBJECT[3] * h] for h, w in original])
