"""Search for faster variants: what is tried, what is dropped, the Pareto front, and a whole search of the sample."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sample_fixtures import scenes_in

from act_pipeline.cli.main import main
from act_pipeline.config import load_config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import Interrupted, UserError, run_command
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import ACT_SCHEMA, SEARCH_SCHEMA, read_record
from act_pipeline.data.builtin_sample import make_sample
from act_pipeline.demo import COMPRESS_CONFIG, MODEL_CONFIG, WEIGHTS
from act_pipeline.engines.onnx_runtimes.openvino import computes_in_bf16
from act_pipeline.evaluation.batches import Latencies
from act_pipeline.evaluation.confidence import AgreementLoss, Difference
from act_pipeline.search import halving
from act_pipeline.search.halving import Entry, Limits, halve, steps
from act_pipeline.search.outcome import Row, SearchOutcome, draw, fastest_within, with_front
from act_pipeline.search.pareto import front
from act_pipeline.search.screening import screen
from act_pipeline.search.variants import Source, Variant

SIZE = (224, 224)


# --- fronts ----------------------------------------------------------------------------------------------------------


def test_the_front_has_what_nothing_beats_in_both() -> None:
    points = [(3.0, 0.5), (1.0, 0.3), (2.0, 0.3), (2.0, 0.4), (4.0, 0.5), (1.0, 0.2)]
    assert front(points) == [1, 3, 0]
    assert front([(1.0, 0.5), (1.0, 0.5)]) == [0, 1]  # equal points do not beat each other


# --- variants --------------------------------------------------------------------------------------------------------


def exported(folder: Path, **changes) -> InferenceModel:
    """Return a model folder as export_model leaves it, without a real program."""
    folder.mkdir(parents=True)
    for name in ("model.pdmodel", "model.pdiparams"):
        (folder / name).write_bytes(b"x")
    record = {
        "schema": "act_pipeline.export/1",
        "config": str(MODEL_CONFIG),
        "overrides": [f"weights={WEIGHTS}", "trt=True"],
        "input_size": list(SIZE),
        "source_hash": hash_files([WEIGHTS]),
        **changes,
    }
    (folder / "export.json").write_text(json.dumps(record))
    return InferenceModel.load(folder)


def test_the_variants_of_the_sample_are_its_layers_and_queries(tmp_path: Path) -> None:
    source = Source.of(exported(tmp_path / "model"))
    assert source.full == Variant(2, 50, SIZE)
    found = source.variants()
    assert found[0] == source.full and len(found) == len(set(found)) == 6
    assert {(one.layers, one.queries) for one in found} == {(a, b) for a in (1, 2) for b in (50, 30, 20)}
    # The model as it is comes first, also where the flags do not have it.
    assert source.variants(layers=[1], queries=[10], sizes=[(192, 160)]) == [source.full, Variant(1, 10, (192, 160))]
    assert Variant(1, 10, (192, 160)).overrides() == [
        "TestReader.inputs_def.image_shape=[3, 192, 160]", "eval_size=[192, 160]", "RTDETRTransformer.eval_idx=0",
        "RTDETRTransformer.num_queries=10",
    ]  # fmt: skip


def test_a_model_that_was_exported_cut_is_the_full_one_of_its_search(tmp_path: Path) -> None:
    overrides = [f"weights={WEIGHTS}", "RTDETRTransformer.eval_idx=0", "RTDETRTransformer.num_queries=40"]
    assert Source.of(exported(tmp_path / "model", overrides=overrides)).full == Variant(1, 40, SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "--layers=3, expected a number from 1 to 2, which the model has"),
        ({"queries": [60]}, "--queries=60, expected a number from 5 to 50"),
        ({"queries": [4]}, "--queries=4, expected a number from 5 to 50"),  # 4 x 10 classes: fewer than 50 rows
        ({"layers": [2], "queries": [50]}, "there is nothing to search"),
    ],
)
def test_what_the_model_does_not_have_is_one_line(tmp_path: Path, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Source.of(exported(tmp_path / "model")).variants(**options)


def test_a_model_of_another_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is missing or has changed since; export it again"):
        Source.of(exported(tmp_path / "changed", source_hash="sha256:0"))
    model = exported(tmp_path / "imported")
    (model.directory / "export.json").unlink()
    with pytest.raises(UserError, match=r"has no export\.json, expected a model of tools/export_model\.py"):
        Source.of(model)


def test_another_model_has_sizes_only(tmp_path: Path) -> None:
    config = tmp_path / "other.yml"
    config.write_text(f"architecture: PPYOLOE\nweights: {WEIGHTS}\n")
    source = Source.of(exported(tmp_path / "model", config=str(config), overrides=[]))
    assert source.variants(sizes=[(192, 192)]) == [Variant(None, None, SIZE), Variant(None, None, (192, 192))]
    with pytest.raises(UserError, match="--queries is for RT-DETR"):
        source.variants(queries=[10])


# --- halving ---------------------------------------------------------------------------------------------------------


def test_steps_have_enough_images() -> None:
    assert steps(72) == [18, 36, 72] and steps(40) == [20, 40] and steps(8) == [8]


def test_a_third_of_the_variants_go_on_and_those_beyond_max_drop_do_not(monkeypatch) -> None:
    """Variants of known latency and mAP; the interval of each change is 0.01 to either side."""
    known = {"fast": (1, 0.49), "middle": (2, 0.495), "slow": (3, 0.494), "slower": (4, 0.493), "bad": (1, 0.30)}
    more = {f"slowest{number}": (5 + number, 0.49) for number in range(2)}
    known.update(more)
    evaluated: list[tuple[str, int]] = []

    def evaluate(entry, count):
        evaluated.append((entry.variant, count or 64))
        return SimpleNamespace(map=known[entry.variant][1], images=count or 64)

    def compared(reference, evaluation, truth):
        change = evaluation.map - reference.map
        return Difference(change, change - 0.01, change + 0.01, 0.005, 1, 1, np.array([change]))

    monkeypatch.setattr(halving, "compare_on_some", compared)
    entries = [Entry(name, None, None, latencies=Latencies({}, 10 / ms)) for name, (ms, _) in known.items()]
    limits = Limits(SimpleNamespace(map=0.5, images=64), None, 0.02)
    alive = halve(entries, evaluate, limits)
    assert {entry.variant for entry in alive} == {"fast"}
    reasons = {entry.variant: entry.dropped for entry in entries}
    assert reasons["fast"] is None and reasons["bad"] == "mAP -0.2000 on 16 images, surely beyond max_drop"
    assert reasons["slow"] == reasons["slower"] == "others are faster or better on 16 images"
    assert reasons["middle"] == "others are faster or better on 32 images"
    assert {reasons[name] for name in more} == {"others are faster or better on 16 images"}
    assert [count for _, count in evaluated] == [16] * 7 + [32] * 2 + [64]
    for entry in entries:
        entry.dropped = None
    assert len(halve(entries, evaluate, limits, keep=3)) == 3
    # What is within max_drop comes before what is faster.
    closer = dataclasses.replace(limits, max_drop=0.0065)
    assert [entry.variant for entry in halving.ranked(entries, closer)][:2] == ["middle", "slow"]
    # What the first step found before is not evaluated again.
    evaluated.clear()
    for entry in entries:
        entry.dropped, entry.evaluation = None, None
        limits.judge(entry, evaluate(entry, 16))
    halve([entry for entry in entries if not entry.dropped], evaluate, limits)
    assert [count for _, count in evaluated] == [16] * 7 + [32] * 2 + [64]


def test_what_may_be_within_the_limits_and_is_faster_goes_on() -> None:
    """Names: probability of a drop within 0.02, speed-up. The measured drop of the second one is beyond the limit."""

    def entry(name: str, share: float, ratio: float, found: float = 0.5) -> Entry:
        drops = np.where(np.arange(100) < 100 * share, 0.0, -0.05)
        difference = Difference(float(np.median(drops)), -0.05, 0.0, 0.02, 100, 18, drops)
        return Entry(name, None, None, (), Latencies({}, ratio), SimpleNamespace(map=found), difference)

    limits = Limits(SimpleNamespace(map=0.5, images=72), None, 0.02)
    sure, likely, hardly = entry("sure", 1.0, 1.02), entry("likely", 0.4, 1.1), entry("hardly", 0.05, 1.2)
    slow, slower = entry("slow", 1.0, 0.99, 0.51), entry("slower", 1.0, 0.9, 0.50)
    found = halving.ranked([slower, hardly, sure, slow, likely], limits)
    assert [one.variant for one in found] == ["likely", "sure", "hardly", "slow", "slower"]
    assert not halving.within(likely, limits) and halving.within(sure, limits)


def test_a_variant_that_agrees_too_little_is_dropped(monkeypatch) -> None:
    """All have the mAP of the full model; the interval of each agreement is 0.02 to either side."""
    known = {"other": 0.7, "near": 0.89, "same": 0.95}
    monkeypatch.setattr(halving, "compare_on_some", lambda reference, evaluation, truth: None)
    monkeypatch.setattr(
        halving, "agreement_on_some",
        lambda reference, one: AgreementLoss(
            one.agrees - 1, one.agrees - 1.02, one.agrees - 0.98, 0.01, 1, 1, np.full(1, one.agrees - 1)
        ),
    )  # fmt: skip

    def evaluate(entry, count):
        return SimpleNamespace(map=0.5, images=count or 64, agrees=known[entry.variant])

    entries = [Entry(name, None, None, latencies=Latencies({}, 10 / ms)) for ms, name in enumerate(known, 1)]
    limits = Limits(SimpleNamespace(map=0.5, images=64), None, 0.02, min_agreement=0.9)
    alive = halve(entries, evaluate, limits, 2)
    assert [entry.variant for entry in alive] == ["near", "same"]
    assert entries[0].dropped == "agreement 0.7000 with the full model on 16 images, surely below min_agreement"
    assert [entry.variant for entry in halving.ranked(alive, limits)] == ["same", "near"]
    assert [halving.within(entry, limits) for entry in alive] == [False, True]
    for entry in entries:
        entry.dropped = None
    assert len(halve(entries, evaluate, dataclasses.replace(limits, min_agreement=None), 3)) == 3


def test_smaller_variants_of_one_beyond_the_limits_are_not_tried() -> None:
    full = Variant(3, 300, (640, 640))
    variants = [Variant(*one) for one in itertools.product((3, 2, 1), (300, 100), ((640, 640), (512, 512)))]
    looks: list[list[Variant]] = []

    def look(entries) -> None:
        looks.append([entry.variant for entry in entries])
        for entry in entries:
            bad = entry.variant.size[0] == 512 or entry.variant.layers == 1
            entry.dropped = "surely beyond max_drop" if bad else None

    entries, skipped = screen([one for one in variants if one != full], lambda one: Entry(one, None, None), look)
    assert looks == [
        [Variant(3, 300, (512, 512)), Variant(3, 100, (640, 640)), Variant(2, 300, (640, 640))],
        [Variant(2, 100, (640, 640)), Variant(1, 300, (640, 640))],
    ]
    assert [entry.variant for entry in entries] == [one for look in looks for one in look]
    assert len(entries) + len(skipped) == len(variants) - 1
    for each in skipped:
        assert each.larger in (Variant(3, 300, (512, 512)), Variant(1, 300, (640, 640)))
        assert each.variant.is_cut_of(each.larger) and not each.larger.is_cut_of(each.variant)
    assert not Variant(2, 300, (640, 640)).is_cut_of(Variant(3, 100, (640, 640)))


def test_few_variants_are_in_memory_at_a_time() -> None:
    looks: list[int] = []
    variants = [Variant(None, None, (size, size)) for size in range(320, 640, 32)]
    entries, skipped = screen(variants, lambda one: Entry(one, None, None), lambda some: looks.append(len(some)))
    assert looks == [4, 4, 2] and len(entries) == 10 and not skipped


# --- the result ------------------------------------------------------------------------------------------------------


def row(name: str, latency_ms: float, found: float, precision: str = "int8", images: int = 72, **more) -> Row:
    return Row(
        name, f"640 x 640, {name}", 2, 100, [640, 640], precision, f"/m/{name}", 1_000_000, found, images,
        0.53 - found, 0.0, 0.01, 0.6, latency_ms, 50 / latency_ms, **more,
    )  # fmt: skip


def test_table_picture_and_record(tmp_path: Path) -> None:
    rows = with_front(
        [row("a", 50, 0.53), row("b", 40, 0.528), row("c", 45, 0.52), row("d", 20, 0.4, images=18, dropped="worse"),
         row("e", 200, 0.53, precision="fp32")]
    )  # fmt: skip
    assert [(one.name, one.on_front) for one in rows] == [
        ("d", False), ("b", True), ("c", False), ("a", True), ("e", False)
    ]  # fmt: skip
    outcome = SearchOutcome(
        rows, rows[1], 0.005, 0.5, "openvino on CPU", {"time": 1.0}, {"model": "m"},
        skipped=[("640 x 640, f", "640 x 640, d"), ("640 x 640, g", "640 x 640, d")],
    )  # fmt: skip
    text = "\n".join(outcome.lines)
    assert "fastest within max_drop 0.005: 640 x 640, b: 1.25 times as fast as the full model in INT8" in text
    assert outcome.lines[-1] == "to ship it, compress its float model, Global.model_dir=/m/e"
    in_bf16 = dataclasses.replace(outcome, chosen=dataclasses.replace(rows[1], bf16=True))
    assert in_bf16.lines[-1].endswith("/m/e; for bf16, with the line 'float_precision: bf16' in its infer_cfg.yml")
    assert "dropped: 640 x 640, d: worse" in text
    assert "not tried: 2 smaller than 640 x 640, d" in text
    assert outcome.as_json()["skipped"][1] == {"variant": "640 x 640, g", "larger": "640 x 640, d"}
    (line,) = [line for line in text.splitlines() if line.endswith("  chosen")]
    assert line.startswith("640 x 640, b ")
    assert outcome.as_json()["chosen"] == {"name": "b", "precision": "int8"}
    draw(outcome, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000
    full = dataclasses.replace(outcome, chosen=rows[3])
    assert rows[3].ratio == 1 and "no variant within max_drop 0.005 is faster than the full model" in full.lines[-1]
    none = dataclasses.replace(outcome, chosen=None)
    assert "no INT8 model is within max_drop 0.005 of the full float model" in "\n".join(none.lines)


def test_of_rows_that_are_as_fast_the_better_is_chosen() -> None:
    rows = [row("fast", 40.0, 0.526), row("as fast", 40.7, 0.529), row("slower", 42.0, 0.53)]
    assert fastest_within(rows, 0.005, 0.5).name == "as fast"
    assert fastest_within(rows[:1] + rows[2:], 0.005, 0.5).name == "fast"
    assert fastest_within([], 0.005, 0.5) is None


def test_the_chosen_row_has_min_agreement() -> None:
    rows = [
        row("fast", 30, 0.53, agreement=0.8, agreement_probability=0.0),
        row("near", 40, 0.53, agreement=0.91, agreement_probability=0.7),
        row("full", 50, 0.53, agreement=0.97, agreement_probability=1.0),
    ]

    def chosen(confidence: float, min_agreement: float | None) -> str | None:
        found = fastest_within(rows, 0.005, confidence, min_agreement)
        return None if found is None else found.name

    assert chosen(0.5, None) == "fast" and chosen(0.5, 0.9) == "near" and chosen(0.6, 0.9) == "near"
    assert chosen(0.5, 0.95) == "full" and chosen(0.5, 0.99) is None
    rows[1] = dataclasses.replace(rows[1], agreement_probability=0.55)
    assert chosen(0.6, 0.9) == "full" and chosen(0.5, 0.9) == "near"
    outcome = SearchOutcome(rows, rows[1], 0.005, 0.5, "openvino on CPU", {}, {}, min_agreement=0.9)
    text = "\n".join(outcome.lines)
    assert "fastest within max_drop 0.005 and min_agreement 0.9: 640 x 640, near" in text and "agreement" in text
    assert "0.9100" in text and outcome.as_json()["min_agreement"] == 0.9


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--queries", "a,b"], "found 'a,b', expected whole numbers such as 100,200,300"),
        (["--sizes", "640x640x3"], "found '640x640x3', expected a size such as 640, or HEIGHTxWIDTH"),
        (["--candidates", "0"], "found '0', expected a whole number of at least 1"),
    ],
)
def test_flags_say_what_is_wrong(argv, message: str, capsys) -> None:
    assert run_command(main, ["search", *argv]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_what_ends_a_search_early_is_one_line(demo, tmp_path: Path, monkeypatch, capsys) -> None:
    from act_pipeline.search import search as searching

    argv = ["search", "-c", str(COMPRESS_CONFIG), "-o", f"Global.model_dir={demo.fp32.directory}"]
    assert run_command(main, [*argv, f"--save_dir={demo.fp32.directory}"]) == 2
    assert "--save_dir is the folder of the model" in capsys.readouterr().err

    def interrupt(*args, **more):
        raise Interrupted(signal.SIGINT, "nothing is saved: start it again")

    monkeypatch.setattr(searching, "search", interrupt)
    assert run_command(main, [*argv, f"--save_dir={tmp_path}"]) == 130
    said = capsys.readouterr().err
    assert f"the search is not finished; the same command goes on with what is in {tmp_path}" in said
    assert "nothing is saved" not in said


@pytest.mark.slow
def test_the_sample_is_searched(sample_model: InferenceModel, tmp_path: Path) -> None:
    """All of it: exports, halving, INT8 of the best, with an input size that the model was not trained at."""
    from act_pipeline.search.search import search

    make_sample(tmp_path / "data", 40, 40, seed=0, size=256)
    overrides = scenes_in(tmp_path / "data")
    config = load_config(COMPRESS_CONFIG, [f"Global.model_dir={sample_model.directory}", "Strategy.max_drop=0.05",
                                           "Strategy.min_agreement=0.5"])  # fmt: skip
    outcome = search(
        config, tmp_path / "search", "cpu", layers=[2], queries=[50, 20], sizes=[SIZE, (160, 160)], candidates=1,
        progress=False, reader_overrides=overrides, say=lambda line: None,
    )  # fmt: skip
    record = read_record(tmp_path / "search" / "search.json", SEARCH_SCHEMA)
    assert record["chosen"] == {"name": outcome.chosen.name, "precision": "int8"}
    by_name = {(one["name"], one["precision"]): one for one in record["rows"]}
    in_bf16 = 2 if computes_in_bf16() else 0
    skipped = record["skipped"]  # at 160 x 160 with fewer queries, if all of them lose too much
    assert (
        len(by_name) == 4 - len(skipped) + 2 + in_bf16
        and len(skipped) <= 1
        and (tmp_path / "search" / "search.png").exists()
    )
    stated = [InferenceModel.load(one["folder"]).infer_cfg().get("float_precision") for one in record["rows"]]
    assert stated.count("bf16") == in_bf16 == [one["bf16"] for one in record["rows"]].count(True)
    strategies = {
        one["name"]: read_record(Path(one["folder"]) / "act.json", ACT_SCHEMA)["strategy"]
        for one in record["rows"] if one["precision"] == "int8" and not one["bf16"]
    }  # fmt: skip
    assert strategies.pop("layers2_queries50_224x224") == "ptq" and set(strategies.values()) == {"auto"}
    full = by_name["layers2_queries50_224x224", "fp32"]
    assert full["map_drop"] is None and full["ratio"] == 1 and full["map"] > 0.5
    for one in record["rows"]:
        model = InferenceModel.load(one["folder"])
        assert model.bytes == one["bytes"] and one["latency_ms"] > 0
        if one["dropped"] is None and one["map_drop"] is not None:
            assert one["map"] == pytest.approx(full["map"] - one["map_drop"], abs=1e-6)
    agreed = {key: one["agreement"] for key, one in by_name.items() if one["precision"] == "int8"}
    assert all(0.5 <= value < 1 for value in agreed.values()) and full["agreement"] is None
    smaller = by_name["layers2_queries50_160x160", "fp32"]
    assert smaller["latency_ms"] < full["latency_ms"]
    assert outcome.chosen.map_drop <= 0.05
