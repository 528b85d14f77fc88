"""The processes started by `test_memory.py`: ``python tests/memory_runs.py KIND FOLDER [NUMBER]``.

Memory is read from ``/proc/self/status``: ``VmRSS`` is the present resident memory, ``VmHWM`` its peak.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import tiny_training  # noqa: E402

from act_pipeline.config import load_config  # noqa: E402
from act_pipeline.core.artifacts import InferenceModel  # noqa: E402
from act_pipeline.core.defaults import CONFIGS  # noqa: E402
from act_pipeline.data import Reader  # noqa: E402
from act_pipeline.demo import READER_CONFIG  # noqa: E402
from act_pipeline.evaluation import evaluate  # noqa: E402
from act_pipeline.execution.memory import freed_memory_kept  # noqa: E402
from act_pipeline.graph.static_graph import static_mode  # noqa: E402

CONFIG = CONFIGS / "sample_qat_dis.yml"
ITERATIONS = 6


def mebibytes(name: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process in MiB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


class Counted(tiny_training.Numbers):
    """Batches that record the process's memory after every hundredth one."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, float] = {}
        self.given = 0

    def __call__(self):
        for batch in super().__call__():
            self.given += 1
            if self.given % 100 == 0:
                self.held[self.given] = mebibytes("VmRSS")
            # 64 images, so that a leaked batch takes 192 KiB.
            yield {name: np.tile(array, (32, 1, 1, 1)) for name, array in batch.items()}


def train(folder: Path, iterations: int) -> dict[str, Any]:
    """Train the tiny model as in a compression, with a checkpoint every 50 iterations and an evaluation every 100."""
    batches = Counted()
    with freed_memory_kept("CPU"):
        tiny_training.run(folder, iterations, every=50, batches=batches, overrides=("TrainConfig.eval_iter=100",))
    return {"held": batches.held}


class _Engine:
    """An engine that outputs a hundred boxes for every image."""

    name, precision, device, threads = "none", "fp32", "GPU", 1

    def run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = len(batch["im_id"])
        boxes = np.tile(np.float32([0, 0.5, 1, 2, 31, 22]), (100 * images, 1))
        return {"bbox": boxes, "bbox_num": np.full(images, 100, np.int32)}


def evaluate_images(folder: Path, images: int) -> dict[str, Any]:
    """Evaluate a number of images of 640 x 640, which take 4.7 MiB each when read."""
    from inference_fixtures import make_tiny_data

    make_tiny_data(folder, images=5)
    content = json.loads((folder / "annotations.json").read_text())
    first = content["images"]
    # The same five files under as many ids as requested.
    content["images"] = [{**first[index % 5], "id": index} for index in range(images)]
    content["annotations"] = [
        {**content["annotations"][0], "id": index + 1, "image_id": index} for index in range(images)
    ]
    (folder / "annotations.json").write_text(json.dumps(content))
    (folder / "reader.yml").write_text(
        f"EvalDataset: !COCODataSet {{anno_path: annotations.json, image_dir: images, dataset_dir: {folder}}}\n"
        "EvalReader:\n"
        "  sample_transforms: [{Decode: {}}, {Resize: {target_size: [640, 640], keep_ratio: False}}, {Permute: {}}]\n"
    )
    found = evaluate(_Engine(), Reader.load(folder / "reader.yml"), progress=False, batch_size=2)
    assert found.images == images and len(found.detections) == 100 * images
    return {"peak": mebibytes("VmHWM")}


def _settings(folder: Path) -> tuple[Any, Reader, list[str]]:
    """Return the config, the reader and the reader's overrides of the sample in ``folder``."""
    overrides = [f"{name}.dataset_dir={folder / 'data'}" for name in ("TrainDataset", "EvalDataset", "TestDataset")]
    model = folder / "output" / "rtdetr_sample"
    changes = [
        f"Global.model_dir={model}",
        f"TrainConfig.train_iter={ITERATIONS}",
        f"TrainConfig.eval_iter={ITERATIONS}",
    ]
    return load_config(CONFIG, changes), Reader.load(READER_CONFIG, overrides), overrides


def train_float(folder: Path) -> dict[str, Any]:
    """Train the sample's model as in ACT, without quantization and teacher.

    The program (BatchNorm folded, made trainable by PaddleSlim's `recover_inference_program`, cut at the same nodes),
    optimizer, batch size and images are the same. The loss is the mean square of the outputs that distillation would
    compare with the teacher's.
    """
    import paddle

    from act_pipeline.compress.qat.trainable_weights import trainable_weights
    from act_pipeline.core.quiet import quiet_upstream
    from act_pipeline.graph.folding import prepare

    config, reader, _ = _settings(folder)
    with static_mode(), quiet_upstream():
        from paddleslim.common.patterns import find_final_nodes
        from paddleslim.common.recover_program import recover_inference_program

        model = prepare(InferenceModel.load(config.global_.model_dir), folder / "prepared")
        place = paddle.CPUPlace()
        executor = paddle.static.Executor(place)
        program, feeds, _ = paddle.static.load_inference_model(str(model.directory / "model"), executor)
        nodes = [variable.name() for variable in find_final_nodes(program)]
        weights = trainable_weights(program)
        program = recover_inference_program(program)
        for parameter in program.all_parameters():
            parameter.trainable = parameter.name in weights
            parameter.stop_gradient = parameter.name not in weights
        program = program._prune(nodes)
        block, startup = program.global_block(), paddle.static.Program()
        # Unique names, so that the added ops do not overwrite tensors of the model.
        with paddle.static.program_guard(program, startup), paddle.utils.unique_name.guard("loss_"):
            loss = sum(paddle.mean(paddle.square(block.var(name))) for name in nodes)
            optimizer = paddle.optimizer.SGD(1e-5, weight_decay=paddle.regularizer.L2Decay(4e-5))
            optimizer.minimize(loss, parameters=[block.var(name) for name in sorted(weights) if block.has_var(name)])
        executor.run(startup)
        batches = iter(reader.loader("train", batch_size=1))
        for _ in range(ITERATIONS):
            batch = next(batches)
            (value,) = executor.run(program, {name: batch[name] for name in feeds if block.has_var(name)}, [loss])
        assert np.isfinite(value).all()
        # Guards against a program that trains nothing and therefore needs no memory.
        gradients = sum(name.endswith("@GRAD") for name in block.vars)
        assert gradients > 100, gradients
    return {"peak": mebibytes("VmHWM")}


def compress_sample(folder: Path) -> dict[str, Any]:
    """Compress the sample by training with distillation."""
    from act_pipeline.compress import compress

    config, _, overrides = _settings(folder)
    compress(config, folder / "int8", progress=False, reader_overrides=overrides)
    return {"peak": mebibytes("VmHWM")}


if __name__ == "__main__":
    kinds = {"train": train, "evaluate": evaluate_images, "float": train_float, "compress": compress_sample}
    result = kinds[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
    print(json.dumps(result))
