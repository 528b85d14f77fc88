"""Training of deformable attention with gather by rows: same outputs, gradients and observations."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from test_deformable_attention import CHANNELS, HEADS, QUERIES, attention, feed

from act_pipeline.core.quiet import quiet_upstream
from act_pipeline.execution import finite_checks
from act_pipeline.execution.attention_gradient import train_by_rows
from act_pipeline.graph.static_graph import StaticGraph, static_mode

READ = ("values", "grids", "weights")


def training() -> tuple[Any, list[str]]:
    """Return a program with a gradient and an observer of each tensor, and its fetches."""
    import paddle

    program = paddle.static.Program.parse_from_string(attention().SerializeToString())
    block = program.global_block()
    with paddle.static.program_guard(program):
        for variable in block.vars.values():
            variable.stop_gradient = False
        push = paddle.static.data("push", block.var("output").shape, "float32")
        gradients = paddle.static.gradients(block.var("output") * 1.0, [block.var(name) for name in READ], push)
    fetches = ["output", *(gradient.name for gradient in gradients)]
    slots = [(op, slot) for op in block.ops for slot in op.output_names if slot in ("Out", "Output")]
    for name in dict.fromkeys(name for op, slot in slots for name in op.output(slot) if "@GRAD" not in name):
        kept = {}
        for what in ("State", "Accum", "Scale"):
            kept[what] = block.create_var(name=f"{name}@{what}", shape=[1], dtype="float32", persistable=True)
        block._insert_op(
            1 + next(index for index, op in enumerate(block.ops) if name in op.output_arg_names),
            type="moving_average_abs_max_scale",
            inputs={"X": [name], "InState": [kept["State"]], "InAccum": [kept["Accum"]]},
            outputs={"OutScale": [kept["Scale"]], "OutState": [kept["State"]], "OutAccum": [kept["Accum"]]},
            attrs={"is_test": False, "moving_rate": 0.9},
        )
        fetches.append(kept["Scale"].name)
    finite_checks.guard_grids(program)
    return program, fetches


def trained(program: Any, fetches: list[str], fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run one step; the observers' states start at 1."""
    import paddle

    scope, place = paddle.static.Scope(), paddle.CPUPlace()
    for variable in program.list_vars():
        if variable.persistable:
            scope.var(variable.name).get_tensor().set(np.float32([variable.name.endswith("State")]), place)
    with paddle.static.scope_guard(scope):
        found = paddle.static.Executor(place).run(program, feed=dict(fed), fetch_list=fetches)
    return dict(zip(fetches, found))


@pytest.mark.parametrize("images", [1, 3])
def test_outputs_gradients_and_observations_are_the_same(images: int) -> None:
    inputs = feed(images)
    inputs["push"] = np.random.default_rng(7).normal(size=(images, QUERIES, HEADS * CHANNELS)).astype(np.float32)
    with static_mode():
        program, fetches = training()
        by_rows = train_by_rows(program)
        kinds = Counter(op.type for op in by_rows.global_block().ops)
        observers = kinds["moving_average_abs_max_scale"]
        assert not kinds.keys() & {"grid_sampler", "grid_sampler_grad", "concat"} and kinds["gather_grad"] == 1
        assert observers == len(fetches) - 4 > 20
        expected, found = trained(program, fetches, inputs), trained(by_rows, fetches, inputs)
    for name, value in expected.items():
        assert np.abs(value).max() > 0.01, name
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_training_without_such_attention_is_let_be() -> None:
    import paddle

    with static_mode():
        program, fetches = training()
        block = program.global_block()
        for op in [op for op in block.ops if op.type == "slice_grad"][:1]:
            block._remove_op(block.ops.index(op))  # the gradient is computed differently
        assert train_by_rows(program) is program
        assert train_by_rows(paddle.static.Program()) is not None


def test_every_attention_of_an_exported_model_is_found_with_its_gradient(demo) -> None:
    import paddle

    with static_mode(), quiet_upstream(), contextlib.closing(StaticGraph.load(demo.fp32)) as graph:
        from paddleslim.auto_compression import compressor

        with paddle.static.scope_guard(graph.scope):
            program = compressor.recover_inference_program(graph.program)
        block = program.global_block()
        for variable in block.vars.values():
            variable.stop_gradient = False
        last = [op for op in block.ops if op.type == "matmul_v2"][-1]
        with paddle.static.program_guard(program):
            paddle.static.gradients(paddle.mean(block.var(last.output("Out")[0])), block.var("image"))
        before = Counter(op.type for op in block.ops)
        after = Counter(op.type for op in train_by_rows(program).global_block().ops)
    assert before["grid_sampler"] == before["grid_sampler_grad"] > 0
    assert not after.keys() & {"grid_sampler", "grid_sampler_grad"} and after["gather_grad"] > before["gather_grad"]
