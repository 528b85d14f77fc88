"""When a training is evaluated, and when it stops early."""

from __future__ import annotations

import re

import pytest

from act_pipeline.compress.qat.divergence import is_due, why_stop


def test_evaluations_are_before_the_first_step_early_now_and_then_and_at_the_end() -> None:
    assert [iteration for iteration in range(73) if is_due(iteration, 30, 72)] == [0, 10, 30, 60, 72]
    assert [iteration for iteration in range(6) if is_due(iteration, 1000, 5)] == [0, 5]


@pytest.mark.parametrize(
    ("agreements", "patience", "words"),
    [
        ([0.95], 1, ""),
        ([0.95, 0.96, 0.955, 0.958], 5, ""),
        ([0.95, 0.94], 5, ""),  # slightly lower, within the noise of few images
        ([0.99, 0.96], 5, "worse: the agreement with the float model was 0.9900 before it, and is 0.9600 after 10"),
        ([0.80, 0.65], 5, "worse: .* was 0.8000 before it, and is 0.6500"),
        ([0.80, 0.75], 5, ""),
        ([0.95, 0.97, 0.969, 0.968, 0.967], 5, "fell in 3 evaluations in a row"),
        ([0.95, 0.97, 0.969, 0.9695, 0.967], 5, ""),
        ([0.95, 0.97, 0.969, 0.9695, 0.968], 3, "no evaluation since iteration 10 was better"),
        ([0.95, 0.97, 0.969, 0.9695, 0.968], None, ""),
    ],
)
def test_a_training_ends_when_it_makes_the_model_worse(
    agreements: list[float], patience: int | None, words: str
) -> None:
    found = why_stop([(10 * index, agreement) for index, agreement in enumerate(agreements)], patience)
    if not words:
        assert found == ""
    else:
        assert re.search(words, found), found
        assert "\n" not in found
