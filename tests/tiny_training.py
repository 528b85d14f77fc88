"""A training small enough to be killed often: two convolutions and a classifier.

It uses `act_pipeline.compress.qat.trainer.train`. As a program it trains in its own process: ``python
tests/tiny_training.py DIR '{"iterations": 20}'``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402

import act_pipeline  # noqa: E402, F401  (before paddle)
from act_pipeline.compress.ptq.quantizer import PostTraining  # noqa: E402
from act_pipeline.compress.qat.distributed.ranks import ALONE, Ranks  # noqa: E402
from act_pipeline.compress.qat.distributed.remote_training import call_followers  # noqa: E402
from act_pipeline.compress.qat.int8_snapshots import Scorer  # noqa: E402
from act_pipeline.compress.qat.resume.checkpoints import Checkpoints  # noqa: E402
from act_pipeline.compress.qat.resume.failures import explained  # noqa: E402
from act_pipeline.compress.qat.trainer import train  # noqa: E402
from act_pipeline.compress.qat.training import Training  # noqa: E402
from act_pipeline.compress.qat.zero_points import zero_points_of  # noqa: E402
from act_pipeline.config import Config, load_config  # noqa: E402
from act_pipeline.core.artifacts import InferenceModel  # noqa: E402
from act_pipeline.core.errors import run_command  # noqa: E402
from act_pipeline.core.interruption import interruptible  # noqa: E402
from act_pipeline.graph.folding import fold_batch_norm  # noqa: E402
from act_pipeline.graph.static_graph import StaticGraph, static_mode  # noqa: E402

CONFIG = """
Global: {reader_config: unused.yml, model_dir: unused}
Distillation: {alpha: 1.0, loss: l2}
QuantAware:
  onnx_format: true
  activation_quantize_type: moving_average_abs_max
  quantize_op_types: [conv2d, matmul_v2]
TrainConfig:
  train_iter: 20
  eval_iter: 5
  learning_rate: {type: CosineAnnealingDecay, learning_rate: 0.01, T_max: 50}
  optimizer_builder: {optimizer: {type: Adam}}
