"""The teacher outside the training program: same loss, one run per image, and bit-identical resumption."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_training

from act_pipeline.compress.qat import adapter
from act_pipeline.compress.qat.teacher import Teacher


def losses(directory: Path, **options) -> list[float]:
    directory.mkdir()
    return [loss for _, loss in tiny_training.run(directory, evaluate=False, iterations=6, **options).losses]


def other_teacher(directory: Path) -> tuple[str, ...]:
    from act_pipeline.graph.static_graph import StaticGraph, static_mode

    model = tiny_training.make_model(directory / "made")
    with static_mode():
        graph = StaticGraph.load(model)
        for name in [name for name in graph.program.global_block().vars if graph.is_parameter(name)]:
            graph.set_parameter(name, graph.parameter(name) * np.float32(1.3))
        (directory / "teacher").mkdir()
        graph.save(directory / "teacher")
    return (
        f"Distillation.teacher_model_dir={directory / 'teacher'}",
        "Distillation.teacher_model_filename=model.pdmodel",
        "Distillation.teacher_params_filename=model.pdiparams",
    )


def unrounded(split):
    """Prevent PaddleSlim's passes from quantizing the merged teacher, and keep the teacher in the program."""

    def keep(program, *args, **options):
        for op in program.global_block().ops:
            if op.output_arg_names and all(name.startswith("teacher_") for name in op.output_arg_names):
                op._set_attr("op_namescope", "/skip_quant/")
        return None

    return mock.patch.object(adapter, "split_teacher", keep) if not split else mock.MagicMock()


@pytest.mark.parametrize("custom", [False, True])
def test_the_loss_is_that_of_the_float_teacher_within_the_program(tmp_path: Path, custom: bool) -> None:
    overrides = other_teacher(tmp_path) if custom else ()
    with unrounded(split=False):
        within = losses(tmp_path / "within", overrides=overrides)
    outside = losses(tmp_path / "outside", overrides=overrides)
    # With rounding, another summation order can change a value by one step; the first step is compared most strictly.
    np.testing.assert_allclose(outside[0], within[0], rtol=1e-4)
    np.testing.assert_allclose(outside, within, rtol=0.05)
    within_rounded = losses(tmp_path / "rounded", overrides=(*overrides, "Distillation.teacher_cache_mb=0"))
    assert abs(within_rounded[0] / outside[0] - 1) > 1e-3  # PaddleSlim quantizes the inputs of the teacher's matmul


def test_an_image_is_run_once_and_a_full_budget_changes_nothing(tmp_path: Path) -> None:
    class Thrice(tiny_training.Numbers):
        def __call__(self):
            for batch in super().__call__():
                yield {"image": np.concatenate([self.same, batch["image"][:1]])}

        same = np.full((1, 3, 16, 16), 0.25, np.float32)

    made: list[Teacher] = []
    split = adapter.split_teacher

    def noted(*args, **options):
        made.append(split(*args, **options))
        return made[-1]

    with mock.patch.object(adapter, "split_teacher", noted):
        kept = losses(tmp_path / "kept", batches=Thrice())
        with mock.patch("act_pipeline.compress.qat.teacher._BYTES_PER_MB", 1e-7):
            forgotten = losses(tmp_path / "forgotten", batches=Thrice())
    assert kept == forgotten
    probing = 4
    assert made[0].runs == probing + 1 + 6 and made[0].kept_bytes == 7 * 10 * 4
    assert made[1].runs == probing + 12 and made[1].kept_bytes == 0


class Recipe(Teacher):
    """A teacher in NumPy."""

    def __init__(self, function) -> None:
        super().__init__(None, ["image"], ["out"], 1)
        self.function = function

    def run(self, feed):
        return [self.function(feed["image"])]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda image: image.sum((1, 2, 3)), ""),
        (lambda image: np.random.default_rng().random(len(image)), "each time"),
        (lambda image: (image - image.mean(0)).sum((1, 2)), "others of the batch"),
        (lambda image: image.sum((1, 2, 3)).reshape(1, -1), "others of the batch"),
    ],
)
def test_what_is_no_function_of_one_image_is_not_remembered(function, why: str) -> None:
    image = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    found = Recipe(function).by_image({"image": image}, batch_size=2)
    assert (why in found) if why else not found
    one_by_one = Recipe(function).by_image({"image": image}, batch_size=1)
    assert ("each time" in one_by_one) == (why == "each time")


@pytest.mark.parametrize(("others", "why"), [(0, ""), (3, ""), (30, "others of the batch")])
def test_queries_of_nearly_one_score_may_change_places(others: int, why: str) -> None:
    """In a batch, a top-k may swap two nearly equal scores; rows of other objects are an error."""

    class Selecting(Teacher):
        def __init__(self) -> None:
            super().__init__(None, ["image"], ["places", "rows"], 1, queries="places")

        def run(self, feed):
            places = np.stack(
                [np.random.default_rng(int(1e6 * image.sum())).permutation(100) for image in feed["image"]]
            )
            if len(places) > 1:
                places[:, [0, 5]] = places[:, [5, 0]]
                places[:, 50 : 50 + others] += 1000
            return [places, places[..., None] * np.float32([1.0, 0.5])]

    image = np.random.default_rng(0).random((1, 3, 4, 4), dtype=np.float32)
    found = Selecting().by_image({"image": image}, batch_size=2)
    assert (why in found) if why else not found


def test_a_teacher_that_cannot_be_split_stays(tmp_path: Path) -> None:
    with mock.patch.object(Teacher, "by_image", lambda self, *probe: "no"):
        stays = losses(tmp_path / "stays")
    assert stays == losses(tmp_path / "within", overrides=("Distillation.teacher_cache_mb=0",))
