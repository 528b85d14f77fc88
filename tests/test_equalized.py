"""`auto` compares the model with equalized channels with the one without; factors are judged on other images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from act_pipeline.compress import calibrating
from act_pipeline.compress.calibrating import FloatModel, best_of, compared_with_equalized
from act_pipeline.compress.result.candidate_details import SmoothQuantDetails, equalization_line
from act_pipeline.compress.smooth_quant.factors import Sample, layer_error, search, smoothing_factors


class Post:
    """A calibration of nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = {"calibrate": 1.0}

    def equalized(self, model: Any, selection: Any) -> Post:
        return Post("equal")


class Trials:
    """A job whose calibrated models only have changes on the held-out images, and meet the limits or not.

    Attributes:
        lines: what was printed.
        compared: the models and algorithms that were compared.
        evaluated: the candidates that were evaluated.
    """

    def __init__(self, changes: dict[str, dict[str, float]], meets: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self.compared: list[tuple[str, list[str] | None]] = []
        self.evaluated: list[str] = []
        groups = 3 if "equal" in changes else 0
        details = SmoothQuantDetails([{}] * groups, groups, 32, 0.0, 5.0)
        equal = FloatModel("smooth_quant", None, None, details)  # type: ignore[arg-type]

        def compare(job: Any, post: Post, algorithms: Any = None) -> dict[str, float]:
            self.compared.append((post.name, algorithms))
            found = changes[post.name]
            return found if algorithms is None else {name: found[name] for name in algorithms}

        def quantized(
            job: Any, source: FloatModel, post: Post, algo: str, found: Any, seconds: Any, details: Any
        ) -> Any:
            self.evaluated.append(f"{post.name}:{algo}")
            self.seconds.append(seconds)
            self.details = details
            return f"{post.name}:{algo}"

        self.seconds: list[dict[str, float]] = []
        monkeypatch.setattr(calibrating, "smoothed", lambda job, free_only: equal)
        monkeypatch.setattr(calibrating, "spare_ops", lambda selection: [])
        monkeypatch.setattr(calibrating, "_calibrate", lambda *given: Post("plain"))
        monkeypatch.setattr(calibrating, "_compare", compare)
        monkeypatch.setattr(calibrating, "_made", quantized)
        monkeypatch.setattr(calibrating, "_with_rounded_residuals", lambda *given: None)
        monkeypatch.setattr(calibrating, "take_back", lambda job, candidate, *given: candidate)
        tried = SimpleNamespace(
            add=lambda name: name,
            meets=lambda name: name == meets,
            rank=lambda name: -self.evaluated.index(name),
        )
        self.job: Any = SimpleNamespace(
            model=None,
            selection=None,
            say=self.lines.append,
            held_out=SimpleNamespace(feeds=[{}] * 32),
            tried=tried,
        )

    def run(self) -> Any:
        return best_of(self.job, compared_with_equalized(self.job)[0])


PLAIN = {"mse": 0.10, "avg": 0.11, "KL": 0.20}


@pytest.mark.parametrize(
    ("equal", "meets", "evaluated", "kept"),
    [
        ({"mse": 0.094, "avg": 0.090}, "equal:avg", ["equal:avg"], True),  # clearly better: it alone is evaluated
        ({"mse": 0.096, "avg": 0.096}, "plain:mse", ["plain:mse"], False),  # better, but not clearly: left out
        ({"mse": 0.300, "avg": 0.200}, "", ["plain:mse", "plain:avg"], False),  # harmful: not even a last resort
        ({"mse": 0.100, "avg": 0.120}, "equal:mse", ["plain:mse", "plain:avg", "equal:mse"], False),  # needed, and free
        ({"mse": 0.090, "avg": 0.150}, "plain:mse", ["equal:mse", "plain:mse"], True),  # the limits have the last word
        ({"mse": 0.010, "avg": 0.020}, "", ["equal:mse"], True),  # a hard model: without is out of question
    ],
)
def test_the_better_one_on_held_out_images_comes_first(
    equal: dict[str, float], meets: str, evaluated: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials({"plain": PLAIN, "equal": equal}, meets, monkeypatch)
    assert trials.run() == (meets or evaluated[0]) and trials.evaluated == evaluated
    assert trials.compared == [("plain", None), ("equal", ["mse", "avg"])]
    (line,) = trials.lines
    assert ("): kept" in line) == kept and f"by {min(equal.values()):.4f} (without: 0.1000, at most 0.0950" in line
    assert trials.details.as_json()["kept"] is kept and equalization_line(trials.details.as_json()) == line
    # The time of the search and of both comparisons is noted once.
    first, *others = trials.seconds
    assert first["smooth"] == 5 and first["calibrate"] == 1 and "choose" in first and not any(others)


def test_a_model_without_places_is_calibrated_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials({"plain": PLAIN}, "plain:mse", monkeypatch)
    assert trials.run() == "plain:mse" and trials.lines == [] and trials.compared == [("plain", None)]
    assert "smooth" not in trials.seconds[0] and trials.details is None


def activations(rng: np.random.Generator, images: int, channels: int = 32) -> Sample:
    """Return activations whose channels are large on some images and small on others."""
    scale = np.exp(rng.standard_normal((images, channels)))
    rows = (np.repeat(scale, 64, axis=0) * rng.standard_normal((images * 64, channels))).astype(np.float32)
    image = np.repeat(np.arange(images), 64)
    return Sample(np.stack([np.abs(rows[image == index]).max(axis=0) for index in range(images)]), rows, image)


@pytest.mark.parametrize("seed", range(4))
def test_few_images_do_not_promise_what_others_do_not_keep(seed: int) -> None:
    """Of all factors that eight images recommend, none makes the error on others clearly worse."""
    rng = np.random.default_rng(seed)
    few, others = activations(rng, 8), activations(rng, 32)
    weight = rng.standard_normal((1, 32, 16, 1)).astype(np.float32)
    found = search(few, [weight], [step / 10 for step in range(10)], "mse")
    assert found is not None

    def error(factors: np.ndarray) -> float:
        return layer_error(few, others, [weight], factors.astype(np.float32), "mse")

    plain = error(np.ones(32))
    assert found.improvement < 0.2 or error(found.factors) < 1.1 * plain
    # Those that their own images recommend are many times worse.
    assert error(smoothing_factors(few.abs_max, np.abs(weight).max(axis=(0, 2, 3)), 0.9)) > 2 * plain
