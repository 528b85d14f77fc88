"""Scores compared with cases worked out by hand, latency with a simulated clock, and drawn images."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from inference_fixtures import OBJECT, TinyReader, make_tiny_data

from act_pipeline.core import progress
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.evaluation import (
    EVAL_SCHEMA,
    STAT_NAMES,
    evaluate,
    evaluate_in_parallel,
)
from act_pipeline.evaluation.batches import latency_percentiles, measure_latency
from act_pipeline.inference.visualize import detection_label, draw_detections, read_image


class ScriptedEngine:
    """An engine whose rows are a function of an image's original (height, width) and its index in the run."""

    name, precision, device, threads = "scripted", "fp32", "CPU", 1

    def __init__(self, rows, clock=None, seconds=()):
        self._rows, self._clock, self._seconds, self.sizes = rows, clock, list(seconds), []

    def run(self, inputs):
        if self._seconds:
            self._clock.now += self._seconds.pop(0)
        self.sizes.append(len(inputs["image"]))
        original = inputs["im_shape"] / inputs["scale_factor"]
        rows = [np.float32(self._rows(height, width)).reshape(-1, 6) for height, width in original]
        return {"bbox": np.concatenate(rows), "bbox_num": np.int32([len(part) for part in rows])}

    def close(self):
        raise AssertionError("evaluate must not close an engine that it was given")

    def versions(self):
        return {"scripted": "1"}


def right(height, width, score=0.9, class_index=0):
    return [class_index, score, OBJECT[0] * width, OBJECT[1] * height, OBJECT[2] * width, OBJECT[3] * height]


@pytest.fixture()
def reader(tmp_path):
    annotations = make_tiny_data(tmp_path / "data", images=4)
    return TinyReader(annotations, annotations.parent / "images")


def run(rows, reader, **options):
    options = {"progress": False, **options}
    return evaluate(ScriptedEngine(rows), reader, **options)


def test_all_found_is_one_and_the_category_ids_are_the_files(reader):
    evaluation = run(lambda h, w: [right(h, w)], reader, batch_size=3)
    assert evaluation.map == evaluation.map50 == 1.0 and evaluation.images == 4
    assert evaluation.per_class == {"disc": 1.0, "square": None}
    assert set(evaluation.detections[:, 6]) == {7} and list(evaluation.detections[:, 0]) == [0, 1, 2, 3]
    assert evaluation.image_ids == [100, 101, 102, 103]
    np.testing.assert_allclose(evaluation.detections[0, 1:5], [16, 10, 32, 15], rtol=1e-5)  # x, y, width, height


def test_the_wrong_class_is_zero(reader):
    assert run(lambda h, w: [right(h, w, class_index=1)], reader).map == 0.0


def test_half_found_is_half_by_the_101_points_of_recall(reader):
    # Detected in the two images of height 48 or less: recall 0.5, precision 1 at recalls 0, 0.01, ..., 0.50.
    evaluation = run(lambda h, w: [right(h, w)] if h < 50 else [], reader)
    assert evaluation.map == pytest.approx(51 / 101, abs=1e-6)
    assert evaluation.stats["ar100"] == pytest.approx(0.5)


def test_a_surer_false_box_halves_precision(reader):
    evaluation = run(lambda h, w: [right(h, w), [0, 0.95, 0, 0, 5, 5]], reader)
    assert evaluation.map == pytest.approx(0.5, abs=0.01)


def test_a_box_that_is_a_bit_off_counts_up_to_its_iou(reader):
    def narrow(height, width):
        row = right(height, width)
        return [[*row[:4], row[2] + 0.72 * (row[4] - row[2]), row[5]]]  # IoU 0.72: right at 0.50 ... 0.70, 5 of 10

    evaluation = run(narrow, reader)
    assert (evaluation.map50, evaluation.map) == (1.0, pytest.approx(0.5))


def test_only_the_images_asked_for_are_scored(reader):
    engine = ScriptedEngine(lambda h, w: [right(h, w)] if h < 60 else [])  # the fourth is not found
    evaluation = evaluate(engine, reader, limit=3, batch_size=2, progress=False)
    assert evaluation.images == 3 and evaluation.map == 1.0
    assert engine.sizes == [2, 2, 1]  # one warm-up run, then three images
    assert run(lambda h, w: [right(h, w)] if h < 60 else [], reader).map < 1.0


def test_nothing_found_is_zero(reader):
    evaluation = run(lambda h, w: [], reader)
    assert evaluation.map == 0.0 and len(evaluation.summary) == 12 and evaluation.detections.shape == (0, 7)


