"""Evaluation in several processes is bit-identical to that in one; invalid combinations are reported."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import make_tiny_data, write_reader
from test_executors import StandInRay

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.data import Reader
from act_pipeline.engines import create_engine
from act_pipeline.evaluation import EVAL_SCHEMA, Evaluation, evaluate, sharded
from act_pipeline.evaluation.sharded import ShardSession, ShardTask, evaluate_in_shards, shard_threads
from act_pipeline.inference import InferenceRequest, run_inference

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = 11


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = make_tiny_data(tmp_path / "data", IMAGES).parent
    return write_reader(tmp_path / "reader.yml", data, settings="num_classes: 2\nmax_bad_share: 0.3")


def assert_same(found: Evaluation, expected: Evaluation) -> None:
    np.testing.assert_array_equal(found.detections, expected.detections)
    for name in ("stats", "summary", "per_class", "images", "batch_size", "map", "map50"):
        assert getattr(found, name) == getattr(expected, name)


def spoil(config: Path, *images: int) -> None:
    """Replace files by content that cannot be decoded."""
    for image in images:
        (config.parent / "data" / "images" / f"{image}.png").write_bytes(b"no picture")


class Spy:
    """An engine that records which images ran together."""

    def __init__(self, engine) -> None:
        self._engine, self.batches = engine, []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def run(self, batch):
        self.batches.append(np.asarray(batch["im_id"]).reshape(-1).tolist())
        return self._engine.run(batch)


def both(model, config: Path, monkeypatch, limit=None, batch_size=1, **options):
    """The evaluation of one process, that of work units in this process, and the batches of each."""
    spies = []

    def spying(*args, **more):
        spies.append(Spy(create_engine(*args, **more)))
        return spies[-1]

    monkeypatch.setattr(sharded, "create_engine", spying)
    monkeypatch.setattr(sharded, "_UNIT_IMAGES", 4)
    single = spying("paddle", model, "fp32", "CPU", 1)
    expected = evaluate(single, Reader.load(config), limit=limit, progress=False, batch_size=batch_size)
    spread = evaluate_in_shards(
        single, model, Reader.load(config), 1, limit=limit, batch_size=batch_size, progress=False, **options
    )
    # The first run of each engine is a warm-up; every round has its own engine.
    return expected, spread, [spies[0].batches[1:], sum((spy.batches[1:] for spy in spies[1:]), [])]


@pytest.mark.parametrize(
    ("batch_size", "limit", "spoiled"),
    [(1, None, ()), (2, None, ()), (3, 7, ()), (16, None, ()), (1, 5, (1, 2)), (2, None, (0, 7)), (3, 8, (2, 8))],
)
def test_units_run_the_batches_of_one_process(float_model, config, monkeypatch, batch_size, limit, spoiled) -> None:
    spoil(config, *spoiled)
    expected, spread, (one, units) = both(float_model, config, monkeypatch, limit, batch_size)
    assert_same(spread.evaluation, expected)
    assert all(batch in units for batch in one)
    if not spoiled:
        assert units == one


def test_too_many_unreadable_images_end_it_as_they_end_one_process(float_model, config, monkeypatch) -> None:
    spoil(config, 0, 3, 6, 9)
    engine = create_engine("paddle", float_model, "fp32", "CPU", 1)
    with pytest.raises(UserError) as one:
        evaluate(engine, Reader.load(config), progress=False)
    with pytest.raises(UserError) as spread:
        evaluate_in_shards(engine, float_model, Reader.load(config), 1, progress=False)
    assert str(spread.value) == str(one.value) and "4 of the 11 images" in str(one.value)


def test_no_process_reads_the_annotation_file(float_model, config, monkeypatch) -> None:
    """Only the parent reads it, for the scores; each process would need memory for all of it."""
    monkeypatch.setattr(
        "act_pipeline.data.annotations.Annotations.load", lambda *args: pytest.fail("read by a process")
    )
    task_reader = Reader(Reader.load(config).settings)
    records = [sharded.ImageRecord(100, str(config.parent / "data/images/0.png"))]
    engine = create_engine("paddle", float_model, "fp32", "CPU", 1)
    task = ShardTask(
        float_model, float_model.content_hash(), engine.versions(),
        {"name": "paddle", "precision": "fp32", "device": "CPU", "threads": 1}, 1, task_reader.settings, (7, 3), "file",
    )  # fmt: skip
    with contextlib.closing(ShardSession(task)) as session:
        (run,) = session(records).runs
    assert run.image_ids == (100,) and len(run.detections) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model": InferenceModel(Path("/nowhere/model"))},
            "/nowhere/model does not exist on .* same path on every machine",
        ),
        ({"model_hash": "sha256:0"}, "is sha256:.*, expected sha256:0; copy it there"),
        ({"versions": {"paddlepaddle": "2.5"}}, "has paddlepaddle 2.6.2, expected 2.5 as where"),
    ],
)
def test_another_machine_must_compute_the_same(float_model, config, changes, words) -> None:
    task = {
        "model": float_model, "model_hash": float_model.content_hash(), "versions": {},
        "engine": {"name": "paddle", "threads": 1}, "batch_size": 1, "settings": Reader.load(config).settings,
        "category_ids": (7, 3), "annotation_file": "file",
    }  # fmt: skip
    with pytest.raises(UserError, match=words):
        ShardSession(ShardTask(**{**task, **changes}))


def request(model, config: Path, **more) -> InferenceRequest:
    return InferenceRequest(str(model.directory), reader_config=str(config), device="CPU", cpu_threads=1, **more)


def test_two_processes_detect_and_score_as_one(float_model, config, tmp_path) -> None:
    said: list[str] = []
    spoil(config, 4)
    outcomes = [
        run_inference(
            request(float_model, config, batch_size=2, json=str(tmp_path / f"{count}.json"), shards=count),
            say=said.append,
        )
        for count in (None, 2)
    ]
    assert_same(outcomes[1].evaluation, outcomes[0].evaluation)
    one, two = (read_record(tmp_path / f"{count}.json", EVAL_SCHEMA) for count in (None, 2))
    differ = {key for key in two if two[key] != one.get(key)}
    assert differ <= {"latency_ms", "images_per_second", "shards", "wall_seconds", "created", "command"}, differ
    assert (one["shards"], two["shards"], two["executor"], two["threads"]) == (1, 2, "local", 1)
    assert two["images_per_second"] == pytest.approx(two["images"] / two["wall_seconds"], rel=0.01)
    assert not any("latency" in line for line in outcomes[1].lines[:-2]) and any(
        "in 2 processes" in line for line in said
    )


def test_ray_evaluates_the_same(float_model, config, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray := StandInRay())
    file = str(tmp_path / "eval.json")
    spread = run_inference(
        request(float_model, config, executor="ray", ray_address="auto", json=file), say=lambda line: None
    )
    assert_same(spread.evaluation, run_inference(request(float_model, config), say=lambda line: None).evaluation)
    record = read_record(file, EVAL_SCHEMA)
    assert (record["executor"], record["shards"], ray.options["num_cpus"]) == ("ray", 1, 1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'act_pipeline[ray]'")
def test_a_ray_cluster_evaluates_the_same(float_model, config) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        spread = run_inference(
            request(float_model, config, executor="ray", ray_address=cluster.address, batch_size=2),
            say=lambda line: None,
        )
    finally:
        cluster.shutdown()
    alone = run_inference(request(float_model, config, batch_size=2), say=lambda line: None)
    assert_same(spread.evaluation, alone.evaluation)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision"), [("openvino", "int8"), ("int8_reference", "int8"), ("paddle", "fp32")]
)
def test_the_sample_in_two_processes_scores_as_in_one(demo, engine: str, precision: str) -> None:
    if engine == "openvino":
        pytest.importorskip("openvino", reason="needs openvino")
    reader = demo.reader()
    model = demo.compressed.model if precision == "int8" else demo.fp32
    loaded = create_engine(engine, model, precision, "CPU", 1)
    expected = evaluate(loaded, reader, limit=30, progress=False)
    loaded.close()
    found = evaluate_in_shards(loaded, model, reader, 2, limit=30, progress=False)
    assert expected.map > 0.1
    assert_same(found.evaluation, expected)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"shards": 2, "image_file": "a.jpg"},
            "--shards=2 spreads .* --image_file takes one process; leave one of them",
        ),
        ({"shards": 2, "benchmark": True}, "--shards=2 spreads .* --benchmark takes one process"),
        ({"shards": 2, "collect_shape_only": True}, "--collect_shape_only takes one process"),
        ({"executor": "ray", "benchmark": True}, "--executor=ray spreads"),
        ({"ray_address": "auto"}, "--ray_address=auto is for --executor=ray"),
        ({"executor": "ray"}, "needs the address of a cluster: --ray_address auto"),
    ],
)
def test_what_cannot_be_spread_is_one_line(float_model, config, monkeypatch, more, words) -> None:
    monkeypatch.setitem(sys.modules, "ray", StandInRay())
    with pytest.raises(UserError, match=words) as error:
        run_inference(request(float_model, config, **more), say=lambda line: None)
    assert "\n" not in str(error.value)


def test_threads_are_those_asked_for_or_a_share_of_the_machines() -> None:
    assert shard_threads(3, "local", 2) == shard_threads(3, "ray", None) == 3
    assert shard_threads(None, "local", 1) == available_cpus() and shard_threads(None, "local", 1000) == 1
    assert shard_threads(None, "ray", 1) == 1


@pytest.mark.slow
def test_the_command_takes_the_flags_and_shows_one_bar(float_model, config) -> None:
    done = subprocess.run(
        [
            sys.executable, str(REPOSITORY / "deploy" / "infer_eval.py"), f"--model_path={float_model.directory}",
            f"--reader_config={config}", "--device=CPU", "--cpu_threads=1", "--shards=2", "--json=eval.json",
        ],
        capture_output=True, text=True, cwd=config.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((config.parent / "eval.json").read_text())
    assert record["map"] == 1.0 and record["images"] == IMAGES and record["shards"] == 2
    assert f"/{IMAGES} [" in done.stderr and "Traceback" not in done.stderr
