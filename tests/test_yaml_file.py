"""YAML in the forms of PaddleSlim and PaddleDetection, and the messages for an invalid file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from act_pipeline.core.errors import UserError
from act_pipeline.core.yaml_files import MAX_BYTES, Tagged, apply_overrides, load_yaml, parse_override, resolve_path

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "official_configs"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the published configs are not at hand")

TWO_NODES = """\
metric: COCO
TrainDataset:
  !COCODataSet
    image_dir: train2017
    anno_path: annotations/instances_train2017.json
  # and also
  !COCODataSet
    image_dir: val2017
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, text: str) -> str:
    """Return the message for a file with this text, after checking that it is one line and names the file."""
    with pytest.raises(UserError) as caught:
        load_yaml(write(path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_tagged_nodes_become_data(tmp_path: Path) -> None:
    text = "Eval:\n  !COCODataSet\n    image_dir: images\n"
    text += "schedulers:\n- !PiecewiseDecay\n  gamma: 0.1\n- !LinearWarmup {}\n"
    path = write(tmp_path / "a.yml", text)
    content = load_yaml(path)
    assert content["Eval"] == Tagged("COCODataSet", {"image_dir": "images"})
    assert content["schedulers"] == [Tagged("PiecewiseDecay", {"gamma": 0.1}), Tagged("LinearWarmup", {})]


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = "a: 4.0e-05\nb: 1e-5\nc: -2E3\nd: 7\ne: '1e-5'\nf: 1e\nday: 2024-13-45\n"
    content = load_yaml(write(tmp_path / "a.yml", text))
    assert content == {"a": 4.0e-05, "b": 1e-5, "c": -2000.0, "d": 7, "e": "1e-5", "f": "1e", "day": "2024-13-45"}
    assert type(content["b"]) is float and type(content["d"]) is int


def test_bases_are_merged_as_paddledetection_merges_them(tmp_path: Path) -> None:
    write(tmp_path / "base" / "one.yml", "Net: {depth: 50, norm: bn}\nsizes: [1, 2, 3]\nepoch: 72\n")
    write(tmp_path / "base" / "two.yml", "Net: {depth: 18}\nkeep: true\n")
    path = write(tmp_path / "own.yml", "_BASE_: [base/one.yml, 'base/two.yml']\nNet: {norm: sync_bn}\nsizes: [9]\n")
    assert load_yaml(path) == {
        "Net": {"depth": 18, "norm": "sync_bn"},
        "sizes": [9],
        "epoch": 72,
        "keep": True,
    }


def test_a_merge_leaves_what_an_alias_shared(tmp_path: Path) -> None:
    write(tmp_path / "base.yml", "a: &shared {x: {y: 1}}\nb: *shared\n")
    path = write(tmp_path / "own.yml", "_BASE_: [base.yml]\nb: {x: {y: 2}}\n")
    assert load_yaml(path) == {"a": {"x": {"y": 1}}, "b": {"x": {"y": 2}}}


def test_merge_keys_work(tmp_path: Path) -> None:
    content = load_yaml(write(tmp_path / "a.yml", "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n"))
    assert content["b"] == {"x": 1, "y": 3}


@needs_official
@pytest.mark.parametrize("name", ["r18vd", "r34vd", "r50vd", "r50vd_m", "r101vd", "hgnetv2_l", "hgnetv2_x"])
def test_official_model_files_load_as_in_paddledetection(name: str) -> None:
    path = OFFICIAL / "paddledetection" / "rtdetr" / f"rtdetr_{name}_6x_coco.yml"
    content = load_yaml(path)
    assert content["architecture"] == "DETR" and content["num_classes"] == 80
    assert content["LearningRate"]["schedulers"][1] == Tagged("LinearWarmup", {"start_factor": 0.001, "steps": 2000})
    own = yaml.safe_load(path.read_text())
    for section, keys in own.items():
        if isinstance(keys, dict):
            assert keys.items() <= content[section].items()


@needs_official
def test_paddleslims_reader_with_two_nodes_is_named_and_explained() -> None:
    path = OFFICIAL / "paddleslim" / "rtdetr_reader.yml"
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    message = str(caught.value)
    assert f"{path} line 10" in message and "'TrainDataset'" in message and "line 6" in message
    assert "join" in message


def test_two_nodes_under_one_key(tmp_path: Path) -> None:
    message = error_of(tmp_path / "reader.yml", TWO_NODES)
    assert "line 7: key 'TrainDataset' has a second !COCODataSet node (the first is on line 3), expected one" in message
    assert "delete one of the two, or join their annotation files into one and name that in anno_path" in message


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a: [1, 2\nb: 3\n", ["line 2, column 2 is no YAML"]),
        ("a:\n\tb: 1\n", ["line 2", "use spaces, not tabs"]),
        ("a: 1\nb: 2\na: 3\n", ["line 3: key 'a' is given a second time (first on line 1)", "delete one of them"]),
        ("s:\n  k: {x: 1, x: 2}\n", ["line 2: key 'x' is given a second time"]),
        ("- a\n- b\n", ["holds a list, expected a YAML mapping"]),
        ("", ["holds nothing, expected a YAML mapping"]),
        ("a: 1\n---\nb: 2\n", ["line 2"]),
        ("a: *missing\n", ["line 1, column 4", "missing"]),
        ("a: !COCODataset {}\n", ["line 1: tag '!COCODataset' is not known", "did you mean 'COCODataSet'?"]),
        ("a: !COCODataSet [1]\n", ["line 1: !COCODataSet holds no 'key: value' lines"]),
        ("a: !!python/object/apply:os.system ['touch hacked']\n", ["line 1: tag '!!python/object/apply:os.system'"]),
        ("a: !!python/name:os.system\n", ["tag '!!python/name:os.system' is not known"]),
        ("a: !!set {x, y}\n", ["tag '!!set' is not known"]),
        ("a: &x [*x]\n", ["line 1: the anchor holds itself"]),
        ("? [1, 2]\n: 3\n", ["line 1: a key is a list or a mapping"]),
        ("a: \x07\n", ["is not allowed in YAML"]),
        ("a: " + "9" * 5000 + "\n", ["a"]),
        ("a: " + "[" * 800 + "]" * 800 + "\n", ["nested more than 50 deep"]),
        ("a: " + "[" * 60 + "]" * 60 + "\n", ["line 1: nested more than 50 deep"]),
        ("_BASE_: {a: b}\n", ["_BASE_ is a mapping, expected a list of YAML files"]),
        ("_BASE_: [3]\n", ["_BASE_ is a list, expected a list of YAML files"]),
    ],
)
def test_broken_files_get_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "broken.yml"
    if "9" * 5000 in text:
        # Python 3.11 rejects such a number, older versions read it; neither may give a traceback.
        try:
            load_yaml(write(path, text))
        except UserError as error:
            assert str(path) in str(error)
        return
    message = error_of(path, text)
    for part in parts:
        assert part in message
    assert not (tmp_path / "hacked").exists() and not Path("hacked").exists()


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    message = error_of(tmp_path / "bomb.yml", "\n".join(lines) + "\n")
    assert "aliases make it more than" in message


def test_files_that_are_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist, expected a YAML file"):
        load_yaml(tmp_path / "none.yml")
    with pytest.raises(UserError, match="is a folder, expected a YAML file"):
        load_yaml(tmp_path)
    binary = tmp_path / "model.pdiparams"
    binary.write_bytes(b"\x00\xff\xfe\x80")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        load_yaml(binary)
    large = write(tmp_path / "instances.json", "{" + " " * MAX_BYTES + "}")
    with pytest.raises(UserError, match="too large for a YAML config"):
        load_yaml(large)
    with pytest.raises(UserError, match="a part of it is a file"):
        load_yaml(large / "x.yml")


def test_a_missing_base_names_who_wants_it(tmp_path: Path) -> None:
    path = write(tmp_path / "own.yml", "_BASE_: ['base.yml']\n")
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert f"{tmp_path / 'base.yml'} does not exist (named by _BASE_ of {path})" in str(caught.value)


def test_bases_that_include_each_other(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "_BASE_: [b.yml]\n")
    write(tmp_path / "b.yml", "_BASE_: [a.yml]\n")
    with pytest.raises(UserError, match="which includes it in turn"):
        load_yaml(tmp_path / "a.yml")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.b=1", (["a", "b"], 1)),
        ("a=x=y", (["a"], "x=y")),
        ("weights=https://host/model.pdparams", (["weights"], "https://host/model.pdparams")),
        ("a.b=1e-5", (["a", "b"], 1e-5)),
        ("a.b=[1, 2]", (["a", "b"], [1, 2])),
        ("a.b={c: true}", (["a", "b"], {"c": True})),
        ("a.b=", (["a", "b"], None)),
        ("a.b='3'", (["a", "b"], "3")),
    ],
)
def test_overrides_are_typed_by_yaml(text: str, expected: tuple) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["a.b", "=1", "a..b=1", ".a=1", "a.=1"])
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(UserError, match="expected Section.key=value"):
        parse_override(text)


