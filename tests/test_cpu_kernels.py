"""The fast CPU kernels used in training compute the same as Paddle's slow ones."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_training
from one_op_model import in_executor, small_model

from act_pipeline.execution import cpu_kernels
from act_pipeline.execution.bias_gradient import sum_rows_by_matmul
from act_pipeline.execution.cpu_kernels import change_layout_once, run_in_onednn
from act_pipeline.execution.vector_observers import measure_in_vectors
from act_pipeline.execution.vector_rounding import round_in_vectors
from act_pipeline.graph.static_graph import StaticGraph, static_mode

EXTREMES = [0.0, -0.0, 1e-38, -1e-38, 3.0, -3.0, 6.0, -6.0]


def quantized(
    x: np.ndarray, axis: int, start: float, quick: bool, steps: int = 3, rate: float = 0.9
) -> dict[str, np.ndarray]:
    """Run a training's Q/DQ over ``x`` and return all outputs; ``integers`` are those of the result."""
    import paddle

    place, scope = paddle.CPUPlace(), paddle.static.Scope()
    channels = 1 if axis < 0 else x.shape[axis]
    kept = {
        "scale": np.full(channels, start),
        "zero": np.zeros(channels),
        "state": np.ones(1),
        "accum": np.full(1, start),
    }
    with paddle.static.scope_guard(scope):
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            fed = paddle.static.data("x", list(x.shape), "float32")
        block = program.global_block()
        y, rounded = (block.create_var(name=name, shape=x.shape, dtype="float32") for name in ("y", "rounded"))
        for name, value in kept.items():
            block.create_var(name=name, shape=value.shape, dtype="float32", persistable=True, stop_gradient=True)
            scope.var(name).get_tensor().set(value.astype(np.float32), place)
        moving = axis < 0
        block.append_op(
            type="quantize_linear",
            inputs={
                "X": [fed],
                "Scale": ["scale"],
                "ZeroPoint": ["zero"],
                **({"InState": ["state"], "InAccum": ["accum"]} if moving else {}),
            },
            outputs={
                "Y": [rounded],
                "OutScale": ["scale"],
                **({"OutState": ["state"], "OutAccum": ["accum"]} if moving else {}),
            },
            attrs={"quant_axis": axis, "bit_length": 8, "is_test": False, "moving_rate": rate, "round_type": 0},
        )
        block.append_op(
            type="dequantize_linear",
            inputs={"X": [rounded], "Scale": ["scale"], "ZeroPoint": ["zero"]},
            outputs={"Y": [y]},
            attrs={"quant_axis": axis, "bit_length": 8},
        )
        if quick:
            assert round_in_vectors(program) == 1
            assert not {"quantize_linear", "dequantize_linear"} & {op.type for op in block.ops}
            assert measure_in_vectors(program) == (moving and x.size >= 4096)
        executor = paddle.static.Executor(place)
        for step in range(steps):
            (result,) = executor.run(program, feed={"x": x * np.float32(1 + step)}, fetch_list=[y])
        written = {name: np.array(scope.find_var(name).get_tensor()) for name in kept}
        steps_of = np.maximum(written["scale"], 1e-30) / 127
        along = [-1 if dimension == axis else 1 for dimension in range(x.ndim)]
        return {"y": result, "integers": np.rint(result / steps_of.reshape(along if axis >= 0 else -1)), **written}


def both(x: np.ndarray, axis: int, start: float, **settings) -> list[dict[str, np.ndarray]]:
    with static_mode():
        stock, quick = (quantized(x, axis, start, quick, **settings) for quick in (False, True))
    np.testing.assert_allclose(quick.pop("y"), stock.pop("y"), rtol=3e-7, atol=0)
    for name, value in stock.items():
        assert np.array_equal(value, quick[name]), name
    return [stock, quick]


@pytest.mark.parametrize(
    ("axis", "shape"), [(-1, (2, 3, 8, 8)), (-1, (4, 16, 8, 8)), (0, (16, 4, 3, 3)), (1, (32, 24))]
)
@pytest.mark.parametrize("start", [3.0, 0.0, 1e-31])
def test_rounding_in_vectors_gives_the_same_integers(axis: int, shape: tuple[int, ...], start: float) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x.reshape(-1)[: len(EXTREMES)] = EXTREMES
    if axis >= 0:
        np.moveaxis(x, axis, 0)[-1] = 0  # a pruned channel
    if x.size >= 4096:
        x = -np.abs(x)  # the minimum has the largest absolute value
    stock, _ = both(x, axis, start)
    assert len(np.unique(stock["integers"])) > 50