def test_rows_of_class_minus_one_are_no_detections(reader):
    evaluation = run(lambda h, w: [right(h, w), [-1, 0, 0, 0, 0, 0]], reader)
    assert len(evaluation.detections) == 4 and evaluation.map == 1.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            lambda h, w: [right(h, w, class_index=2)],
            "found class 2, but .*annotations.json has 2 categories.*correct arch in its infer_cfg",
        ),
        (lambda h, w: [right(h, w, score=float("nan"))], "not finite .* on image id 100"),
        (lambda h, w: [[0, 0.5, 0, 0, float("inf"), 1]], "not finite"),
    ],
)
def test_outputs_that_cannot_be_are_one_line(reader, row, message):
    with pytest.raises(UserError, match=message):
        run(row, reader)


def test_counts_that_do_not_add_up_are_one_line(reader):
    engine = ScriptedEngine(lambda h, w: [right(h, w)])
    engine.run = lambda inputs: {"bbox": np.zeros((3, 6), np.float32), "bbox_num": np.int32([2])}
    with pytest.raises(UserError, match=r"gave bbox \[3, 6\] and bbox_num \[2\] for 1 images"):
        evaluate(engine, reader, progress=False)


@pytest.mark.parametrize("content", ["", "[]", "no json", '{"images": [{}]}'])
def test_an_annotation_file_of_another_kind_is_one_line(reader, content):
    reader.annotation_file("eval").write_text(content, encoding="utf-8")
    with pytest.raises(
        UserError, match="annotations.json.* expected COCO's form|annotations.json holds no JSON object"
    ):
        run(lambda h, w: [], reader)