"""


class Numbers:
    """Seven batches per epoch, random by the epoch's number; counts the batches drawn."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.epoch, self.start = 0, 0
        self.position = {"epoch": 0, "images": 0}
        self.drawn = 0
        self.seconds = seconds
        self.rank, self.world = 0, 1

    def shard(self, rank, world) -> None:
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return 7 // self.world

    def seek(self, position) -> None:
        self.epoch, self.start = position["epoch"], position["images"]

    def __call__(self):
        epoch, start, self.epoch, self.start = self.epoch, self.start, self.epoch + 1, 0
        for index in range(start * self.world + self.rank, 7 // self.world * self.world, self.world):
            self.drawn += 1
            time.sleep(self.seconds)
            image = np.random.default_rng([epoch, index]).random((2, 3, 16, 16), dtype=np.float32)
            self.position = {"epoch": epoch, "images": index // self.world + 1}
            yield {"image": image}


def make_model(directory: Path) -> InferenceModel:
    """Write the float model: ``image`` [N, 3, 16, 16] to ten numbers."""
    import paddle

    directory.mkdir(parents=True)
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        main.random_seed = startup.random_seed = 1
        scope = paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                image = paddle.static.data("image", [-1, 3, 16, 16], "float32")
                x = paddle.nn.functional.relu(paddle.static.nn.conv2d(image, 8, 3))
                x = paddle.nn.functional.relu(paddle.static.nn.conv2d(x, 8, 3, stride=2))
                weight = paddle.create_parameter([288, 10], "float32")
                x = paddle.matmul(x.flatten(1), weight) + 0.5
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                paddle.static.save_inference_model(str(directory / "model"), [image], [x], executor, program=main)
    return InferenceModel.load(directory)


def make_detector(directory: Path) -> InferenceModel:
    """Write a float model with query selection as in RT-DETR and folded BatchNorm: 5 of 49 positions, 3 classes."""
    import paddle

    def linear(x, size):
        weight, bias = (paddle.create_parameter(shape, "float32") for shape in ([x.shape[-1], size], [size]))
        return paddle.matmul(x, weight) + bias

    raw = directory / "raw"
    raw.mkdir(parents=True)
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        main.random_seed = startup.random_seed = 3
        scope = paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                image = paddle.static.data("image", [-1, 3, 16, 16], "float32")
                x = paddle.static.nn.conv2d(image, 8, 4, stride=2, bias_attr=False)
                x = paddle.nn.functional.relu(paddle.static.nn.batch_norm(x, is_test=True))
                memory = x.flatten(2).transpose([0, 2, 1])
                encoder = linear(memory, 3)
                _, places = paddle.topk(encoder.max(-1), 5, axis=1)
                rows = paddle.take_along_axis(memory, places.unsqueeze(-1).tile([1, 1, 8]), 1)
                rows = paddle.nn.functional.relu(linear(rows, 8))
                boxes, logits = paddle.nn.functional.sigmoid(linear(rows, 4)), linear(rows, 3)
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                scale = next(op for op in main.global_block().ops if op.type == "batch_norm").input("Scale")[0]
                scope.find_var(scale).get_tensor().set(np.geomspace(0.01, 3, 8).astype("float32"), paddle.CPUPlace())
                paddle.static.save_inference_model(str(raw / "model"), [image], [boxes, logits], executor, program=main)
        with contextlib.closing(StaticGraph.load(InferenceModel.load(raw))) as graph:
            assert fold_batch_norm(graph) == 1
            return graph.save(directory)


def near(model: InferenceModel) -> float:
    """Return an agreement that differs between models and is high enough for every training to continue."""
    return 0.9 + (sum(model.params_path.read_bytes()) % 997) / 99_700


def make_config(
    path: Path, iterations: int, optimizer: str = "Adam", overrides: tuple = (), loss: str = "l2"
) -> Config:
    """Write the config file, and return it loaded with these settings."""
    path.write_text(CONFIG)
    return load_config(
        path,
        [
            f"TrainConfig.train_iter={iterations}",
            f"TrainConfig.optimizer_builder={{optimizer: {{type: {optimizer}}}}}",
            f"Distillation.loss={loss}",
            *overrides,
        ],
    )


def calibrate(directory: Path, zero_points: bool = True) -> InferenceModel:
    """Write the float model and an INT8 model with the scales and least values of an epoch; return the latter."""
    directory.mkdir(parents=True)
    config = make_config(directory / "config.yml", 1, overrides=(f"QuantPost.zero_points={str(zero_points).lower()}",))
    model = make_model(directory / "float")
    (directory / "start").mkdir()
    with static_mode():
        return PostTraining(model, config, Numbers()).write(directory / "start", "abs_max").model


def run(
    directory: Path,
    iterations: int = 20,
    optimizer: str = "Adam",
    every: int = 3,
    resume: bool = False,
    seconds: float = 0.0,
    evaluate: bool = True,
    overrides: tuple = (),
    batches: Numbers | None = None,
    score=None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    score_survives_nan=lambda graph: False,
    loss: str = "l2",
    start: InferenceModel | None = None,
) -> Training:
    """Train in ``directory``; the INT8 model is written to ``directory/int8``."""
    source = directory / "float"
    make = make_detector if loss == "detection" else make_model
    model = InferenceModel.load(source) if source.exists() else make(source)
    config = make_config(directory / "config.yml", iterations, optimizer, overrides, loss)
    save_dir = directory / "int8"
    checkpoints = Checkpoints(save_dir, {"TrainConfig": config.as_dict()["TrainConfig"]}, every)
    numbers = ranks.shard(batches or Numbers(seconds))

    def weighed(model: InferenceModel) -> float:
        time.sleep(seconds)
        return near(model)

    scorer = Scorer(score or weighed, lambda model: 0.0, score_survives_nan)
    with (
        ranks.explained(),
        checkpoints.open(resume),
        explained(checkpoints, 2),
        interruptible(checkpoints.how_to_continue) as interruption,
        ranks.leading(),
    ):
        with static_mode():
            lowest = zero_points_of(start, checkpoints)
            call_followers(ranks, model, lowest)
            shutil.rmtree(save_dir, ignore_errors=True)
            save_dir.mkdir()
            training = train(
                model,
                config,
                numbers,
                scorer if evaluate else None,
                save_dir,
                progress=progress,
                checkpoints=checkpoints,
                interruption=interruption,
                start=start,
                lowest=lowest,
                ranks=ranks,
            )
    return training


def result(training: Training) -> dict:
    """Return the results that must be equal."""
    return json.loads(json.dumps({**training.progress(), "model": training.model.content_hash()}))


if __name__ == "__main__":

    def main(argv=None) -> int:
        directory = Path(sys.argv[1])
        with contextlib.suppress(FileNotFoundError):
            (directory / "result.json").unlink()
        training = run(directory, progress=True, **json.loads(sys.argv[2]))
        (directory / "result.json").write_text(json.dumps(result(training)))
        return 0

    sys.exit(run_command(main))
