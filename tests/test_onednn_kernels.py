"""Paddle Inference with oneDNN: `pad`, whose kernel writes beyond the tensor, and divisions, which it turns around."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.engines.paddle.tensors import PaddleTensors
from act_pipeline.graph.static_graph import static_mode

# The second is a shifted window of Swin: [N, H, W, C], with the height and width padded.
PADDINGS = {
    (1, 2, 3): [0, 0, 0, 1, 0, 2],
    (1, 20, 20, 24): [0, 0, 0, 1, 0, 1, 0, 0],
    (2, 3, 8, 8): [0, 0, 0, 0, 1, 2, 0, 3],
}


@pytest.fixture
def padding_model(request, tmp_path: Path) -> InferenceModel:
    import paddle

    shape, paddings = request.param, PADDINGS[request.param]
    with static_mode():
        program, start = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, start):
            image = paddle.static.data("image", shape, "float32")
            # `pad` itself: paddle.nn.functional.pad writes pad3d where it can.
            padded = program.global_block().create_var(name="padded", dtype="float32")
            attributes = {"paddings": paddings, "pad_value": 0.5}
            program.global_block().append_op(
                type="pad", inputs={"X": [image]}, outputs={"Out": [padded]}, attrs=attributes
            )
            # A model has parameters, and so this one too.
            outputs = [padded + paddle.static.create_parameter([1], "float32", is_bias=True)]
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(start)
        paddle.static.save_inference_model(str(tmp_path / "model"), [image], outputs, executor, program=program)
    return InferenceModel.load(tmp_path)


@pytest.mark.parametrize("padding_model", PADDINGS, indirect=True, ids=str)
def test_pads_any_axes(padding_model: InferenceModel, request) -> None:
    shape = request.node.callspec.params["padding_model"]
    image = np.random.default_rng(0).random(shape, np.float32)
    runner = PaddleTensors(padding_model, threads=1)
    (output,) = next(runner.run([{"image": image}]))
    runner.close()
    pairs = np.reshape(PADDINGS[shape], (-1, 2))
    np.testing.assert_array_equal(output, np.pad(image, pairs, constant_values=0.5))


DIVISIONS = [
    ([1, 20, 1], [128]),
    ([5], [4, 5]),
    ([1], [4, 5]),
    ([1, 4, 5], [3, 4, 5]),
    ([4, 5], [4, 1]),
    ([4, 5], [4, 5]),
]


@pytest.mark.parametrize("shapes", DIVISIONS, ids=str)
def test_divides_a_tensor_by_one_with_more_elements(shapes, tmp_path: Path) -> None:
    import paddle

    with static_mode():
        program, start = paddle.static.Program(), paddle.static.Program()
        with paddle.static.program_guard(program, start):
            first, second = (paddle.static.data(name, shape, "float32") for name, shape in zip("ab", shapes))
            # A model has parameters, and so this one too.
            zero = paddle.static.create_parameter([1], "float32", is_bias=True)
            output = (first + zero) / (second + zero)
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(start)
        paddle.static.save_inference_model(
            str(tmp_path / "model"), [first, second], [output], executor, program=program
        )
    random = np.random.default_rng(0)
    a, b = (random.random(shape, np.float32) + 1 for shape in shapes)
    runner = PaddleTensors(InferenceModel.load(tmp_path), threads=1)
    (found,) = next(runner.run([{"a": a, "b": b}]))
    runner.close()
    np.testing.assert_allclose(found, a / b, rtol=1e-6)
