"""From a YAML and weights to an inference model, and every bad input of that way."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.demo import MODEL_CONFIG, WEIGHTS
from act_pipeline.download import fetch
from act_pipeline.errors import UserError, run_command
from act_pipeline.export import export_model
from act_pipeline.records import hash_files, read_record

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
BCCD = SHARED / "models" / "bccd"


def run_tool(*argv: str) -> int:
    from tools import export_model as command

    return run_command(command.main, list(argv))


def test_the_signature_is_paddledetections(demo) -> None:
    from act_pipeline.engines.model_files import inspect_model
    from act_pipeline.static_graph import StaticGraph, static_mode

    summary = inspect_model(demo.fp32)
    assert {name: list(shape) for name, shape in summary.inputs.items()} == {
        "image": [-1, 3, 224, 224],
        "im_shape": [-1, 2],
        "scale_factor": [-1, 2],
    }
    with static_mode():
        targets = StaticGraph.load(demo.fp32).fetch_targets
    assert [list(target.shape) for target in targets] == [[-1, 6], [-1]]
    infer_cfg = demo.fp32.infer_cfg()
    assert infer_cfg["arch"] == "DETR" and infer_cfg["min_subgraph_size"] == 3
    assert [step["type"] for step in infer_cfg["Preprocess"]] == ["Resize", "NormalizeImage", "Permute"]
    assert len(infer_cfg["label_list"]) == 10


def test_a_batch_gives_what_its_images_give_alone(demo) -> None:
    from act_pipeline.data import Reader
    from act_pipeline.demo import READER_CONFIG
    from act_pipeline.engines import create_engine

    reader = Reader.load(READER_CONFIG, [f"EvalDataset.dataset_dir={demo.root / 'data'}"])
    batch = next(iter(reader.loader("eval", batch_size=3)))
    engine = create_engine("paddle_onednn", demo.fp32, "fp32", "CPU", 2)
    together = engine.run(batch)
    assert together["bbox_num"].tolist() == [50, 50, 50]
    for index in range(3):
        alone = engine.run({name: array[index : index + 1] for name, array in batch.items()})
        found = together["bbox"][index * 50 : (index + 1) * 50]
        assert np.abs(np.sort(found[:, 1]) - np.sort(alone["bbox"][:, 1])).max() < 1e-4
    engine.close()


def test_nothing_in_the_model_names_the_machine_that_made_it(demo) -> None:
    for model in (demo.fp32, demo.compressed.model):
        content = model.model_path.read_bytes()
        assert str(REPOSITORY).encode() not in content and b"site-packages" not in content


def test_no_op_writes_what_it_reads(demo) -> None:
    """Saved twice, a graph had outputs written from themselves, on which PaddleSlim recursed without an end."""
    from act_pipeline.static_graph import StaticGraph, static_mode

    with static_mode():
        for model in (demo.fp32, demo.compressed.model):
            ops = StaticGraph.load(model).program.global_block().ops
            assert not [op.type for op in ops if op.type == "scale" and set(op.input_arg_names) & set(op.output_arg_names)]


def test_the_record_says_what_it_was_made_from(demo) -> None:
    record = read_record(demo.fp32.directory / "export.json", "act_pipeline.export/1")
    assert record["source_hash"] == hash_files([WEIGHTS])
    assert record["model_hash"] == demo.fp32.content_hash()
    assert record["bytes"] == demo.fp32.bytes


def test_bccd_gives_the_same_from_its_weights_as_from_its_graph(tmp_path: Path) -> None:
    if not BCCD.exists():
        pytest.skip("the trained model of real photographs is not beside this repository")
    from act_pipeline.data import Reader
    from act_pipeline.engines import create_engine
    from act_pipeline.model import InferenceModel

    exported = export_model(
        BCCD / "rtdetr_hgnetv2_s_bccd.yml", tmp_path, [f"weights={BCCD / 'rtdetr_hgnetv2_s_bccd.pdparams'}", "trt=True"]
    )
    data = SHARED / "data" / "bccd"
    reader = (
        Reader.load(REPOSITORY / "configs" / "readers" / "sample_reader.yml", ["num_classes=3"])
        .with_input_size(256, 256)
        .with_dataset("eval", image_dir="images", anno_path="annotations/instances_test.json", dataset_dir=str(data))
    )
    engines = [
        create_engine("paddle_onednn", model, "fp32", "CPU", 2) for model in (exported, InferenceModel.load(BCCD))
    ]
    for batch in list(reader.loader("eval", batch_size=4))[:2]:
        ours, theirs = (engine.run(batch)["bbox"] for engine in engines)
        order = [np.lexsort((rows[:, 2], np.round(rows[:, 1], 4))) for rows in (ours, theirs)]
        ours, theirs = ours[order[0]], theirs[order[1]]
        confident = theirs[:, 1] > 0.1
        assert np.array_equal(ours[confident, 0], theirs[confident, 0])
        assert np.abs(ours[confident, 1] - theirs[confident, 1]).max() < 1e-3
        assert np.abs(ours[confident, 2:] - theirs[confident, 2:]).max() < 0.5


def test_the_command_writes_where_paddledetections_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run_tool("-c", str(MODEL_CONFIG), "-o", f"weights={WEIGHTS}", "trt=True", f"--output_dir={tmp_path}")
    assert code == 0 and "rtdetr_sample" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "rtdetr_sample").iterdir()) == [
        "export.json",
        "infer_cfg.yml",
        "model.pdiparams",
        "model.pdmodel",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "weights=nowhere.pdparams"], "nowhere.pdparams do not exist"),
        (["-o", "weights=null"], "key 'weights' is None"),
        (["-o", f"weights={WEIGHTS}", "eval_size=[224]"], "eval_size"),
        (["-o", f"weights={WEIGHTS}", "eval_size=[200, 200]"], "multiples of 32"),
        (["-o", f"weights={WEIGHTS}", "num_classes=7"], "do not fit the model config"),
        (["-o", "weights"], "weights"),
        (["-o", f"weights={WEIGHTS}", "--export_serving_model=True"], "not supported"),
        (["-o", "weights=http://127.0.0.1:9/model.pdparams"], "cannot be reached"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = run_tool("-c", str(MODEL_CONFIG), *arguments, f"--output_dir={tmp_path / 'out'}")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and words in error and error.startswith("error: ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_missing_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("-c", str(tmp_path / "none.yml")) == 2
    assert "none.yml" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path):
    """A server of this machine, with one file and a count of the requests."""
    root = tmp_path / "served"
    root.mkdir()
    (root / "model.pdparams").write_bytes(b"weights" * 1000)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(root), **kwargs)

        def do_GET(self):
            requests.append(self.path)
            if self.path == "/cut.pdparams":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"short")
                return
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", requests
        running.shutdown()


def test_a_download_is_kept_checked_and_fetched_again_when_harmed(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requests = server
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "cache"))
    url = f"{address}/model.pdparams"
    path = fetch(url, progress=False)
    assert path.read_bytes() == b"weights" * 1000
    assert fetch(url, progress=False) == path and len(requests) == 1
    path.write_bytes(b"harmed")
    assert fetch(url, progress=False).read_bytes() == b"weights" * 1000 and len(requests) == 2
    digest = hash_files([path]).partition(":")[2]
    assert fetch(f"{url}#sha256={digest}", progress=False) == path
    with pytest.raises(UserError, match="is not the file that was asked for"):
        fetch(f"{url}#sha256={'0' * 64}", progress=False)


@pytest.mark.parametrize(
    ("name", "words"), [("absent.pdparams", "cannot be downloaded: 404"), ("cut.pdparams", "cut|reached")]
)
def test_a_download_that_fails_leaves_nothing(
    server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv("ACT_PIPELINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=words):
        fetch(f"{server[0]}/{name}", progress=False)
    assert not list((tmp_path / "cache" / "weights").iterdir())


def test_a_failed_export_keeps_the_model_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo) -> None:
    shutil.copytree(demo.fp32.directory, tmp_path / "rtdetr_sample")
    before = hash_files(sorted(path for path in (tmp_path / "rtdetr_sample").iterdir()))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.pdiparams")

    monkeypatch.setattr("act_pipeline.static_graph.StaticGraph.save", full_disk)
    code = run_tool("-c", str(MODEL_CONFIG), "-o", f"weights={WEIGHTS}", f"--output_dir={tmp_path}")
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rtdetr_sample"]
    assert hash_files(sorted(path for path in (tmp_path / "rtdetr_sample").iterdir())) == before
