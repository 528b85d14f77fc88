"""A training step that ends in NaN names the op that computes the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from act_pipeline.execution import not_finite
from act_pipeline.execution.not_finite import Origin
from act_pipeline.execution.runners import make_runner
from act_pipeline.graph.static_graph import static_mode

START = np.array([0.5, 2.0], np.float32)


def failed_step(
    loss_of: Callable[[Any, Any], Any], feed: np.ndarray, rate: float = 0.1, constant: float = 1.0
) -> tuple[str, np.ndarray]:
    """Run one step of SGD on two weights; return where it begins to fail and the weights after the search."""
    with static_mode():
        main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                x = paddle.static.data("x", [-1, 2], "float32")
                weight = paddle.create_parameter([2], "float32", name="weight")
                offset = paddle.create_parameter([2], "float32", name="offset")
                offset.stop_gradient = True
                loss = loss_of(x * weight, offset).mean()
                paddle.optimizer.SGD(rate).minimize(loss)
            place = paddle.CPUPlace()
            paddle.static.Executor(place).run(startup)
            scope.find_var("weight").get_tensor().set(START, place)
            scope.find_var("offset").get_tensor().set(np.full(2, constant, np.float32), place)
            origin = Origin(main, place)
            origin.remember()
            make_runner(main.clone(), [loss.name], place).run({"x": feed})
            assert not np.array_equal(np.array(scope.find_var("weight").get_tensor()), START), "no step was made"
            return origin.find({"x": feed}), np.array(scope.find_var("weight").get_tensor())


FEED = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
CASES = {
    "the loss": (lambda y, offset: paddle.log(y - offset), FEED, "op log is the first to write NaN, in "),
    "the gradient alone": (lambda y, offset: paddle.sqrt(y), FEED, "op sqrt_grad is the first to write infinity, in "),
    "an input": (lambda y, offset: y, FEED * np.nan, "the input x holds NaN"),
    "infinity times zero": (
        lambda y, offset: y * (1 / (offset - 1)) * paddle.floor(y * 0.1),
        FEED,
        "op reciprocal is the first to write infinity, in |op elementwise_div is the first to write infinity, in ",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 1 << 28])
def test_the_first_op_that_writes_nan_is_named(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(not_finite, "_CHUNK_BYTES", chunk)
    loss_of, feed, expected = CASES[name]
    found, weights = failed_step(loss_of, feed)
    assert any(found.startswith(each) for each in expected.split("|")), found
    if name != "an input":
        np.testing.assert_array_equal(weights, START)  # the step's old values, on which it is repeated


def test_infinite_constants_are_no_failure() -> None:
    """RT-DETR's masked anchors are infinite, and the sigmoid of what is added to them is 1."""
    found, _ = failed_step(lambda y, offset: paddle.nn.functional.sigmoid(y + offset) + y, FEED, constant=np.inf)
    assert found == ""


def test_only_the_update_is_not_finite() -> None:
    found, _ = failed_step(lambda y, offset: y, FEED, rate=3e38)
    assert found == ""