@pytest.fixture()
def clock(monkeypatch):
    """A clock that only an engine advances."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("act_pipeline.evaluation.batches.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_the_first_run_is_not_timed_and_the_last_partial_batch_not_in_the_percentiles(reader, clock):
    engine = ScriptedEngine(lambda h, w: [right(h, w)], clock, seconds=[5.0, 0.02, 0.06])
    evaluation = evaluate(engine, reader, batch_size=3, progress=False)
    assert engine.sizes == [3, 3, 1]
    assert evaluation.latency_ms == dict.fromkeys(["min", "p50", "p90", "p99", "max"], pytest.approx(20))
    assert evaluation.images_per_second == pytest.approx(4 / 0.08)


@pytest.mark.parametrize(("threads", "device", "workers"), [(1000, "CPU", 0), (0, "CPU", None), (1000, "GPU", None)])
def test_nothing_reads_ahead_on_the_cores_that_are_timed(reader, threads, device, workers):
    engine, asked, loader = ScriptedEngine(lambda h, w: []), [], reader.loader
    engine.threads, engine.device = threads, device
    reader.loader = lambda split, **options: asked.append(options["workers"]) or loader(split, **options)
    evaluate(engine, reader, progress=False)
    assert asked == [workers]


class Met(ScriptedEngine):
    """An engine that runs only while another engine runs."""

    def __init__(self, rows, meeting):
        super().__init__(rows)
        self.meeting = meeting

    def run(self, inputs):
        self.meeting.wait(timeout=20)
        return super().run(inputs)


def test_engines_run_beside_each_other_and_find_what_one_finds(reader):
    meeting = threading.Barrier(2)
    engines = [Met(lambda h, w: [right(h, w, score=h / 1000)], meeting) for _ in range(2)]
    alone, beside = run(engines[0]._rows, reader), evaluate_in_parallel(engines, reader, progress=False)
    assert [sum(engine.sizes) for engine in engines] == [2, 2]
    np.testing.assert_array_equal(beside.detections, alone.detections)
    assert (beside.map, beside.stats, beside.per_class) == (alone.map, alone.stats, alone.per_class)
    assert beside.latency_ms is None and beside.images_per_second > 0


def test_images_of_an_earlier_evaluation_are_not_run_again(reader):
    def rows(height, width):
        return [right(height, width, score=height / 1000)] if height < 60 else []

    engine = ScriptedEngine(rows)
    first = evaluate_in_parallel([engine], reader, progress=False, limit=1)
    some = evaluate_in_parallel([engine], reader, progress=False, limit=3, before=first)
    whole = evaluate_in_parallel([engine], reader, progress=False, before=some)
    assert engine.sizes == [1] * 4 and (first.images, some.images, whole.images) == (1, 3, 4)
    exact = run(rows, reader)
    assert (whole.map, whole.stats, whole.image_ids) == (exact.map, exact.stats, exact.image_ids)
    np.testing.assert_array_equal(whole.detections, exact.detections)


def test_one_engine_beside_none_has_latencies(reader):
    found = evaluate_in_parallel([ScriptedEngine(lambda h, w: [right(h, w)])], reader, progress=False)
    assert found.latency_ms["p50"] >= 0 and found.images == 4


def test_an_engine_that_fails_ends_the_evaluation_when_no_other_runs(reader):
    running = []

    class Failing(ScriptedEngine):
        def run(self, inputs):
            running.append(self)
            try:
                return super().run(inputs)
            finally:
                running.remove(self)

    engines = [Failing(lambda h, w: [right(h, w, score=float("nan"))]) for _ in range(3)]
    with pytest.raises(UserError, match="not finite"):
        evaluate_in_parallel(engines, reader, progress=False)
    assert not running and not any(thread.name.startswith("engine") for thread in threading.enumerate())


def test_percentiles():
    values = latency_percentiles([i / 1000 for i in range(1, 102)])
    assert values == {"min": 1.0, "p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 101.0}


def test_measuring_latency_goes_round_the_batches_after_a_warm_up(clock):
    engine = ScriptedEngine(lambda h, w: [], clock, seconds=[5.0, 5.0, 0.01, 0.02, 0.03, 0.04])
    seen = []
    engine.run, run_batch = lambda inputs: seen.append(inputs["image"][0, 0, 0, 0]) or run_batch(inputs), engine.run
    batches = [
        {
            "image": np.full((2, 3, 4, 4), value, np.float32),
            "im_shape": np.ones((2, 2)),
            "scale_factor": np.ones((2, 2)),
        }
        for value in range(3)
    ]
    latency_ms, images_per_second = measure_latency(engine, batches, warmup=2, repeats=4)
    assert seen == [0, 1, 2, 0, 1, 2] and images_per_second == pytest.approx(8 / 0.1)
    assert [latency_ms[name] for name in ("min", "p50", "mean", "max")] == pytest.approx([10, 25, 25, 40])


def test_the_twelve_lines_are_returned_and_nothing_is_printed(reader, capsys):
    evaluation = run(lambda h, w: [right(h, w)], reader)
    assert capsys.readouterr().out == ""
    assert evaluation.summary[0] == " Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000"
    assert len(evaluation.summary) == 12 and tuple(evaluation.stats) == STAT_NAMES


def test_the_progress_is_on_stderr(reader, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHORT_LOOP_S", 0)
    run(lambda h, w: [], reader, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "evaluate: 4 of 4" in captured.err


def test_the_record_has_what_the_report_needs(reader, tmp_path):
    engine = ScriptedEngine(lambda h, w: [right(h, w)])
    (tmp_path / "model.pdmodel").write_bytes(b"12345")
    (tmp_path / "model.pdiparams").write_bytes(b"123")
    model = InferenceModel.load(tmp_path)
    evaluation = evaluate(engine, reader, progress=False)
    evaluation.write_record(tmp_path / "eval.json", engine, model, reader, note="more")
    record = read_record(tmp_path / "eval.json", EVAL_SCHEMA)
    assert {
        key: record[key]
        for key in (
            "engine",
            "precision",
            "device",
            "threads",
            "images",
            "map",
            "map50",
            "model_bytes",
            "note",
            "versions",
            "batch_size",
        )
    } == {
        "engine": "scripted",
        "precision": "fp32",
        "device": "CPU",
        "threads": 1,
        "images": 4,
        "map": 1.0,
        "map50": 1.0,
        "model_bytes": 8,
        "note": "more",
        "versions": {"scripted": "1"},
        "batch_size": 1,
    }
    assert list(record["latency_ms"]) == ["min", "p50", "p90", "p99", "max"] and record["images_per_second"] > 0
    assert record["model_hash"] == model.content_hash() and len(record["stats"]) == 12


LONG_IDS = [2**62 + 1, -(2**62) - 1, 0, 2**53 + 1]


@pytest.fixture()
def long_ids(reader):
    """The same data with ids that exceed a float's precision, and negative ones."""
    path = reader.annotation_file("eval")
    content = json.loads(path.read_text(encoding="utf-8"))
    new = dict(zip([image["id"] for image in content["images"]], LONG_IDS))
    for image in content["images"]:
        image["id"] = new[image["id"]]
    for box in content["annotations"]:
        box["image_id"] = new[box["image_id"]]
    path.write_text(json.dumps(content), encoding="utf-8")
    return TinyReader(path, path.parent / "images")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ids_are_exact_whatever_their_size(long_ids, tmp_path, batch_size):
    evaluation = run(lambda h, w: [right(h, w), right(h, w, 0.1, 1)], long_ids, batch_size=batch_size)
    assert evaluation.map == 1.0 and evaluation.image_ids == sorted(LONG_IDS)
    evaluation.write_detections(tmp_path / "bbox.json")
    rows = json.loads((tmp_path / "bbox.json").read_text(encoding="utf-8"))
    # In the order of the images, whose heights are 40, 48, 56 and 64.
    assert [(row["image_id"], row["bbox"][3]) for row in rows[::2]] == list(zip(LONG_IDS, [15, 18, 21, 24]))
    with pytest.raises(UserError, match=f"not finite .* on image id {LONG_IDS[0]};"):
        run(lambda h, w: [right(h, w, score=float("nan"))], long_ids)


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 1.5, "7", None, True, [1]])
def test_an_id_that_is_no_whole_number_is_one_line(reader, number):
    path = reader.annotation_file("eval")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["images"][1]["id"] = number
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"annotations.json: images\[1\].id is .*, expected a whole number of less"
    ) as raised:
        run(lambda h, w: [], reader)
    assert "\n" not in str(raised.value)


