"""Small models whose graph has a fine and a coarse feature map, and their outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.static_graph import StaticGraph, static_mode

conv, relu = paddle.static.nn.conv2d, paddle.nn.functional.relu
# Of the maps [N, 6, 16, 16] and [N, 10, 8, 8], the output or outputs.
Build = Callable[[Any, Any], Any]


def projected(x: Any, channels: int) -> Any:
    return paddle.static.nn.batch_norm(conv(x, channels, 1, bias_attr=False), is_test=True)


def saved(build: Build, folder: Path) -> InferenceModel:
    """Write a model with random weights, and random statistics of its BatchNorms."""
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        main.random_seed = startup.random_seed = 1
        scope, rng = paddle.static.Scope(), np.random.default_rng(0)
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                image = paddle.static.data("image", [-1, 3, 16, 16], "float32")
                fine = relu(conv(image, 6, 3, padding=1))
                outputs = build(fine, relu(conv(fine, 10, 3, stride=2, padding=1)))
                outputs = outputs if isinstance(outputs, list) else [outputs]
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                for op in main.global_block().ops:
                    if op.type == "batch_norm":
                        for slot in ("Scale", "Bias", "Mean", "Variance"):
                            tensor = scope.find_var(op.input(slot)[0]).get_tensor()
                            tensor.set(rng.uniform(0.5, 2, tensor.shape()).astype(np.float32), paddle.CPUPlace())
                paddle.static.save_inference_model(str(folder / "model"), [image], outputs, executor, program=main)
    return InferenceModel.load(folder)


def run(graph: StaticGraph) -> np.ndarray:
    """Return all outputs for two random images, one after the other."""
    image = np.random.default_rng(1).standard_normal((2, 3, 16, 16)).astype(np.float32)
    with paddle.static.scope_guard(graph.scope):
        names = [target.name for target in graph.fetch_targets]
        return np.concatenate([each.reshape(-1) for each in graph.executor.run(graph.program, {"image": image}, names)])
