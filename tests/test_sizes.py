"""RT-DETR at common sizes: from 400 pixels on, anchors near the edges are masked with infinity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sample_fixtures import scenes_in

from act_pipeline.calibration import AbsHistogram, AbsMax
from act_pipeline.calibration.collector import collect
from act_pipeline.calibration.observers import NotFiniteError
from act_pipeline.calibration.thresholds import threshold
from act_pipeline.compress import compress
from act_pipeline.compress.result.outcome import Measured
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.data import Reader
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import COMPRESS_CONFIG, MODEL_CONFIG, READER_CONFIG, WEIGHTS
from act_pipeline.export import export_model
from act_pipeline.graph.folding import prepare
from act_pipeline.graph.static_graph import StaticGraph, static_mode

SIZE = 416


class Sized:
    """The sample's model exported for 416 x 416, and a few scenes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        make_sample(root / "data", 20, 10, seed=0, size=256)
        size = [f"TestReader.inputs_def.image_shape=[3,{SIZE},{SIZE}]", f"eval_size=[{SIZE},{SIZE}]"]
        self.model = export_model(MODEL_CONFIG, root, [f"weights={WEIGHTS}", "trt=True", *size])
        self.reader = [*scenes_in(root / "data"), f"EvalReader.sample_transforms.1.Resize.target_size=[{SIZE}, {SIZE}]"]

    def compress(self, name: str, *overrides: str, report: str | None = None):
        settings = [f"Global.model_dir={self.model.directory}", "QuantPost.calib_images=6", *overrides]
        return compress(
            load_config(COMPRESS_CONFIG, settings), self.root / name, "CPU", progress=False,
            reader_overrides=self.reader, report=report,
        )  # fmt: skip


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Sized:
    return Sized(tmp_path_factory.mktemp("sized"))


class Infinite:
    """An observer that counts the infinite values of a tensor."""

    def __init__(self) -> None:
        self.count = 0

    def update(self, values: np.ndarray, images: int) -> None:
        self.count += int(np.isinf(values).sum())


def test_the_sample_at_416_is_a_model_with_infinity_in_it(sized: Sized, tmp_path: Path) -> None:
    """Precondition of the tests below; at 224 there are no infinite values."""
    reader = Reader.load(READER_CONFIG, sized.reader)
    batch = next(iter(reader.loader("train", batch_size=1)))
    with static_mode():
        model = prepare(sized.model, tmp_path / "float")
        graph = StaticGraph.load(model)
        adds = [op.output_arg_names[0] for op in graph.program.global_block().ops if op.type == "elementwise_add"]
    seen = {name: Infinite() for name in adds}
    collect(model, {name: [observer] for name, observer in seen.items()}, [batch])
    assert max(observer.count for observer in seen.values()) > 0


def test_auto_at_416_ends_in_an_int8_model(sized: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "act_pipeline.calibration.feeds.HELD_OUT_IMAGES", 3
    )  # each of the five calibrations runs on all of these
    record = sized.compress("auto", "Strategy={name: auto, max_drop: 1.0}", report="en").record
    assert record["chosen"].startswith("ptq:") and record["fp32"]["map"] > 0.05
    assert record["int8"]["map"] > 0.5 * record["fp32"]["map"]
    assert (sized.root / "auto" / "report.html").exists()


