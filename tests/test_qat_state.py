"""Names of what a training changes, which have to be the same in every run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from act_pipeline.compress.qat.state import changing_variables


def rounding(name: str, number: int) -> Any:
    """Return a stand-in for an op of Paddle that rounds a tensor, with its numbered moving averages."""
    inputs = {"X": [name], "InState": [f"state_{number}"], "InAccum": [f"accum_{number}"]}
    return SimpleNamespace(
        type="quantize_linear", input_names=list(inputs), input=inputs.get, output_arg_names=[*inputs["InState"]]
    )


def info(*ops: Any) -> Any:
    names = ["weight", *(name for op in ops for slot in ("InState", "InAccum") for name in op.input(slot))]
    variables = [SimpleNamespace(name=name, persistable=True) for name in names]
    block = SimpleNamespace(ops=list(ops))
    return SimpleNamespace(program=SimpleNamespace(list_vars=lambda: variables, global_block=lambda: block))


def test_moving_averages_are_named_by_what_they_round() -> None:
    found = changing_variables([info(rounding("a", 3), rounding("b", 1))])
    assert found["quantize_linear:a:InState"] == "state_3" and found["quantize_linear:b:InAccum"] == "accum_1"
    assert found["weight"] == "weight" and len(found) == 5


def test_a_tensor_that_two_passes_round_has_two_of_each() -> None:
    """GroundingDINO's text, which a linear layer and the product with the queries read."""
    found = changing_variables([info(rounding("a", 7), rounding("a", 3))])
    assert len(found) == 5
    assert {found["quantize_linear:a:InState"], found["quantize_linear:a:InState:2"]} == {"state_3", "state_7"}
