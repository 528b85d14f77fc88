"""The runners of a training's programs compute the same as Paddle's executor, with no more memory."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_training

from act_pipeline.execution import cpu_cores, runners
from act_pipeline.graph.static_graph import static_mode


def losses(directory: Path, rate: str = "0.01", iterations: int = 6) -> list[float]:
    directory.mkdir()
    overrides = (f"TrainConfig.learning_rate={rate}",)
    training = tiny_training.run(directory, evaluate=False, iterations=iterations, overrides=overrides)
    return [loss for _, loss in training.losses]


def test_op_by_op_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = losses(tmp_path / "quick")
    monkeypatch.setattr(runners, "OpByOp", runners.Planned)
    assert losses(tmp_path / "stock") == quick


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_learning_rate_follows_its_schedule(tmp_path: Path, on_cpu: bool) -> None:
    """PaddleSlim 2.6.0 trains at the initial rate throughout, since its quantized program has no schedule."""
    with mock.patch.object(cpu_cores, "on_cpu", return_value=on_cpu):
        constant = losses(tmp_path / "constant")
        dropped = losses(tmp_path / "dropped", "{type: PiecewiseDecay, boundaries: [2], values: [0.01, 0.001]}")
    # The third step is the first at the lower rate, and its loss is computed before its update.
    assert dropped[:3] == constant[:3]
    assert dropped[3] != constant[3]


def test_what_is_fed_and_not_in_the_program_is_let_be() -> None:
    import paddle

    with static_mode(), paddle.static.scope_guard(paddle.static.Scope()):
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            x = paddle.static.data("x", [-1, 3], "float32")
            between = paddle.nn.functional.relu(x)
            y = between + 1
        steps = runners.make_runner(program, [y.name], paddle.CPUPlace())
        for rows in (2, 5):
            (found,) = steps.run({"x": np.full((rows, 3), -1, np.float32), "scale_factor": np.ones(2)})
            assert np.array_equal(found, np.ones((rows, 3)))
        held = paddle.static.global_scope().find_var(between.name).get_tensor()
        assert not held._is_initialized()