@pytest.mark.parametrize("axis", [-1, 0])
def test_what_is_not_a_number_stays_none(axis: int) -> None:
    x = np.random.default_rng(9).normal(size=(3, 5)).astype(np.float32)
    with static_mode():
        if axis < 0:
            assert np.isnan(quantized(x, axis, np.nan, True, steps=1)["y"]).all()
        x[1, 2] = np.nan
        assert np.isnan(quantized(x, axis, 3.0, True, steps=1)["y"][1, 2])


@pytest.mark.parametrize(("kind", "measured"), [("relu", ["reduce_max"]), ("tanh", ["reduce_max", "reduce_min"])])
def test_a_tensor_with_two_observers_is_measured_once(kind: str, measured: list[str]) -> None:
    import paddle

    with static_mode():
        program, scope = paddle.static.Program(), paddle.static.Scope()
        with paddle.static.program_guard(program, paddle.static.Program()), paddle.static.scope_guard(scope):
            x = paddle.static.data("x", [2, 4096], "float32")
            observed = getattr(paddle.nn.functional, kind)(x)
            block = program.global_block()
            for name in ("one", "two"):
                places = {slot: f"{name}_{slot}" for slot in ("State", "Accum", "Scale")}
                for place in places.values():
                    block.create_var(name=place, shape=[1], dtype="float32", persistable=True, stop_gradient=True)
                    scope.var(place).get_tensor().set(np.ones(1, np.float32), paddle.CPUPlace())
                block.append_op(
                    type="moving_average_abs_max_scale",
                    inputs={"X": [observed], "InState": [places["State"]], "InAccum": [places["Accum"]]},
                    outputs={f"Out{slot}": [place] for slot, place in places.items()},
                    attrs={"moving_rate": 0.9, "is_test": False},
                )
            assert measure_in_vectors(program) == 2
            assert [op.type for op in block.ops if op.type.startswith("reduce")] == measured
            values = -np.random.default_rng(8).random((2, 4096), dtype=np.float32) * 3
            values[0, :2] = 2, -3
            paddle.static.Executor(paddle.CPUPlace()).run(program, feed={"x": values}, fetch_list=[])
            scales = [np.array(scope.find_var(f"{name}_Scale").get_tensor()) for name in ("one", "two")]
        largest = 2 if kind == "relu" else np.tanh(np.float32(3))
        # (0.9 * 1 + largest) / (0.9 * 1 + 1)
        np.testing.assert_allclose(scales, np.full((2, 1), (0.9 + largest) / 1.9), rtol=1e-6)


@pytest.mark.parametrize("start", [3.0, 0.0])
def test_a_tensor_of_zeros_stays_one(start: float) -> None:
    _, quick = both(np.zeros((2, 5), np.float32), -1, start)
    assert not quick["integers"].any()


def test_ties_go_to_the_even_integer_and_what_is_beyond_the_scale_is_cut_off() -> None:
    x = (np.arange(-300, 301, dtype=np.float32) / 2).reshape(1, -1)
    # (81 / 2 + 150) / (1 / 2 + 1) is exactly 127, so x is rounded to itself.
    _, quick = both(x, -1, 81.0, steps=1, rate=0.5)
    assert quick["scale"] == 127
    assert np.array_equal(quick["integers"], np.clip(np.rint(x), -128, 127))


@pytest.mark.parametrize("kind", ["conv2d", "matmul_v2"])
def test_a_saved_model_rounds_in_vectors_to_the_same_integers(tmp_path: Path, kind: str) -> None:
    import paddle

    model = small_model(tmp_path / "model", kind)
    image = np.random.default_rng(2).normal(scale=2, size=(2, 4, 6, 6)).astype(np.float32)  # some exceed the scale
    with static_mode():
        graph = StaticGraph.load(model)
        assert round_in_vectors(graph.program) == 1
        with paddle.static.scope_guard(graph.scope):
            (found,) = graph.executor.run(graph.program, feed={"image": image}, fetch_list=graph.fetch_targets)
    np.testing.assert_allclose(found, in_executor(model, image), rtol=1e-5, atol=1e-5)