def test_a_training_step_at_416(sized: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    # The measurement of the result is tested at this size above.
    monkeypatch.setattr("act_pipeline.compress.pipeline.measure_chosen", lambda *chosen: Measured())
    settings = ["TrainConfig.train_iter=1", "TrainConfig.eval_iter=1", "TrainConfig.snapshot_iter=null"]
    record = sized.compress("trained", "Strategy={name: qat_dis, max_drop: 1.0}", *settings).record
    assert record["training"]["iterations"] == 1 and np.isfinite(record["training"]["loss"]).all()
    assert record["int8"]["map"] > 0.5 * record["fp32"]["map"]


def test_a_range_leaves_infinity_out_and_refuses_nan() -> None:
    values = np.float32([[1, -3, np.inf], [2, -np.inf, 0.5]])
    observer = AbsMax(finite_only=True)
    observer.update(values, 2)
    assert observer.abs_max == 3 and observer.mean_abs_max == 2.5
    with pytest.raises(NotFiniteError, match="NaN"):
        observer.update(np.float32([np.nan, 1]), 1)
    with pytest.raises(NotFiniteError, match="infinite"):
        AbsMax().update(values, 2)


@pytest.mark.parametrize("shape", [(1, 64, 80, 80), (2, 300, 256)])
def test_a_sample_of_a_tensor_gives_its_thresholds(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    # Rows, columns and channels have different scales, so a sample of only some of them would be far off.
    scales = random.random(shape[1])[:, None] * random.random(shape[-1])[None] * 4
    whole, sampled = AbsHistogram(), AbsHistogram(sample=8192)
    for _ in range(20):
        values = random.standard_normal(shape) * (scales[:, None, :] if len(shape) == 4 else scales)
        for observer in (whole, sampled):
            observer.update(values.astype(np.float32), shape[0])
    assert sampled.abs_max == whole.abs_max and sampled.mean_abs_max == whole.mean_abs_max
    counted = sampled.bins()[2].sum()
    assert 0.8 * 8192 * 20 * shape[0] < counted <= 8192 * 20 * shape[0] + 20
    # KL selects among divergences that differ by less than the sampling noise.
    for algo, tolerance in (("mse", 0.07), ("hist", 0.07), ("KL", 0.4)):
        assert threshold(sampled, algo) == pytest.approx(threshold(whole, algo), rel=tolerance), algo


def test_what_an_int8_op_reads_may_not_be_infinite_and_the_first_image_says_so(sized: Sized, tmp_path: Path) -> None:
    with static_mode():
        graph = StaticGraph.load(prepare(sized.model, tmp_path / "float"))
        block = graph.program.global_block()
        convolution = [op for op in block.ops if op.type == "conv2d"][1]
        name = next(op.input("Y")[0] for op in block.ops if op.type == "elementwise_add")
        bias = graph.parameter(name)
        bias.reshape(-1)[0] = np.inf
        graph.set_parameter(name, bias)
        directory = tmp_path / "infinite"
        directory.mkdir()
        broken: InferenceModel = graph.save(directory)
    assert convolution is not None
    settings = [f"Global.model_dir={broken.directory}", "Strategy={name: ptq}", "Global.Evaluation=false"]
    config = load_config(COMPRESS_CONFIG, ["QuantPost.calib_images=12", *settings])
    with pytest.raises(
        UserError, match=r"holds (an infinite value|NaN) on calibration images? 1\b|output .* holds NaN"
    ):
        compress(config, tmp_path / "int8", "CPU", progress=False, reader_overrides=sized.reader)


COCO_MODELS = sorted(path.stem for path in (MODEL_CONFIG.parent).glob("rtdetr_*_coco.yml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COCO_MODELS)
def test_auto_runs_on_every_coco_model_at_640(
    sized: Sized, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights of ten classes on a few scenes: tests that it runs, not its accuracy."""
    import paddle

    from act_pipeline.rtdetr import build_model

    monkeypatch.setattr("act_pipeline.compress.pipeline.check_worth", lambda *args: None)  # it detects nothing
    config, overrides = MODEL_CONFIG.parent / f"{name}.yml", ["num_classes=10"]
    paddle.seed(0)
    weights = tmp_path / "random.pdparams"
    paddle.save(build_model(config, overrides).state_dict(), str(weights))
    labels = sized.root / "data" / "annotations" / "instances_val.json"
    model = export_model(
        config, tmp_path, [*overrides, f"weights={weights}", "trt=True", f"TestDataset.anno_path={labels}"]
    )
    reader = [entry.replace(str([SIZE, SIZE]), "[640, 640]") for entry in sized.reader]
    settings = [
        f"Global.model_dir={model.directory}",
        "Strategy={name: auto, max_drop: 1.0}",
        "QuantPost.calib_images=4",
    ]
    record = compress(
        load_config(COMPRESS_CONFIG, settings), tmp_path / "int8", "CPU", progress=False, reader_overrides=reader
    ).record
    assert record["chosen"].startswith("ptq:") and record["evaluation"]["images"] == 10
    assert record["bytes_ratio"] < 0.3 and sum(record["quantized_ops"].values()) == record["quantizable_ops"]


def test_the_seven_coco_models_are_there() -> None:
    assert len(COCO_MODELS) == 7
