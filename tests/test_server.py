"""What the server does with requests: pictures of strangers, versions, workers that are killed. No Triton."""

from __future__ import annotations

import json
import os
import signal
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fixtures import SIDE, STEPS, FakeFloats, FakePool, picture, prepared, served
from serving_fixtures import make_model

from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.server import range_probe
from act_pipeline.server import versions as server_versions
from act_pipeline.server.float_models import FloatModels
from act_pipeline.server.items import Found, Picture, Prepared, Refused
from act_pipeline.server.model import LoadedModel, batch_sizes, chunks
from act_pipeline.server.pictures import BadPicture, prepare_picture
from act_pipeline.server.pool import WorkerPool
from act_pipeline.server.service import Answer, Request, Service
from act_pipeline.server.settings import Batching, Limits
from act_pipeline.server.triton.tensors import model_config, request_of, returned
from act_pipeline.server.versions import LoadedVersions, wanted_versions
from act_pipeline.serving import Repository, State, load_rules, promote, roll_back

LIMITS = Limits(picture_bytes=100_000, picture_pixels=10_000, seconds=5.0)


def bomb() -> bytes:
    """Return a PNG of a few bytes that has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "are no JPEG or PNG"),
        (b"nonsense" * 100, "are no JPEG or PNG"),
        (picture(kind="GIF"), "are no JPEG or PNG"),
        (picture(kind="BMP"), "are no JPEG or PNG"),
        (bomb(), "pixels, "),
        (picture(size=(101, 100)), "100 x 101 pixels, expected at most 10000"),
        (picture() + bytes(100_000), "bytes, expected at most 100000"),
        (picture()[:60], "damaged"),
    ],
    ids=["empty", "garbage", "gif", "bmp", "bomb", "large", "long", "cut"],
)
def test_a_wrong_picture_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(BadPicture, match=words) as found:
        prepare_picture(data, STEPS, LIMITS)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_prepared_as_the_model_takes_it(kind: str) -> None:
    found, offset = prepare_picture(picture(200, (40, 60), kind), STEPS, LIMITS)
    assert found.image.shape == (3, SIDE, SIDE) and abs(found.image.mean() - 200 / 255) < 0.01
    assert found.scale_factor is not None and found.scale_factor.tolist() == pytest.approx([SIDE / 40, SIDE / 60])
    assert not offset.any()


def test_batches_are_split_into_sizes_that_are_compiled() -> None:
    assert batch_sizes(8, None) == [8, 4, 2, 1] and batch_sizes(6, None) == [6, 4, 2, 1] and batch_sizes(8, 3) == [3]
    assert chunks(7, [8, 4, 2, 1]) == [4, 2, 1] and chunks(7, [3]) == [3, 3, 3] and chunks(0, [1]) == []


@pytest.mark.parametrize("fixed", [None, 2])
def test_images_of_a_batch_do_not_mix_and_a_wrong_one_is_refused_alone(fixed: int | None, tmp_path: Path) -> None:
    model = LoadedModel(served(tmp_path / "tiny.onnx", fixed), 2, 4, LIMITS)
    values = [0.1, 0.9, 0.4, 0.7, 0.2]
    items: list[Any] = [prepared(value) for value in values]
    items.insert(2, Picture(b"no picture"))
    items.insert(4, Prepared(np.zeros((3, 8, 8), np.float32)))
    before = model.run(items)
    model.warm()
    assert model.sizes == ([2] if fixed else [1])
    # Parallel test processes have one core each.
    several = fixed is None and available_cpus() > 1
    assert (model.parallel > 1) is several, "OpenVINO computes the images of a batch at the same time"
    for outcomes in (before, model.run(items)):
        scores = [round(float(one.bbox[0, 1]), 3) for one in outcomes if isinstance(one, Found)]
        assert scores == values
        assert [place for place, one in enumerate(outcomes) if isinstance(one, Refused) and one.by_client] == [2, 4]
    model.close()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    made = WorkerPool(1, 1, 4, Limits(seconds=1.5))
    made.load(1, served(tmp_path_factory.mktemp("pool") / "tiny.onnx"))
    yield made
    made.close()


def scores_of(outcomes: list[Any]) -> list[float]:
    assert all(isinstance(one, Found) for one in outcomes), outcomes
    return [round(float(one.bbox[0, 1]), 3) for one in outcomes]


def test_a_killed_worker_costs_no_answer(pool: WorkerPool) -> None:
    (worker,) = pool.pids
    os.kill(worker, signal.SIGSTOP)  # it has the batch, and does not answer
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(pool.run(1, [prepared(0.3), prepared(0.6)])))
    thread.start()
    time.sleep(0.3)
    os.kill(worker, signal.SIGKILL)
    thread.join(60)
    assert scores_of(found) == [0.3, 0.6]
    assert pool.restarts == 1 and pool.pids != [worker]


def test_a_worker_that_hangs_is_replaced(pool: WorkerPool) -> None:
    before = pool.restarts
    os.kill(pool.pids[0], signal.SIGSTOP)
    assert scores_of(pool.run(1, [prepared(0.3)])) == [0.3]
    assert pool.restarts == before + 1


def test_a_signal_to_the_group_does_not_cut_off_a_batch(pool: WorkerPool) -> None:
    (worker,) = pool.pids
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker, number)
    assert scores_of(pool.run(1, [prepared(0.2)])) == [0.2] and pool.pids == [worker]


def test_a_version_that_is_not_loaded_in_time_is_refused(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_patience", 0.1)
    (found,) = pool.run(7, [prepared()])
    assert isinstance(found, Refused) and not found.by_client


def make_service(folder: Path, *versions: int, rules: list[str] | None = None) -> tuple[Service, Any, Repository]:
    """Return a service of versions without content, the last of them with 50% of the requests."""
    repository = Repository.open(folder / "repository", create=True)
    for number in versions:
        promote(repository, make_model(folder / f"model{number}", f"v{number}"), 100 if number == 1 else 50)
    pool: Any = FakePool(*versions)
    pool.prepared = []

    def load(self: LoadedVersions, version: int) -> None:
        pool.prepared.append(version)
        if version in pool.broken:
            raise UserError(f"version {version} is broken")
        pool.load(version, FakePool(1).models[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedVersions, "_load", load)
        patch.setattr("act_pipeline.server.versions._PERIOD_S", 60.0)
        found = load_rules(overrides=rules or [])
        service = Service(repository, found, pool, LIMITS, 4, FakeFloats(1))  # type: ignore[arg-type]
    service.versions._load = load.__get__(service.versions)  # type: ignore[method-assign]
    return service, pool, repository


def ask(service: Service, *names: str, version: int | None = None) -> list[Any]:
    return service.answer([Request(name, [prepared()], version) for name in names])


def test_the_shares_decide_and_a_batch_is_split_by_version(tmp_path: Path) -> None:
    service, pool, _ = make_service(tmp_path, 1, 2)
    names = [f"r{number}" for number in range(40)]
    answers = ask(service, *names)
    by_version = {name: answer.version for name, answer in zip(names, answers)}
    assert set(by_version.values()) == {1, 2}
    for answer in answers:
        assert answer.found[0].bbox[0, 1] == pytest.approx(answer.version / 10)
    assert max(size for _, size in pool.runs) == 4 and sum(size for _, size in pool.runs) == 40
    assert {name: ask(service, name)[0].version for name in names} == by_version
    figures = service.monitor.figures()["versions"]
    assert figures["1"]["counters"]["requests"] + figures["2"]["counters"]["requests"] == 80
    assert ask(service, *names[:9], version=2)[0].version == 2
    (refused,) = ask(service, "x", version=9)
    assert isinstance(refused, Refused) and refused.reason == "version 9 is not loaded, expected one of: 1, 2"
    service.close()


def test_a_version_that_cannot_be_loaded_is_counted_and_the_others_answer(tmp_path: Path) -> None:
    service, pool, repository = make_service(tmp_path, 1)
    pool.broken.add(2)
    promote(repository, make_model(tmp_path / "model2", "v2"), 50)
    service.versions.follow()
    assert service.versions.failure(2) == "version 2 is broken"
    assert {answer.version for answer in ask(service, *map(str, range(40)))} == {1}
    counters = service.monitor.figures()["versions"]["2"]["counters"]
    assert counters["errors"] == counters["requests"] > 10, "a rule on error_rate rolls it back"
    service.close()


def test_what_is_loaded_follows_the_pointer(tmp_path: Path) -> None:
    service, pool, repository = make_service(tmp_path, 1)
    for number, share in ((2, 100), (3, 50)):
        promote(repository, make_model(tmp_path / f"model{number}", f"v{number}"), share)
    service.versions.follow()
    assert sorted(pool.models) == [1, 2, 3]
    roll_back(repository)
    service.versions.follow()
    assert sorted(pool.models) == [1, 2], "3 is taken back; 1 is what a roll back of 2 needs"
    state = State(live=4, candidate=5, share=10, spare=6, previous=(1, 2, 3))
    assert wanted_versions(state) == [4, 5, 3, 6]
    service.close()


def test_a_wrong_request_is_no_error_of_the_version(tmp_path: Path) -> None:
    service, pool, _ = make_service(tmp_path, 1)
    (found,) = service.answer([Request("a", [Picture(b"garbage")])])
    assert isinstance(found, Refused) and found.by_client
    assert service.monitor.figures()["versions"].get("1", {"counters": {"errors": 0}})["counters"]["errors"] == 0
    pool.broken.add(1)
    (found,) = ask(service, "b")
    assert isinstance(found, Refused) and not found.by_client
    assert service.monitor.figures()["versions"]["1"]["counters"]["errors"] == 1
    service.close()


def test_the_shadow_runs_in_the_float_model(tmp_path: Path) -> None:
    service, _, _ = make_service(tmp_path, 1, rules=["shadow.share=100", "shadow.queue=100"])
    ask(service, *map(str, range(20)))
    service.monitor.drain_shadow()
    window = service.monitor.figures()["versions"]["1"]["window"]
    assert window["shadowed"] == window["ranged"] == 20 and window["beyond_range_share"] == 0.375
    service.close()


def test_what_runs_in_the_background_leaves_the_processor_to_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float model and the probe are prepared at low priority, and the probe has one thread."""
    priorities: list[int] = []
    used: list[int] = []

    class Preparing:
        def __init__(self, died: Any, nice: int = 0) -> None:
            priorities.append(nice)

        def call(self, *arguments: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(UserError("not here"))
            return future

        def close(self) -> None:
            pass

    monkeypatch.setattr(server_versions, "Worker", Preparing)
    repository = Repository.open(tmp_path / "repository", create=True)
    promote(repository, make_model(tmp_path / "a", "a"), 100, float_model=make_model(tmp_path / "float", "f"))
    floats = FloatModels(repository, 2, LIMITS)
    assert floats.ranges(1, prepared()) == "not here"
    assert floats.run(1, prepared()) == Refused("not here", by_client=False)
    assert priorities == [10, 10]
    monkeypatch.setattr(range_probe, "RangeProbe", lambda path, runtime, threads: used.append(threads))
    range_probe.ProbedModel(tmp_path, "onnxruntime", (), (SIDE, SIDE), STEPS).load(4, 8, LIMITS)
    assert used == [1]


def test_requests_as_tensors() -> None:
    image = np.zeros((2, 3, 4, 4), np.float32)
    shapes = np.full((2, 2), 4, np.float32)
    found = request_of(("a", '{"version": 3}', {"image": image, "im_shape": shapes}))
    assert isinstance(found, Request) and found.version == 3 and found.id == "a" and len(found.items) == 2
    found = request_of(("", "", {"picture": np.array([[b"x"], [b"y"]], object)}))
    assert isinstance(found, Request) and found.id and found.items == [Picture(b"x"), Picture(b"y")]
    for sent in (
        ("a", "", {}),
        ("a", "", {"image": image, "picture": image}),
        ("a", '{"version": "x"}', {"image": image}),
    ):
        assert isinstance(request_of(sent), Refused)
    rows = [np.array([[1, 0.9, 0, 0, 5, 5], [2, 0.2, 0, 0, 6, 6]], np.float32), np.zeros((0, 6), np.float32)]
    outputs = returned(Answer(7, [Found(row, 2.0) for row in rows]), threshold=0.5)
    assert (
        isinstance(outputs, dict)
        and outputs["labels"].tolist() == [[1], [-1]]
        and outputs["version"].tolist() == [[7], [7]]
    )
    assert outputs["boxes"].shape == (2, 1, 4)
    assert returned(Refused("no", by_client=True)) == (True, "no")


def test_tritons_configuration_is_what_triton_reads() -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is missing; install requirements/serve.txt")
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    text = model_config("detector", (480, 640), Batching(8, (4, 16), 500), Limits(queue=9, seconds=2.0), 3)
    found = text_format.Parse(text, ModelConfig())
    assert found.max_batch_size == 8 and list(found.dynamic_batching.preferred_batch_size) == [4]
    policy = found.dynamic_batching.default_queue_policy
    assert policy.max_queue_size == 9 and policy.default_timeout_microseconds == 2_000_000
    assert found.dynamic_batching.max_queue_delay_microseconds == 500 and found.instance_group[0].count == 3
    assert [list(tensor.dims) for tensor in found.input][:2] == [[1], [3, 480, 640]]
    assert json.loads(json.dumps([tensor.name for tensor in found.output])) == [
        "boxes", "scores", "labels", "version", "milliseconds",
    ]  # fmt: skip