def test_integers_that_another_op_reads_stay_in_the_program(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", "conv2d")
    with static_mode():
        graph = StaticGraph.load(model)
        block = graph.program.global_block()
        (integers,) = next(op for op in block.ops if op.type == "quantize_linear").output("Y")
        block.append_op(type="relu", inputs={"X": [integers]}, outputs={"Out": [block.create_var(name="other")]})
        assert round_in_vectors(graph.program) == 0
        assert "quantize_linear" in [op.type for op in block.ops]


def test_what_a_convolution_gives_changes_its_layout_once() -> None:
    import paddle

    image = np.random.default_rng(6).normal(size=(1, 3, 20, 20)).astype(np.float32)
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program, paddle.static.Program()):
            x = paddle.static.data("x", [1, 3, 20, 20], "float32")
            weight = paddle.static.data("weight", [16, 3, 3, 3], "float32")
            several = paddle.nn.functional.conv2d(x, weight)
            one = paddle.nn.functional.conv2d(several, paddle.ones([4, 16, 1, 1]))
            fetched = [several.max(), several.min(), several.abs(), one + 1]
        run_in_onednn(program)
        quick = program.clone()
        assert change_layout_once(quick) == 1
        (copy,) = [op.output("Out")[0] for op in quick.global_block().ops if op.type == "assign" and "plain" in str(op)]
        read = [op.type for op in quick.global_block().ops if copy in op.input_arg_names]
        assert sorted(read) == ["abs", "reduce_max", "reduce_min"]
        fed = {"x": image, "weight": np.random.default_rng(7).normal(size=(16, 3, 3, 3)).astype(np.float32)}
        executor = paddle.static.Executor(paddle.CPUPlace())
        names = [variable.name for variable in fetched]
        before, after = (executor.run(each, feed=fed, fetch_list=names) for each in (program, quick))
    for old, new in zip(before, after):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize(("shape", "count"), [((2, 70, 5), 1), ((1, 64, 3), 1), ((2, 10, 5), 0), ((3, 70), 0)])
def test_a_bias_of_rows_has_the_gradient_that_it_had(shape: tuple[int, ...], count: int, onednn: bool) -> None:
    import paddle

    rng = np.random.default_rng(4)
    fed = {"x": rng.normal(size=shape).astype(np.float32), "bias": rng.normal(size=shape[-1]).astype(np.float32)}
    with static_mode():
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            x = paddle.static.data("x", [-1, *shape[1:]], "float32")
            bias = paddle.static.data("bias", [shape[-1]], "float32")
            x.stop_gradient = bias.stop_gradient = False
            total = paddle.sum((x + bias) ** 3)
            gradients = paddle.static.gradients([total], [x, bias])
        quick = program.clone()
        assert sum_rows_by_matmul(quick) == count
        if onednn:
            cpu_kernels.run_in_onednn(quick)
        executor = paddle.static.Executor(paddle.CPUPlace())
        names = [gradient.name for gradient in gradients]
        before, after = (executor.run(each, feed=fed, fetch_list=names) for each in (program, quick))
    np.testing.assert_array_equal(after[0], before[0])
    np.testing.assert_allclose(after[1], before[1], rtol=1e-4)


def losses(directory: Path) -> list[float]:
    directory.mkdir()
    return [loss for _, loss in tiny_training.run(directory, evaluate=False, iterations=6).losses]


def test_a_training_in_the_quick_kernels_is_the_same_training(tmp_path: Path) -> None:
    with mock.patch.object(cpu_kernels, "run_in_onednn"):
        with mock.patch.object(cpu_kernels, "sum_rows_by_matmul"):
            with mock.patch.object(cpu_kernels, "round_in_vectors"):
                with mock.patch.object(cpu_kernels, "measure_in_vectors"):
                    stock = losses(tmp_path / "stock")
                assert losses(tmp_path / "measured") == stock
            rounded = losses(tmp_path / "rounded")
            np.testing.assert_allclose(rounded[0], stock[0], rtol=1e-6)  # values may differ in the last bit
    quick = losses(tmp_path / "quick")
    assert quick != stock  # sums are computed in another order
    # Another summation order may change a rounded integer; the first step is compared most strictly.
    np.testing.assert_allclose(quick[0], stock[0], rtol=1e-4)
    np.testing.assert_allclose(quick, stock, rtol=0.05)
