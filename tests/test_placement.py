"""Placement of Q/DQ by measurement: the decision with a fake clock, its cache, and one run in ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from inference_fixtures import SIZE

from act_pipeline.compress.plan import placement_timing
from act_pipeline.compress.plan.placement import (
    FLOAT,
    INT8,
    MIXED,
    Gain,
    OpGroup,
    Placement,
    Variant,
    place,
    verdict_line,
)
from act_pipeline.compress.plan.placement_cache import StoredMeasurements
from act_pipeline.compress.plan.placement_groups import group_ops, structure_hash
from act_pipeline.compress.plan.placing import check_placement
from act_pipeline.compress.result.summary import compression_table
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.evaluation.act_measurements import PlacementRecord
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode

ROUNDS = 15


class Clock:
    """A runtime in which every op takes a known time in INT8 and in float; counts its measurements.

    Attributes:
        int8, float_: op -> milliseconds.
        fixed: milliseconds of all that is not quantized.
        fp32: milliseconds of the float model; None: the sum of ``float_``.
        noise: relative standard deviation of a round; all models of a round share none of it.
    """

    def __init__(
        self,
        int8: Mapping[str, float],
        float_: Mapping[str, float],
        fixed: float = 10.0,
        fp32: float | None = None,
        noise: float = 0.0,
        fails_after: int | None = None,
    ) -> None:
        self.int8, self.float_, self.fixed, self.noise = int8, float_, fixed, noise
        self.fp32 = fixed + sum(float_.values()) if fp32 is None else fp32
        self.asked: list[Mapping[str, Variant]] = []
        self.fails_after = fails_after
        self.random = np.random.default_rng(0)

    def __call__(self, models: Mapping[str, Variant]) -> dict[str, list[float]]:
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise KeyboardInterrupt
        self.asked.append(models)
        return {label: self._rounds(of) for label, of in models.items()}

    def _rounds(self, of: Variant) -> list[float]:
        if isinstance(of, str):
            ms = self.fp32
        else:
            ms = self.fixed + sum(self.float_[op] if op in of else self.int8[op] for op in self.int8)
        return list(ms / 1000 * (1 + self.noise * self.random.standard_normal(ROUNDS)))


def groups(*names: str) -> list[OpGroup]:
    return [OpGroup(name.upper(), (name,)) for name in names]


def names(found: Placement) -> list[str]:
    return [group.name for group in found.reverted]


def test_groups_that_gain_are_reverted_the_best_first() -> None:
    clock = Clock({"a": 10, "b": 8, "c": 5}, {"a": 40, "b": 4, "c": 1.5})
    found = place(groups("a", "b", "c"), clock)
    assert names(found) == ["B", "C"]
    assert found.ops == ("b", "c")
    assert found.verdict == MIXED
    assert found.gains["B"] == pytest.approx(33 / 29 - 1, abs=1e-4)
    assert found.gains["A"] < 0
    assert found.latency_ms["all"] == pytest.approx(33)
    assert found.latency_ms["placed"] == pytest.approx(25.5)
    assert found.latency_ms["fp32"] == pytest.approx(55.5)
    assert found.int8_gain == pytest.approx(55.5 / 25.5 - 1, abs=1e-4)


@pytest.mark.parametrize(("saved", "reverted"), [(1.9, []), (2.1, ["B"])])
def test_a_gain_below_two_percent_does_not_count(saved: float, reverted: list[str]) -> None:
    """The bound is a share of the latency without the group in INT8: 100 ms here."""
    clock = Clock({"a": 50, "b": 40 + saved}, {"a": 200, "b": 40}, fixed=10)
    found = place(groups("a", "b"), clock)
    assert names(found) == reverted
    assert found.verdict == (MIXED if reverted else INT8)


def test_small_gains_are_tried_together() -> None:
    """Three groups gain 1% each: none alone, all together."""
    clock = Clock({"a": 60, "b": 11, "c": 11, "d": 11}, {"a": 200, "b": 10, "c": 10, "d": 10})
    assert names(place(groups("a", "b", "c", "d"), clock)) == ["B", "C", "D"]


def test_a_group_that_gains_alone_but_not_with_another_stays_in_int8() -> None:
    """Two neighbours whose gain is one conversion between them."""

    class Shared(Clock):
        def _rounds(self, of: Variant) -> list[float]:
            if isinstance(of, str):
                return super()._rounds(of)
            return [(100 - 10 * bool(of & {"a", "b"}) - 20 * ("c" in of)) / 1000] * ROUNDS

    clock = Shared({"a": 1, "b": 1, "c": 1, "d": 1}, {}, fp32=200)
    assert names(place(groups("a", "b", "c", "d"), clock)) == ["C", "A"]


def test_verdict_float() -> None:
    found = place(groups("a"), Clock({"a": 10}, {"a": 10.1}))
    assert (found.verdict, found.reverted, found.float_precision) == (FLOAT, (), "fp32")


def test_the_fastest_float_precision_decides() -> None:
    class Two(Clock):
        def _rounds(self, of: Variant) -> list[float]:
            return [0.012] * ROUNDS if of == "bf16" else super()._rounds(of)

    found = place(groups("a"), Two({"a": 10}, {"a": 40}), ["fp32", "bf16"])
    assert (found.verdict, found.float_precision) == (FLOAT, "bf16")


def test_noise_does_not_revert_ops() -> None:
    """12 groups without any gain in 15 rounds of 3% noise: the quartile and the last measurement prevent it."""
    for seed in range(20):
        clock = Clock({f"op{n}": 2.0 for n in range(12)}, {f"op{n}": 2.0 for n in range(12)}, fp32=100, noise=0.03)
        clock.random = np.random.default_rng(seed)
        found = place(groups(*clock.int8), clock)
        assert found.verdict == INT8, f"seed {seed}: {names(found)}"


def test_a_gain_needs_most_rounds() -> None:
    before = np.full(15, 1.0)
    after = np.where(np.arange(15) < 8, 0.9, 1.1)  # the median gains 11%, a quartile loses
    assert not Gain.of(before, after).counts
    assert Gain.of(before, np.full(15, 0.9)).counts


def test_a_repeated_run_measures_nothing(tmp_path: Path) -> None:
    clock = Clock({"a": 10, "b": 8}, {"a": 40, "b": 4})
    first = StoredMeasurements(clock, {"cpu": "x"}, tmp_path)
    found = place(groups("a", "b"), first)
    again = StoredMeasurements(clock, {"cpu": "x"}, tmp_path)
    asked = len(clock.asked)
    assert place(groups("a", "b"), again) == found
    assert len(clock.asked) == asked == first.made
    assert (again.made, again.reused) == (0, asked)


@pytest.mark.parametrize("change", ["structure", "engine", "version", "cpu", "threads"])
def test_other_circumstances_are_measured_again(tmp_path: Path, change: str) -> None:
    clock = Clock({"a": 10}, {"a": 40})
    identity = {"structure": "s", "engine": "onnxruntime", "version": "1", "cpu": "x", "threads": 2}
    place(groups("a"), StoredMeasurements(clock, identity, tmp_path))
    other = StoredMeasurements(clock, {**identity, change: "other"}, tmp_path)
    place(groups("a"), other)
    assert (other.made, other.reused) == (2, 0)


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    times = ({f"op{n}": 5.0 for n in range(12)}, {f"op{n}": 1.0 if n < 2 else 9.0 for n in range(12)})
    whole = place(groups(*times[0]), Clock(*times))
    cut = Clock(*times, fails_after=2)
    with pytest.raises(KeyboardInterrupt):
        place(groups(*times[0]), StoredMeasurements(cut, {}, tmp_path))
    rest = Clock(*times)
    measure = StoredMeasurements(rest, {}, tmp_path)
    assert place(groups(*times[0]), measure) == whole
    assert measure.reused == 2
    assert names(whole) == ["OP0", "OP1"]


@pytest.mark.parametrize("damage", ["no JSON", "other measurements", "a label is missing", "rounds are missing"])
def test_a_damaged_file_of_measurements_is_measured_again(tmp_path: Path, damage: str) -> None:
    clock = Clock({"a": 10}, {"a": 40})
    stored = StoredMeasurements(clock, {}, tmp_path)
    place(groups("a"), stored)
    record = json.loads(stored.path.read_text())
    for found in record["measurements"].values():
        if damage == "a label is missing":
            found.pop("all")
        elif damage == "rounds are missing":
            found["all"].pop()
    if damage == "other measurements":
        record["measurements"] = {"x": 3}
    stored.path.write_text("{" if damage == "no JSON" else json.dumps(record))
    measure = StoredMeasurements(clock, {}, tmp_path)
    place(groups("a"), measure)
    assert measure.made == 2


def test_verdict_lines() -> None:
    assert verdict_line(INT8, 0, 64, "openvino", "bf16") == "INT8 everywhere: no op is worth reverting in openvino here"
    mixed = verdict_line(MIXED, 3, 64, "onnxruntime", "fp32")
    assert mixed == "mixed: 3 of 64 ops in float, since onnxruntime computes them sooner so here"
    assert verdict_line(FLOAT, 0, 64, "openvino", "bf16") == "ship BF16: INT8 is not faster in openvino here"


def test_the_table_says_the_verdict() -> None:
    figures = {"map": 0.5, "map50": 0.7, "bytes": 4_000_000}
    step = {**figures, "name": "ptq:mse", "map_drop": 0.001, "chosen": True, "quantized": 9, "seconds": 3.0}
    latency = {
        "rounds": 9,
        "fp32": {"p50_ms": 9.0, "p90_ms": 9.5},
        "int8": {"p50_ms": 9.1, "p90_ms": 9.6},
        "ratio": 0.99,
    }
    record = {
        "fp32": figures, "steps": [step], "quantizable_ops": 10, "seconds": {}, "latency": latency,
        "evaluation": {"images": 50, "engine": "openvino", "device": "CPU"},
    }  # fmt: skip
    assert "INT8 is not faster than FP32 in openvino here" in compression_table(record)
    placement = PlacementRecord(
        "mixed", "mixed: 3 of 10 ops in float", "openvino", 10, ["a", "b", "c"], {"backbone, 1x1 convolutions": 3},
        latency_ms={"all": 9.04, "placed": 8.2, "fp32": 9.0},
    )  # fmt: skip
    table = compression_table({**record, "placement": dataclasses.asdict(placement)})
    assert "placement: mixed: 3 of 10 ops in float" in table
    assert "INT8 everywhere 9.0, as saved 8.2, FP32 9.0" in table
    assert "in float: backbone, 1x1 convolutions (3 ops)" in table
    assert "INT8 is not faster" not in table


def test_a_real_run_in_onnx_runtime(
    int8_model: InferenceModel, float_model: InferenceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model: its convolution alone in float, and the float model, in processes of ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(placement_timing, "ROUNDS", 3)
    with static_mode(), contextlib.closing(StaticGraph.load(float_model)) as graph:
        found = quantizable_ops(graph, ["conv2d"])
        tiny = group_ops(graph, found)
        structure = structure_hash(graph, tiny)
    assert [group.name for group in tiny] == [f"model, 3x3 convolutions, {SIZE}x{SIZE}"]
    feeds = [
        {
            "image": np.full((1, 3, SIZE, SIZE), value, np.float32),
            "im_shape": np.full((1, 2), SIZE, np.float32),
            "scale_factor": np.ones((1, 2), np.float32),
        }
        for value in (0.25, 0.5)
    ]
    said: list[str] = []
    timer = placement_timing.Timer(
        int8_model, None, float_model, "onnxruntime", 1, feeds, tmp_path, None, said.append
    )  # fmt: skip
    measure = StoredMeasurements(timer, {"structure": structure}, tmp_path / "cache")
    with static_mode():
        times = measure({"all": frozenset(), "alone": frozenset(tiny[0].ops), "fp32": "fp32"})
        assert {label: len(taken) for label, taken in times.items()} == {"all": 3, "alone": 3, "fp32": 3}
        assert all(0 < value < 10 for taken in times.values() for value in taken)
        decided = place(tiny, measure)
        again = place(tiny, StoredMeasurements(timer, {"structure": structure}, tmp_path / "cache"))
    assert decided.verdict in (INT8, MIXED, FLOAT) and set(decided.gains) == {tiny[0].name}
    assert again == decided
    assert len(said) == measure.made
    assert not list(tmp_path.glob("tmp*")), "the variants are removed"


def test_other_engines_are_refused() -> None:
    config = SimpleNamespace(path="c.yml", strategy=SimpleNamespace(placement="measured"))
    check_placement(config, "openvino", "CPU")
    with pytest.raises(UserError, match="the engine is paddle on the CPU, expected one of openvino, onnxruntime"):
        check_placement(config, "paddle", "CPU")
    check_placement(SimpleNamespace(path="", strategy=SimpleNamespace(placement="all")), "paddle", "CPU")


@pytest.mark.parametrize(("fp32_ms", "verdict"), [(20.0, INT8), (10.1, FLOAT)])
def test_a_placement_that_is_not_within_the_limits_tells_of_the_model_that_is_saved(fp32_ms, verdict) -> None:
    latency_ms = {"all": 10.0, "placed": 8.0, "fp32": fp32_ms}
    kept = Placement(MIXED, (OpGroup("a", ("x",)),), {"a": 0.2}, latency_ms, 1.5, "fp32").without_reverts()
    assert (kept.verdict, kept.ops, kept.latency_ms["placed"]) == (verdict, (), 10.0)
    assert kept.int8_gain == pytest.approx(fp32_ms / 10 - 1)
