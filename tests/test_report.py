"""The report: its page, that each figure on it is in a record, and what is left out if not measured."""

from __future__ import annotations

import json
import re
import shlex
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
from report_fixtures import (
    FP32_HASH,
    INT8_HASH,
    VERSIONS,
    StubReader,
    analysis_record,
    latency,
    make_artifact,
    make_data,
    search_record,
    write_eval,
)

from act_pipeline.compress.result.act_record import compression_record
from act_pipeline.compress.result.candidate_details import CandidateDetails
from act_pipeline.compress.result.outcome import Measured
from act_pipeline.config import load_config
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import SEARCH_SCHEMA, read_record, write_record
from act_pipeline.report import REPORT_SCHEMA, write_report
from act_pipeline.report.render import number
from act_pipeline.report.scalars import LOG_FILENAME, write_scalars
from act_pipeline.report.sources import Sources, fastest_pair
from act_pipeline.report.texts import LANGUAGES, texts

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = (
    "models", "variants", "classes", "curves", "pictures", "errors", "sensitivity", "distributions", "time", "again",
)  # fmt: skip
_VOID = {"meta", "img", "br"}
_LEAVES = {"path", "rect", "use"}
_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\d[\d,]*(?:\.\d+)?")


class Page(HTMLParser):
    """A strict parser of the page: tags must be nested, ids unique."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        # For each piece of text: the text, and the open tags with their attributes.
        self.texts: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"not closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice: {tag} {attributes}"
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in _VOID:
            self.stack.append((tag, found))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1][0] == tag, f"</{tag}> in {[name for name, _ in self.stack]}"
        self.stack.pop()

    def handle_data(self, text):
        if text.strip():
            self.texts.append((text, list(self.stack)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]

    def text_of(self, section: str) -> str:
        return " ".join(text for text, stack in self.texts if any(found.get("id") == section for _, found in stack))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> StubReader:
    return make_data(tmp_path_factory.mktemp("report") / "data")


@pytest.fixture(scope="module", params=LANGUAGES)
def whole(request, data, tmp_path_factory):
    """A report of everything in each language: the page, its record, its folder."""
    folder = tmp_path_factory.mktemp("report")
    artifact = make_artifact(folder / "model_int8", data)
    write_record(artifact / "search.json", SEARCH_SCHEMA, search_record())
    evals = [
        write_eval(folder / f"{engine}_{precision}.json", engine, precision, p50)
        for engine, precision, p50 in (
            ("openvino", "fp32", 20.0), ("openvino", "int8", 8.0), ("openvino", "bf16", 11.0), ("onnxruntime", "fp32", 22.0),
        )
    ]  # fmt: skip
    path = write_report(artifact, data, evals, lang=request.param)
    return Page(path.read_text(encoding="utf-8")), read_record(artifact / "report.json", REPORT_SCHEMA), artifact


def test_the_page_is_whole_and_alone(whole):
    page, _, artifact = whole
    text = (artifact / "report.html").read_text(encoding="utf-8")
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    assert "http:" not in text and "https:" not in text and "<script" not in text and "@import" not in text
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    for tag, found in page.tags:
        for key in ("src", "href", "xlink:href", "data", "srcset"):
            value = found.get(key)
            assert value is None or value.startswith(("data:image/", "#")), (tag, value)
            if value and value.startswith("#") and len(value) > 1:
                assert value[1:] in page.ids, f"{value} leads nowhere"
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    assert not (artifact / "report.html").stat().st_size > 5e6
    assert any("default-src 'none'" in (found.get("content") or "") for found in page.named("meta"))


def test_it_can_be_read_without_eyes_and_colours(whole):
    page, _, _ = whole
    assert page.named("img") and all(len(found.get("alt") or "") > 5 for found in page.named("img"))
    charts = [found for found in page.named("svg") if found.get("class") == "chart"]
    assert len(charts) >= 8 and all(found["role"] == "img" and found["aria-label"] for found in charts)
    assert page.named("th") and all(found.get("scope") in ("row", "col", "rowgroup") for found in page.named("th"))
    assert [found["lang"] for found in page.named("html")] in (["en"], ["zh-CN"])
    assert len(page.named("h1")) == 1 and len(page.named("main")) == 1
    assert all(found["aria-labelledby"] in page.ids for found in page.named("section"))
    lost = [found for found in page.named("rect") if found.get("class") in ("lost", "new")]
    assert lost, "the models differ, and no box says so"


def test_every_section_is_there_in_order(whole):
    page, _, _ = whole
    assert [found["id"] for found in page.named("section")] == list(SECTIONS)
    assert {f"#{section}" for section in SECTIONS} < {found["href"] for found in page.named("a")}
    for section in SECTIONS:
        assert len(page.text_of(section)) > 100, section


def test_every_figure_stands_in_a_record(whole):
    """Every visible number is the rounding of one in a record, or part of a name in one."""
    page, record, _ = whole
    assert record["schema"] == REPORT_SCHEMA
    numbers, names = leaves(record)
    lang = page.named("html")[0]["lang"][:2]
    # Constants in the texts (IoU 0.50:0.95) are not figures.
    constants = {token for text in texts(lang).values() for token in _NUMBER.findall(text)}
    seen = 0
    for text, stack in page.texts:
        tags = [tag for tag, _ in stack]
        if "style" in tags or any(found.get("class") == "chart" for _, found in stack):
            continue  # axis labels; the drawn data is from the record, the only input of the drawing
        if tags[-1] == "data":
            seen += 1
            value = float(stack[-1][1]["value"])
            assert value in numbers, f"{text} ({value}) is in no record"
            shown = float(text.replace(",", "").replace("\u2212", "-"))
            digits = len(text.partition(".")[2])
            assert any(shown == round(value * scale, digits) for scale in (1, 100, 1e-6)), (text, value)
            continue
        bare = text
        for name in names:
            bare = bare.replace(name, " ")
        for token in _NUMBER.findall(bare):
            if token in constants and "pre" not in tags:
                continue
            value = float(token.replace(",", ""))
            digits = len(token.partition(".")[2])
            assert any(round(known, digits) == value for known in numbers), f"{token} in {text!r} is in no record"
    assert seen > 150


def leaves(value) -> tuple[set[float], list[str]]:
    """Return all numbers of a record, and all its texts with a digit, the longest first."""
    numbers: set[float] = set()
    names: set[str] = set()

    def walk(part):
        if isinstance(part, dict):
            for key, below in part.items():
                names.add(str(key))
                walk(below)
        elif isinstance(part, list):
            for below in part:
                walk(below)
        elif isinstance(part, bool) or part is None:
            pass
        elif isinstance(part, (int, float)):
            numbers.add(float(part))
        else:
            names.update((str(part), str(part).upper()))
            if str(part).startswith("sha256:"):
                names.add(str(part)[7:19])

    walk(value)
    return numbers, sorted((name for name in names if re.search(r"\d", name)), key=len, reverse=True)


def test_the_record_says_what_the_others_say(whole):
    _, record, artifact = whole
    act = json.loads((artifact / "act.json").read_text(encoding="utf-8"))
    verdict = record["verdict"]
    assert (verdict["map_fp32"], verdict["map_int8"]) == (act["fp32"]["map"], act["int8"]["map"])
    assert verdict["map_change"] == pytest.approx(-act["map_drop"]) and verdict["state"] == "holds"
    assert verdict["times_smaller"] == pytest.approx(1 / act["bytes_ratio"])
    assert verdict["speed"] == {
        "engine": "openvino", "fp32_engine": "openvino", "device": "CPU", "fp32_ms": 33.25, "int8_ms": 12.5,
        "times_as_fast": 2.75, "map": act["int8"]["map"], "in_turns": True, "batch_size": 1,
    }  # fmt: skip
    assert [row["name"] for row in record["models"]] == ["FP32", "BF16", "INT8"]
    assert [row["latency_ms"] for row in record["models"]] == [33.25, 11.0, 12.5]
    assert [(row["name"], row["chosen"]) for row in record["strategies"]] == [("ptq:mse", False), ("mixed", True)]
    assert [row["name"] for row in record["engines"]] == [
        "openvino fp32", "openvino int8", "openvino bf16", "onnxruntime fp32"
    ]  # fmt: skip
    assert [row["name"] for row in record["per_class"]] == ["cat", "dog & <b>", "nothing"]
    assert record["per_class"][0]["change"] == pytest.approx(-0.012) and record["per_class"][0]["objects"] == 5
    assert record["per_class"][2] == {"name": "nothing", "fp32": None, "int8": None, "change": None, "objects": 0}
    assert record["class_counts"] == {"known": 2, "lower": 1, "shown": 3, "hidden": 0}
    assert record["notes"] == [] and record["versions"] == VERSIONS
    assert record["seconds"]["total"] == pytest.approx(22.24)


def test_texts_are_the_same_in_every_language():
    def fields(text: str) -> set[str]:
        return {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}

    english = texts("en")
    for lang in LANGUAGES:
        assert {name: fields(text) for name, text in texts(lang).items()} == {
            name: fields(text) for name, text in english.items()
        }
    assert re.search("[\u4e00-\u9fff]", texts("zh")["title"])


def test_names_are_shown_as_they_are(whole):
    page, _, artifact = whole
    assert "dog & <b>" in page.text_of("classes")
    assert "dog & <b>" not in (artifact / "report.html").read_text(encoding="utf-8")


# --- what was not measured -------------------------------------------------------------------------------------------


def written(artifact: Path, reader: StubReader, *options, **more) -> tuple[Page, dict]:
    """Write a report without charts, which take most of the time, and read both files."""
    with mock.patch("act_pipeline.report.figures._svg", lambda *size, **more: '<svg viewBox="0 0 1 1"></svg>'):
        path = write_report(artifact, reader, *options, **more)
    return Page(path.read_text(encoding="utf-8")), read_record(artifact / "report.json", REPORT_SCHEMA)


def test_an_older_record_alone_gives_a_report(data, tmp_path):
    """A record from before strategies were recorded: no steps, limit or stats, and no other files."""
    write_record(
        tmp_path / "m" / "act.json",
        "act_pipeline.act/1",
        {
            "strategy": "qat_dis", "fp32": {"map": 0.6414, "map50": 0.77, "bytes": 15612189},
            "int8": {"map": 0.642, "map50": 0.7746, "bytes": 4424947}, "map_drop": -0.0006,
            "seconds": {"train": 88.02}, "quantized_ops": {"conv2d": 56}, "kept_ops": [],
            "config": {"path": "a.yml"}, "evaluation": {"engine": "paddle", "images": 120, "device": "CPU", "threads": 2},
        },
    )  # fmt: skip
    page, record = written(tmp_path / "m", data)
    assert [found["id"] for found in page.named("section")] == [name for name in SECTIONS if name != "variants"]
    assert record["variants"] is None and "#variants" not in {found["href"] for found in page.named("a")}
    assert record["verdict"]["state"] == "no_limit" and record["errors"] is None and record["curves"] is None
    words = texts("en")
    for section, text in (
        ("classes", "classes_missing"), ("curves", "no_detections"), ("pictures", "no_detections"),
        ("errors", "no_detections"), ("sensitivity", "sensitivity_missing"), ("sensitivity", "kept_none"),
        ("distributions", "distributions_missing"), ("models", "no_half"), ("models", "no_engines"),
    ):  # fmt: skip
        assert words[text] in page.text_of(section), text


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_model_that_was_not_evaluated_has_a_report(data, tmp_path, lang):
    nothing = {"map": None, "map50": None, "bytes": 1000}
    artifact = make_artifact(
        tmp_path / "m", data, fp32=nothing, int8=nothing, map_drop=None, steps=[], evaluation={"images": 0}
    )
    (artifact / "detections.npz").unlink()
    page, record = written(artifact, data, lang=lang)
    assert record["verdict"]["state"] == "not_measured"
    assert texts(lang)["not_measured"] in " ".join(text for text, _ in page.texts)


def test_below_the_floor_is_said_first(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data, max_drop=0.0)
    act = read_record(artifact / "act.json", "act_pipeline.act/1")
    assert act["map_drop"] > 0
    page, record = written(artifact, data)
    assert record["verdict"]["state"] == "below"
    assert page.text_of("verdict").startswith("INT8 loses too much")


def test_a_drop_of_exactly_what_is_allowed_holds(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    act = read_record(artifact / "act.json", "act_pipeline.act/1")
    act["max_drop"] = act["fp32"]["map"] - act["int8"]["map"]
    write_record(artifact / "act.json", "act_pipeline.act/1", act)
    assert written(artifact, data)[1]["verdict"]["state"] == "holds"


INTERVAL = {"low": -0.012, "high": 0.031, "level": 0.95, "resamples": 1000, "standard_error": 0.011}
AGREED = {"boxes": 1415, "matched": 0.999, "mean_iou": 0.981, "mean_score_change": 0.0204}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_verdict_says_how_sure_it_is(data, tmp_path, lang):
    artifact = make_artifact(
        tmp_path / "m", data, max_drop=0.02, map_drop_interval=INTERVAL, probability_within_max_drop=0.8125,
        images_needed=1234, agreement=AGREED,
    )  # fmt: skip
    page, record = written(artifact, data, lang=lang)
    verdict = record["verdict"]
    assert (verdict["interval"]["low"], verdict["interval"]["high"]) == (-0.031, 0.012)
    assert (verdict["probability"], verdict["tells"], verdict["images_needed"]) == (0.8125, False, 1300)
    said = " ".join("".join(text for text, _ in page.texts).split())
    for figure in ("−0.0310", "+0.0120", "95 %", "1,000", "81.2 %", "1,300", "1,415", "99.9 %", "0.9810", "0.0204"):
        assert figure in said, figure
    words = texts(lang)
    for text in ("cannot_tell", "images_needed"):
        assert words[text].split("{images}")[-1] in said
    assert record["models"][1]["interval"]["low"] == -0.031 and "−0.0310" in page.text_of("models")


def test_a_verdict_that_the_images_can_tell_says_nothing_of_more_images(data, tmp_path):
    artifact = make_artifact(
        tmp_path / "m", data, max_drop=0.05, map_drop_interval=INTERVAL, probability_within_max_drop=1.0, images_needed=None,
        agreement={**AGREED, "matched": 0.0, "mean_iou": None, "mean_score_change": None},
    )  # fmt: skip
    page, record = written(artifact, data)
    assert record["verdict"]["tells"] is True
    said = " ".join("".join(text for text, _ in page.texts).split())
    assert "from −0.0310 to +0.0120" in said and "cannot tell" not in said and "is sure of" not in said


@pytest.mark.parametrize(("confidence", "state"), [(0.5, "holds"), (0.8, "holds"), (0.9, "below")])
def test_the_verdict_is_as_sure_as_the_config_asked(data, tmp_path, confidence, state):
    artifact = make_artifact(
        tmp_path / "m", data, map_drop_interval=INTERVAL, probability_within_max_drop=0.8, confidence=confidence
    )
    assert written(artifact, data)[1]["verdict"]["state"] == state


def test_images_that_are_gone_leave_the_tables(tmp_path):
    reader = make_data(tmp_path / "data")
    artifact = make_artifact(tmp_path / "m", reader)
    for file in (tmp_path / "data" / "images").iterdir():
        file.unlink()
    page, record = written(artifact, reader)
    assert record["pictures"] and not page.named("img")
    assert texts("en")["picture_missing"] in page.text_of("pictures")


def test_detections_of_another_data_set_are_not_shown(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    other = make_data(tmp_path / "other", images=2)
    page, record = written(artifact, other)
    assert record["notes"] == [{"text": "other_data", "images": 3}] and record["errors"] is None
    assert "3 images that the reader's data does not have" in " ".join("".join(text for text, _ in page.texts).split())


def test_detections_of_another_run_are_warned_about(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    act = read_record(artifact / "act.json", "act_pipeline.act/1")
    act["int8"]["map"] += 0.01
    write_record(artifact / "act.json", "act_pipeline.act/1", act)
    (note,) = written(artifact, data)[1]["notes"]
    assert (note["text"], note["model"]) == ("other_detections", "INT8")
    assert note["recorded"] - note["found"] == pytest.approx(0.01)


@pytest.mark.parametrize("missing", ["detection_change", "sqnr_db", "activations", "all"])
def test_an_analysis_of_a_part_gives_that_part(data, tmp_path, missing):
    artifact = make_artifact(tmp_path / "m", data)
    analysis = analysis_record()
    for op in analysis["ops"]:
        for key in [key for key in op if key == missing or missing == "all"]:
            del op[key]
    write_record(artifact / "analysis.json", "act_pipeline.analysis/1", analysis)
    _, record = written(artifact, data)
    assert (record["distributions"] is None) == (missing in ("activations", "all"))
    if missing == "all":
        assert record["sensitivity"] is None
        return
    # Both measures rank the last op highest: it has the largest detection change and the largest noise.
    assert record["sensitivity"]["ops"][0]["module"] == "backbone.block29"
    assert record["sensitivity"]["measure"] == ("detection_change" if missing == "sqnr_db" else "noise")
    assert sum(group["share"] for group in record["sensitivity"]["groups"]) == pytest.approx(1)
    if missing != "activations":
        # The maximum is 4.0 everywhere; the first has the smallest 99.9 percentile.
        assert record["distributions"]["worst"][0]["name"] == "conv2d_0.tmp_0"
        assert record["distributions"]["worst"][0]["reach"] == pytest.approx(4)


def test_many_classes_stand_behind_a_click(data, tmp_path):
    classes = {f"class {number}": 0.5 for number in range(80)}
    artifact = make_artifact(tmp_path / "m", data)
    act = read_record(artifact / "act.json", "act_pipeline.act/1")
    act["fp32"]["per_class"], act["int8"]["per_class"] = classes, {**classes, "class 44": 0.25}
    write_record(artifact / "act.json", "act_pipeline.act/1", act)
    page, record = written(artifact, data)
    assert record["class_counts"] == {"known": 80, "lower": 1, "shown": 20, "hidden": 60}
    assert record["per_class"][0]["name"] == "class 44"
    assert page.text_of("classes").count("class ") >= 80


# --- faster variants -------------------------------------------------------------------------------------------------


def test_the_variants_of_a_search_are_shown(whole):
    page, record, artifact = whole
    assert "search.json" in record["sources"]
    shown = record["variants"]
    assert [(row["number"], row["precision"], row["images"]) for row in shown["rows"]][:2] == [
        (1, "int8", 72), (2, "int8", 72)
    ]  # fmt: skip
    chosen = shown["rows"][1]
    assert chosen["chosen"] and shown["faster"] == chosen and sum(row["chosen"] for row in shown["rows"]) == 1
    assert (chosen["change"], chosen["low"], chosen["high"]) == pytest.approx((-0.0082, -0.0137, -0.0022))
    assert shown["lowest_map"] == pytest.approx(0.5266) and shown["images"] == 72
    said = "".join(page.text_of("variants").split())
    for figure in ("640×480", "1.19", "−0.0082", "−0.0137", "−0.0022", "INT8", "FP32", "0.5284", "105.2", "95%"):
        assert figure in said, figure
    words = texts(page.named("html")[0]["lang"][:2])
    for text in ("chosen", "on_front", "variant_bf16"):
        assert page.text_of("variants").count(words[text]) >= 1, text
    assert words["variants_full_given"].partition("{")[0].replace(" ", "") in said
    drawn = (artifact / "report.html").read_text(encoding="utf-8")
    chart = drawn[drawn.index('id="variants"') :].partition("<svg")[2].partition("</svg>")[0]
    assert re.findall(r">(\d)</text>", chart) == ["1", "2", "3", "4", "5", "6", "8"], (
        "the dropped row is no point of the chart"
    )
    assert "var(--int8)" in chart and "var(--loss)" in chart


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chosen": {"name": "layers3_queries300_640x480", "precision": "int8"}}, "variants_none_faster"),
        ({"chosen": None}, "variants_none_within"),
        ({"full_int8": None}, "variants_calibrated"),
    ],
)
def test_a_search_without_a_faster_variant_says_so(data, tmp_path, changes, text):
    artifact = make_artifact(tmp_path / "m", data)
    write_record(tmp_path / "s.json", SEARCH_SCHEMA, search_record(**changes))
    page, record = written(artifact, data, search=tmp_path / "s.json")
    assert texts("en")[text].partition("{")[0] in page.text_of("variants")
    assert (record["variants"]["faster"] is None) == (text != "variants_calibrated")


def test_a_search_of_another_model_is_refused(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    write_record(artifact / "search.json", SEARCH_SCHEMA, search_record(model_hash=INT8_HASH))
    with pytest.raises(UserError, match=r"search\.json is of the float model output/float, expected the one that"):
        write_report(artifact, data)
    with pytest.raises(UserError, match=r"none\.json is missing"):
        write_report(artifact, data, search=tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes", [{"rows": []}, {"rows": None}, {"rows": [{"name": 1}, 3]}, {"rows": {}, "chosen": 3}, {"max_drop": "x"}]
)
def test_a_search_record_of_another_form_is_no_traceback(data, tmp_path, changes):
    artifact = make_artifact(tmp_path / "m", data)
    write_record(artifact / "search.json", SEARCH_SCHEMA, search_record(**changes))
    page, record = written(artifact, data)
    assert (record["variants"] is None) == ("rows" in changes) == ("variants" not in page.ids)


# --- invalid requests ------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_in_one_line(data, tmp_path):
    with pytest.raises(UserError, match=r"act\.json is missing"):
        write_report(tmp_path, data)
    artifact = make_artifact(tmp_path / "m", data)
    with pytest.raises(UserError, match="no report in 'cn', expected one of en, zh"):
        write_report(artifact, data, lang="cn")
    with pytest.raises(UserError, match="schema is 'act_pipeline.act/1', expected 'act_pipeline.eval/1'"):
        write_report(artifact, data, [artifact / "act.json"])
    (artifact / "detections.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"detections\.npz holds no detections"):
        write_report(artifact, data)
    assert not (artifact / "report.html").exists()


def test_the_command_writes_and_prints_the_path(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    reader = tmp_path / "reader.yml"
    folder = data.path.parent
    reader.write_text(
        "metric: COCO\nnum_classes: 3\nEvalDataset: !COCODataSet\n  image_dir: images\n  anno_path: annotations.json\n"
        f"  dataset_dir: {folder}\nworker_num: 0\nEvalReader:\n  sample_transforms:\n    - Decode: {{}}\n"
        "    - Resize: {target_size: [32, 32], keep_ratio: False, interp: 2}\n    - Permute: {}\n  batch_size: 1\n",
        encoding="utf-8",
    )
    command = [
        sys.executable, str(ROOT / "tools" / "report.py"), "--model_path", str(artifact), "--reader_config", str(reader),
        "--lang", "zh", "--eval", str(write_eval(tmp_path / "e.json", "openvino", "int8", 8.0)),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"report: {artifact / 'report.html'}\n"
    assert 'lang="zh-CN"' in (artifact / "report.html").read_text(encoding="utf-8")


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (0.64196, {"digits": 4}, "0.6420"), (-0.00814, {"digits": 4, "sign": True}, "\u22120.0081"),
        (0.5, {"digits": 1, "sign": True}, "+0.5"), (-1e-9, {"digits": 4, "sign": True}, "0.0000"),
        (15612189, {"digits": 2, "scale": 1e-6}, "15.61"), (12345, {}, "12,345"),
    ],
)  # fmt: skip
def test_figures_are_shown_rounded_and_kept_whole(value, options, text):
    assert number(value, **options) == f'<data value="{value!r}">{text}</data>'
    assert "data" not in number(None)


def benchmark_row(engine, precision, p50, ratio, label=None, failure=None):
    return {
        "label": label or f"{engine} {precision}", "engine": engine, "precision": precision, "device": "CPU",
        "failure": failure, "model_bytes": 10, "latency_ms": None if failure else latency(p50), "map": 0.6, "map50": 0.7,
        "ratio_to_fp32": {"to": "", "by_round": ratio, "of_p50": 1.0} if ratio else None,
    }  # fmt: skip


def test_the_speed_is_of_the_fastest_engine_that_ran_both_of_these_models(tmp_path, data):
    artifact = make_artifact(tmp_path / "m", data)
    benchmark = {
        "settings": {"batch_size": 1},
        "models": {"fp32": {"path": "x", "hash": FP32_HASH}, "int8": {"path": "y", "hash": INT8_HASH}},
        "rows": [
            benchmark_row("openvino", "int8", 7.0, 2.0, label="nncf int8 in openvino"), benchmark_row("openvino", "int8", 8.0, 1.8),
            benchmark_row("openvino", "fp32", 14.0, 1.0), benchmark_row("onnxruntime", "int8", 5.0, None),
            benchmark_row("tensorrt", "int8", 1.0, 9.0, failure="no GPU"), benchmark_row("paddle", "fp32", 30.0, 1.0),
            benchmark_row("paddle", "int8", 99.0, 0.3),
        ],
    }  # fmt: skip
    write_record(tmp_path / "b.json", "act_pipeline.benchmark/1", benchmark)
    sources = Sources.read(artifact, [], None, tmp_path / "b.json")
    fp32, int8 = fastest_pair(sources.engine_rows())
    assert (fp32.label, int8.label, int8.speed_ratio) == ("openvino fp32", "openvino int8", 1.8)
    page, record = written(artifact, data, benchmark=tmp_path / "b.json")
    assert "no GPU" in page.text_of("models") and record["verdict"]["speed"]["int8_ms"] == 8.0
    benchmark["models"]["int8"]["hash"] = "sha256:other"
    write_record(tmp_path / "b.json", "act_pipeline.benchmark/1", benchmark)
    assert fastest_pair(Sources.read(artifact, [], None, tmp_path / "b.json").engine_rows()) is None


def test_an_evaluation_of_another_model_is_no_part_of_the_verdict(tmp_path, data):
    artifact = make_artifact(tmp_path / "m", data, latency=None)
    files = [
        write_eval(tmp_path / "a.json", "openvino", "fp32", 20.0),
        write_eval(tmp_path / "b.json", "openvino", "int8", 5.0, model_hash="sha256:other", model="output/other",
                   artifact="output/other"),
    ]  # fmt: skip
    _, record = written(artifact, data, files)
    assert record["verdict"]["speed"] is None
    assert [row["name"] for row in record["engines"]] == ["openvino fp32", "openvino int8 (other)"]
    # A file exported from this model has another hash, but records the model's folder.
    files[1] = write_eval(tmp_path / "c.json", "openvino", "int8", 5.0, model_hash="sha256:lowered",
                          model=str(artifact), artifact=f"{artifact}/onnx/model.onnx")  # fmt: skip
    assert written(artifact, data, files)[1]["verdict"]["speed"]["times_as_fast"] == 4.0
    # Latencies of engines that ran in parallel are not those of a single engine.
    write_eval(files[1], "openvino", "int8", 5.0, shards=2)
    _, record = written(artifact, data, files)
    assert record["verdict"]["speed"] is None and record["engines"][1]["latency_ms"] is None


# --- speed -----------------------------------------------------------------------------------------------------------


def said_in(page: Page, section: str | None = None) -> str:
    """Return the visible text of a section or the page in one line."""
    text = page.text_of(section) if section else "".join(text for text, _ in page.texts)
    return " ".join(text.split())


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_speed_is_what_the_compression_timed_in_turns(data, tmp_path, lang):
    page, record = written(make_artifact(tmp_path / "m", data), data, lang=lang)
    rows = {row["name"]: (row["engine"], row["latency_ms"], row["times_as_fast"]) for row in record["models"]}
    assert rows == {"FP32": ("openvino", 33.25, 1.0), "INT8": ("openvino", 12.5, 2.75)}
    said = said_in(page)
    assert texts(lang)["tile_latency_none"] not in said and texts(lang)["no_engines"] not in said
    assert "12.5÷ 2.75" in said and "2.8" in said_in(page, "verdict")
    # A strategy was evaluated at a different time than FP32.
    assert [(row["latency_ms"], row["times_as_fast"]) for row in record["strategies"]] == [(131.5, None)] * 2


@pytest.mark.parametrize("lang", LANGUAGES)
@pytest.mark.parametrize(
    ("verdict", "english"),
    [("int8", "INT8 everywhere"), ("mixed", "2 of 12 ops are in float"), ("float", "Ship BF16: INT8 is not faster in openvino")],
)  # fmt: skip
def test_the_placement_is_a_verdict(data, tmp_path, lang, verdict, english):
    placement = {
        "verdict": verdict, "line": "", "engine": "openvino", "ops": 12, "reverted": ["a", "b"], "float_precision": "bf16",
        "latency_ms": {"all": 8.0, "placed": 7.5, "fp32": 20.0, "bf16": 11.25},
    }  # fmt: skip
    path = write_report(make_artifact(tmp_path / "model", data, placement=placement), data, lang=lang)
    text = " ".join(Page(path.read_text(encoding="utf-8")).text_of("placement").split())
    assert all(figure in text for figure in ("7.5", "8.0", "11.2"))
    assert lang == "zh" or english in text


@pytest.mark.parametrize("lang", LANGUAGES)
def test_two_evaluations_alone_give_no_ratio(data, tmp_path, lang):
    artifact = make_artifact(tmp_path / "m", data, latency=None)
    act = read_record(artifact / "act.json", "act_pipeline.act/1")
    del act["latency"]
    write_record(artifact / "act.json", "act_pipeline.act/1", act)
    page, record = written(artifact, data, lang=lang)
    assert record["verdict"]["speed"] is None and texts(lang)["tile_latency_none"] in said_in(page)
    assert [(row["latency_ms"], row["times_as_fast"]) for row in record["models"]] == [(34.5, None), (137.25, None)]


def test_an_engine_that_is_faster_than_the_judge_gives_the_speed(data, tmp_path):
    artifact = make_artifact(tmp_path / "m", data)
    for p50, engine in ((12.0, "onnxruntime"), (13.0, "openvino")):
        evals = [
            write_eval(tmp_path / f"{precision}.json", "onnxruntime", precision, value)
            for precision, value in (("fp32", 24.0), ("int8", p50))
        ]
        speed = written(artifact, data, evals)[1]["verdict"]["speed"]
        assert (speed["engine"], speed["in_turns"]) == (engine, engine == "openvino")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_engine_is_the_one_of_the_record(data, tmp_path, lang):
    page, record = written(make_artifact(tmp_path / "m", data), data, lang=lang)
    said = said_in(page)
    assert "Paddle Inference" not in said and "paddle_onednn" not in said
    words = texts(lang)
    for section, text in (
        ("models", words["models_note_strategies"].format(engine="openvino")),
        ("again", words["again_evaluated"].format(engine="openvino", device="CPU", threads="2")),
    ):  # fmt: skip
        assert text.replace(" ", "") in said_in(page, section).replace(" ", ""), text
    assert words["models_note_float"].format(engine="openvino") not in said


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_judge_without_float_is_named_beside_the_engine_of_fp32(data, tmp_path, lang):
    """The speed of an engine that is not for deployment is not part of the verdict."""
    judge = {"engine": "int8_reference", "fp32_engine": "paddle_onednn", "device": "CPU", "threads": 2, "images": 5}
    slow = {"rounds": 10, "fp32": {"p50_ms": 30, "p90_ms": 31}, "int8": {"p50_ms": 150, "p90_ms": 151}, "ratio": 0.2}
    page, record = written(make_artifact(tmp_path / "m", data, evaluation=judge, latency=slow), data, lang=lang)
    assert [row["engine"] for row in record["models"]] == ["paddle_onednn", "int8_reference"]
    said, both = said_in(page), "int8_reference (FP32: paddle_onednn)"
    assert texts(lang)["models_note_float"].format(engine="int8_reference") in said
    assert both in said_in(page, "again") and both in said_in(page, "models") and said.count(both) == 3
    assert record["verdict"]["speed"]["times_as_fast"] == 0.2
    assert texts(lang)["slower"].format(times="0.2").replace(" ", "") not in said_in(page, "verdict").replace(" ", "")


# --- reproduction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_command_is_the_one_that_was_given(data, tmp_path, lang):
    given = ["Global.model_dir=my models/it's", "Strategy={name: ptq, max_drop: null}", "QuantPost.calib_images=200"]
    artifact = make_artifact(tmp_path / "a & b" / "m.below_max_drop", data, overrides=given)
    page, record = written(artifact, data, lang=lang)
    shown = "".join(text for text, stack in page.texts if [tag for tag, _ in stack][-2:] == ["pre", "code"])
    assert shown.split("\n") == record["rerun"]["commands"]
    compress, report = map(shlex.split, record["rerun"]["commands"])
    assert compress == [
        "python", "tools/compress.py", "-c", "configs/a.yml", "--save_dir", str(tmp_path / "a & b" / "m"), "-o", *given
    ]  # fmt: skip
    assert report[2:] == ["--model_path", str(artifact), "--reader_config", str(data.path)]
    assert texts(lang)["again_lead"] in said_in(page, "again")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_without_overrides_in_the_record_the_same_are_asked_for(data, tmp_path, lang):
    artifact = make_artifact(tmp_path / "m", data)
    for overrides, text in (([], "again_lead"), (None, "again_lead_opt")):
        act = read_record(artifact / "act.json", "act_pipeline.act/1")
        del act["overrides"]
        if overrides is not None:
            act["overrides"] = overrides
        write_record(artifact / "act.json", "act_pipeline.act/1", act)
        page, record = written(artifact, data, lang=lang)
        assert shlex.split(record["rerun"]["commands"][0])[4:] == ["--save_dir", str(artifact)]
        assert texts(lang)[text] in said_in(page, "again") and record["rerun"]["overrides"] == overrides


def test_a_compression_records_its_overrides():
    given = ["QuantPost.calib_images=12", "Strategy.max_drop=0.004"]
    job = mock.MagicMock(config=load_config(ROOT / "configs" / "sample.yml", given), fp32=None)
    job.tried = mock.MagicMock(max_drop=None)
    job.judge.parallel, job.tried.compare.return_value = (1, 2), None
    chosen = mock.MagicMock(evaluation=None, bytes=1, details=CandidateDetails(), reverted=[])
    chosen.inventory.quantized, chosen.inventory.kept, chosen.inventory.weight_only = {}, [], []
    record = compression_record(job, chosen, mock.MagicMock(bytes=4), {}, Measured())
    assert record.as_json()["overrides"] == given and "overrides" not in job.config.as_dict()


@pytest.mark.parametrize("lang", LANGUAGES)
def test_a_box_of_one_model_alone_is_explained(data, tmp_path, lang):
    """The other model may have a box below the threshold, which the text must state."""
    page, record = written(make_artifact(tmp_path / "m", data), data, lang=lang)
    clause = texts(lang)["pictures_lead"].split("{new}")[1]
    threshold = f"{record['pairs']['threshold']:.2f}"
    assert clause.count("{threshold}") == 1
    assert clause.format(threshold=threshold).replace(" ", "") in said_in(page, "pictures").replace(" ", "")


def test_the_training_goes_to_visualdl(tmp_path):
    visualdl = pytest.importorskip("visualdl", reason="visualdl is not installed")
    training = {"loss": [3.5, 2.5], "evaluations": [{"iteration": 2, "agreement": 0.625}]}
    assert write_scalars(None, tmp_path) is None
    for _ in range(2):  # a second report replaces the log of the first
        path = write_scalars(training, tmp_path)
        assert path == tmp_path / LOG_FILENAME
        reader = visualdl.LogReader(file_path=str(path))
        points = {
            tag: [(item.id, item.value) for item in reader.get_data("scalar", tag)]
            for tag in ("train/loss", "eval/agreement")
        }
        assert points == {"train/loss": [(1, 3.5), (2, 2.5)], "eval/agreement": [(2, 0.625)]}


def test_without_visualdl_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert write_scalars({"loss": [1.0]}, tmp_path) is None and not list(tmp_path.iterdir())


def run_report(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def test_the_command_takes_the_reader_that_the_model_names(data, tmp_path):
    """The data of the stub reader, named by act.json, and not the sample's."""
    reader = tmp_path / "my_reader.yml"
    reader.write_text(
        "metric: COCO\n"
        f"EvalDataset: !COCODataSet {{image_dir: {data.image_dir('eval')}, anno_path: {data.annotations('eval').path}}}\n"
        "EvalReader:\n  sample_transforms:\n    - Decode: {}\n    - Resize: {target_size: [64, 64], keep_ratio: false}\n"
        "    - Permute: {}\n  batch_size: 1\n"
    )
    artifact = make_artifact(tmp_path / "int8", data, config={"Global": {"reader_config": str(reader)}})
    ended = run_report("--model_path", str(artifact), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert read_record(artifact / "report.json", REPORT_SCHEMA)["rerun"]["reader"] == str(reader)
    reader.unlink()
    ended = run_report("--model_path", str(artifact), cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr == (
        f"error: reader {reader} does not exist, named by {artifact / 'act.json'}: config.Global.reader_config; run in "
        "the folder of the compression, or give --reader_config\n"
    )


def test_a_folder_that_is_missing_or_not_compressed_is_one_line(tmp_path):
    (tmp_path / "fp32").mkdir()
    for folder, words in (("none", "does not exist"), ("fp32", "has no act.json")):
        ended = run_report("--model_path", str(tmp_path / folder), cwd=tmp_path)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
        assert ended.stderr.startswith(f"error: --model_path={tmp_path / folder} {words}, expected the folder that")