def test_a_value_that_is_no_yaml_names_the_override() -> None:
    with pytest.raises(UserError, match=r"-o a.b=\[1 line 1"):
        parse_override("a.b=[1")


def test_overrides_are_set_in_a_copy() -> None:
    dataset = Tagged("COCODataSet", {"image_dir": "x"})
    config = {"a": {"b": 1}, "d": dataset, "steps": [{"Resize": {"size": 1}}], "e": None}
    changed = apply_overrides(
        config, ["a.b=2", "a.c.d=3", "d.image_dir=y", "steps.0.Resize.size=4", "e.f=5", "new.g=6"]
    )
    assert changed == {
        "a": {"b": 2, "c": {"d": 3}},
        "d": Tagged("COCODataSet", {"image_dir": "y"}),
        "steps": [{"Resize": {"size": 4}}],
        "e": {"f": 5},
        "new": {"g": 6},
    }
    assert config["a"] == {"b": 1} and config["d"].fields == {"image_dir": "x"}


def test_an_override_through_a_value_says_what_is_there() -> None:
    with pytest.raises(UserError, match=r"-o a.b.c=1: a.b is 7, it has no key 'c'; set a.b itself"):
        apply_overrides({"a": {"b": 7}}, ["a.b.c=1"])
    with pytest.raises(UserError, match="a is a list of 1, it has no key '4'"):
        apply_overrides({"a": [1]}, ["a.4=1"])


def test_paths_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, project = tmp_path / "here", tmp_path / "project"
    named_in = write(project / "configs" / "act.yaml", "")
    here.mkdir()
    monkeypatch.chdir(here)
    assert resolve_path("missing/reader.yml", named_in) == Path("missing/reader.yml")
    assert resolve_path("configs/readers/rtdetr_reader.yml", named_in).is_absolute()  # files of this repository
    above = write(project / "configs" / "reader.yml", "")
    assert resolve_path("configs/reader.yml", named_in) == above
    beside = write(project / "configs" / "configs" / "reader.yml", "")
    assert resolve_path("configs/reader.yml", named_in) == beside
    write(here / "configs" / "reader.yml", "")
    assert resolve_path("configs/reader.yml", named_in) == Path("configs/reader.yml")
    assert resolve_path(str(above), named_in) == above