def test_a_category_id_that_no_float_holds_is_one_line(reader):
    path = reader.annotation_file("eval")
    path.write_text(path.read_text(encoding="utf-8").replace('"id": 7,', f'"id": {2**53 + 1},'), encoding="utf-8")
    with pytest.raises(UserError, match=r"categories\[0\].id is 9007199254740993, expected one below 2\^53"):
        run(lambda h, w: [], reader)


def test_detections_are_written_in_cocos_form(reader, tmp_path):
    evaluation = run(lambda h, w: [right(h, w), right(h, w, 0.1, 1)], reader)
    evaluation.write_detections(tmp_path / "bbox.json")
    rows = json.loads((tmp_path / "bbox.json").read_text(encoding="utf-8"))
    assert len(rows) == 8
    assert rows[0] == {"image_id": 100, "category_id": 7, "bbox": [16.0, 10.0, 32.0, 15.0], "score": 0.9}
    assert rows[1]["category_id"] == 3


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture()
def gray(tmp_path):
    import cv2

    path = tmp_path / "gray.png"
    cv2.imwrite(str(path), np.full((123, 217, 3), 90, np.uint8))
    return path


def test_boxes_are_drawn_where_they_are(gray, tmp_path):
    before = gray.read_bytes()
    box = [[0, 0.8, 50, 60, 150, 100], [1, 0.4, 5, 5, 20, 20]]
    assert draw_detections(gray, np.float32(box), ["cat", "dog"], tmp_path / "out/a.png", threshold=0.5) == 1
    picture = read_image(tmp_path / "out/a.png").astype(int)
    assert picture.shape == (123, 217, 3) and gray.read_bytes() == before
    changed = np.abs(picture - 90).max(axis=2) > 20
    for y, x in ((80, 50), (80, 150), (60, 120), (100, 100)):  # the middle of each side
        assert changed[y - 1 : y + 2, x - 1 : x + 2].any()
    assert not changed[65:96, 55:146].any()  # inside
    assert not changed[:30, :].any() and not changed[104:, :].any()  # the box below the threshold, and the background
    assert changed[40:60, 50:100].any()  # the label above the box


def test_labels():
    assert detection_label(1, 0.876, ["a", "b"]) == "b 0.88"
    assert detection_label(5, 1, ["a", "b"]) == "class 5 1.00"


def test_names_that_are_no_plain_letters_are_drawn(gray, tmp_path):
    names = ["$x_1$ {}", "血小板", "a" * 300]
    rows = np.float32([[0, 1, -30, -30, 50, 50], [1, 0.9, 10, 10, 400, 400], [2, 0.8, 100, 100, 99, 99]])
    assert draw_detections(gray, rows, names, tmp_path / "out.jpg", threshold=0) == 3
    assert read_image(tmp_path / "out.jpg").shape == (123, 217, 3)


def test_pictures_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_image(tmp_path / "none.jpg")
    for content in (b"", b"no picture"):
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UserError, match="cannot be decoded"):
            read_image(tmp_path / "a.jpg")
