"""Training as with the float model's weights: folded BatchNorm factors do not change the learning rate."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddleslim.common.recover_program import recover_inference_program

from act_pipeline.compress.qat.unfolded_weights import folded, read_factors, unfold
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.folding import fold_batch_norm
from act_pipeline.graph.op_types import BATCH_NORM_FACTOR
from act_pipeline.graph.static_graph import StaticGraph, static_mode

CHANNELS = 8
FACTORS = np.geomspace(1e-3, 30, CHANNELS).astype(np.float32)
OPTIMIZERS = {
    "SGD": lambda: paddle.optimizer.SGD(0.02, weight_decay=0.01),
    "Momentum": lambda: paddle.optimizer.Momentum(0.01, 0.9, weight_decay=0.01),
    "AdamW": lambda: paddle.optimizer.AdamW(0.003, weight_decay=0.01),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InferenceModel:
    """Two convolutions with BatchNorms with factors from 1e-3 to 30, one with a factor of 0, and a depthwise one."""
    folder = tmp_path_factory.mktemp("batch_norm")
    rng = np.random.default_rng(0)
    with static_mode():
        main, startup = paddle.static.Program(), paddle.static.Program()
        main.random_seed = startup.random_seed = 1
        scope = paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                x = image = paddle.static.data("image", [-1, 3, 12, 12], "float32")
                for groups in (1, CHANNELS, 1):
                    x = paddle.static.nn.conv2d(x, CHANNELS, 3, groups=groups, padding=1, bias_attr=False)
                    x = paddle.static.nn.batch_norm(x, is_test=True, epsilon=0.0)
                    x = paddle.nn.functional.relu(x)
                x = x.mean([2, 3])
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                norms = [op for op in main.global_block().ops if op.type == "batch_norm"]
                for index, op in enumerate(norms):
                    variance = rng.uniform(0.5, 2, CHANNELS).astype(np.float32)
                    factors = rng.permutation(FACTORS)
                    factors[0] *= index != 1
                    values = {"Variance": variance, "Scale": factors * np.sqrt(variance), "Mean": rng.random(CHANNELS)}
                    for slot, value in {**values, "Bias": rng.uniform(0, 1, CHANNELS)}.items():
                        tensor = scope.find_var(op.input(slot)[0]).get_tensor()
                        tensor.set(np.asarray(value, np.float32), paddle.CPUPlace())
                paddle.static.save_inference_model(str(folder / "model"), [image], [x], executor, program=main)
    return InferenceModel.load(folder)


def train(
    model: InferenceModel, optimizer: str, fold: bool, steps: int, largest: float = np.inf
) -> dict[str, np.ndarray]:
    """Return the convolutions' weights after some steps, in the form of the float model."""
    images = np.random.default_rng(1).random((steps, 4, 3, 12, 12), dtype=np.float32)
    with static_mode(), contextlib.closing(StaticGraph.load(model)) as graph, paddle.static.scope_guard(graph.scope):
        graph.unwrap_outputs()
        factors = {}
        if fold:
            assert fold_batch_norm(graph) == 3
            factors = read_factors(_saved(graph, model), largest)
        weights = [op.input("Filter")[0] for op in graph.program.global_block().ops if "conv2d" in op.type]
        with paddle.utils.unique_name.guard("train"):
            # PaddleSlim registers the parameters in the default programs, where another test may have others of these
            # names.
            with paddle.static.program_guard(paddle.static.Program(), paddle.static.Program()):
                program = recover_inference_program(graph.program)
            for op in program.global_block().ops:
                if op.type == "batch_norm":
                    op._set_attr("is_test", False)
                    op._set_attr("use_global_stats", True)
            for parameter in program.all_parameters():
                parameter.trainable = parameter.name in weights
                parameter.stop_gradient = parameter.name not in weights
            startup = paddle.static.Program()
            with paddle.static.program_guard(program, startup):
                output = program.global_block().var(graph.fetch_targets[0].name)
                loss = (1e-3 * output - 0.5).square().mean()
                OPTIMIZERS[optimizer]().minimize(loss)
        if fold:
            assert unfold(program, factors, paddle.CPUPlace()) == 3
        graph.executor.run(startup)
        for image in images:
            graph.executor.run(program, feed={"image": image}, fetch_list=[loss])
        return {name: graph.parameter(name) for name in weights}


def _saved(graph: StaticGraph, model: InferenceModel) -> InferenceModel:
    folder = model.directory / "folded"
    if folder.exists():
        return InferenceModel.load(folder)
    folder.mkdir()
    return graph.save(folder)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_folded_weights_take_the_float_models_steps(model: InferenceModel, optimizer: str) -> None:
    before = train(model, optimizer, fold=False, steps=0)
    expected = train(model, optimizer, fold=False, steps=10)
    found = train(model, optimizer, fold=True, steps=10)
    for name, value in expected.items():
        moved = np.abs(value - before[name]).max()
        assert moved > 1e-4, f"{name} was not trained: the test would show nothing"
        trained = np.ones(CHANNELS, bool)
        if np.abs(found[name]).reshape(CHANNELS, -1).max(1).min() == 0:  # a factor of 0 is not in the graph
            trained = np.abs(found[name]).reshape(CHANNELS, -1).max(1) > 0
            assert trained.sum() == CHANNELS - 1
        np.testing.assert_allclose(found[name][trained], value[trained], rtol=0, atol=0.02 * moved)


def test_a_factor_above_one_counts_as_one(model: InferenceModel) -> None:
    """The trained weights are then the folded ones, so that their steps are not f^2 times as long."""
    start, unbounded = (train(model, "SGD", True, 0, largest) for largest in (1.0, np.inf))
    saved = InferenceModel.load(model.directory / "folded")
    bounded, factors = read_factors(saved), read_factors(saved, np.inf)
    for name, factor in factors.items():
        np.testing.assert_array_equal(bounded[name], np.minimum(factor, 1))
        np.testing.assert_allclose(folded(start[name], bounded[name]), folded(unbounded[name], factor), rtol=1e-5)
        large = factor > 1
        assert large.any() and np.abs(start[name][large]).max() > np.abs(unbounded[name][large]).max()


def test_no_int8_model_keeps_the_factors(demo) -> None:
    with static_mode():
        ops = StaticGraph.load(demo.compressed.model).program.global_block().ops
    assert not [op.type for op in ops if op.has_attr(BATCH_NORM_FACTOR)]


def test_norms_of_weights_stand_for_factors_that_the_file_does_not_tell(model: InferenceModel, tmp_path: Path) -> None:
    """A BatchNorm that was folded before the model was written leaves weights, but no factors."""
    with static_mode(), contextlib.closing(StaticGraph.load(model)) as graph:
        fold_batch_norm(graph)
        weights = {}
        for op in graph.program.global_block().ops:
            if op.has_attr(BATCH_NORM_FACTOR):
                op._remove_attr(BATCH_NORM_FACTOR)
                weights[op.input("Filter")[0]] = graph.parameter(op.input("Filter")[0])
        (tmp_path / "imported").mkdir()
        imported = graph.save(tmp_path / "imported")
    found = read_factors(imported)
    assert found.keys() == weights.keys() and len(found) == 3
    for name, weight in weights.items():
        norms = np.sqrt((weight.reshape(CHANNELS, -1) ** 2).sum(1))
        assert norms.min() < 0.1 and norms.max() > 1
        np.testing.assert_allclose(found[name], np.minimum(norms, 1), rtol=1e-5)
