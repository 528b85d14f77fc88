"""A concatenation of parameters, as position embeddings are: it is folded, and Paddle Inference survives one that is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines.paddle.tensors import PaddleTensors
from act_pipeline.graph.folding import MOST_GROWN_ELEMENTS, grows
from act_pipeline.graph.static_graph import static_mode


@pytest.fixture
def model(tmp_path: Path) -> InferenceModel:
    import paddle

    with static_mode():
        program, start = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, start):
            image = paddle.static.data("image", [-1, 16], "float32")
            ones = paddle.nn.initializer.Constant(1.0)
            parts = [
                paddle.static.create_parameter(
                    [1, 4], "float32", attr=paddle.ParamAttr(name=f"part{i}", initializer=ones)
                )
                for i in range(4)
            ]
            outputs = [image + paddle.concat(parts, 1)]
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(start)
        paddle.static.save_inference_model(str(tmp_path / "model"), [image], outputs, executor, program=program)
    return InferenceModel.load(tmp_path)


def test_paddle_inference_loads_a_program_with_one(model: InferenceModel) -> None:
    """Otherwise the process ends: a pass of Paddle 2.6.2 looks for what computes the parameters."""
    image = np.random.default_rng(0).random((2, 16), np.float32)
    runner = PaddleTensors(model, threads=1)
    (output,) = next(runner.run([{"image": image}]))
    runner.close()
    np.testing.assert_array_equal(output, image + 1)


def test_what_is_as_large_as_its_parts_together_is_stored() -> None:
    """The position embeddings of an RT-DETRv2 at 640 x 640: four parts of [400, 64]."""
    assert not grows(400 * 256, [400 * 64] * 4)
    assert grows(1024 * 1024, [1024, 1024]) and grows(MOST_GROWN_ELEMENTS + 1, [1, 3])
    assert not grows(MOST_GROWN_ELEMENTS, [1, 3])
