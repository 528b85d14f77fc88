"""From a YAML and weights to an inference model, and every invalid input on the way."""

from __future__ import annotations

import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from act_pipeline.core.downloads import fetch
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.hashing import hash_files
from act_pipeline.core.records import read_record
from act_pipeline.demo import MODEL_CONFIG, WEIGHTS
from act_pipeline.export import export_model

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
BCCD = SHARED / "models" / "bccd"


def run_tool(*argv: str) -> int:
    from act_pipeline.cli import export as command

    return run_command(command.main, list(argv))


def test_the_signature_is_paddledetections(demo) -> None:
    from act_pipeline.graph.model_files import inspect_model
    from act_pipeline.graph.static_graph import StaticGraph, static_mode

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
    from act_pipeline.engines import create_engine

    batch = next(iter(demo.reader().loader("eval", batch_size=3)))
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
    """A graph saved twice once had outputs written from themselves, on which PaddleSlim recursed infinitely."""
    from act_pipeline.graph.static_graph import StaticGraph, static_mode

    with static_mode():
        for model in (demo.fp32, demo.compressed.model):
            ops = StaticGraph.load(model).program.global_block().ops
            assert not [
                op.type for op in ops if op.type == "scale" and set(op.input_arg_names) & set(op.output_arg_names)
            ]


def test_the_record_says_what_it_was_made_from(demo) -> None:
    record = read_record(demo.fp32.directory / "export.json", "act_pipeline.export/1")
    assert record["source_hash"] == hash_files([WEIGHTS])
    assert record["model_hash"] == demo.fp32.content_hash()
    assert record["bytes"] == demo.fp32.bytes


def test_bccd_gives_the_same_from_its_weights_as_from_its_graph(tmp_path: Path) -> None:
    if not BCCD.exists():
        pytest.skip("the trained model of real photographs is not beside this repository")
    from act_pipeline.core.artifacts import InferenceModel
    from act_pipeline.data import Reader
    from act_pipeline.engines import create_engine

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
        (["-o", f"weights={WEIGHTS}", "num_classes=7"], "do not fit the model config: they are of 10 classes"),
        (["-o", f"weights={WEIGHTS}", "num_classes=three"], "'num_classes' is 'three'"),
        (["-o", f"weights={WEIGHTS}", "RTDETRTransformer.num_queries=1030"], "the encoder gives 1029 places"),
        (["-o", f"weights={WEIGHTS}", "RTDETRTransformer.num_queries=0"], "num_queries is 0"),
        (["-o", f"weights={WEIGHTS}", "RTDETRTransformer.eval_idx=2"], "eval_idx is 2, there are 2 decoder layers"),
        (["-o", f"weights={WEIGHTS}", "RTDETRTransformer.nhead=7"], "embed_dim must be divisible"),
        (["-o", f"weights={WEIGHTS}", "HybridEncoder.use_encoder_idx=[5]"], "cannot be built"),
        (["-o", f"weights={WEIGHTS}", "DETRPostProcess.num_top_queries=501"], "10 classes give 500 boxes"),
        (["-o", f"weights={WEIGHTS}", "DETRPostProcess.num_top_queries=all"], "num_top_queries is 'all'"),
        (
            ["-o", f"weights={WEIGHTS}", "DETRPostProcess={num_top_queries: 50, dual_queries: True, dual_groups: 10}"],
            "50 queries in the first of 11 groups of 10 classes give 40 boxes",
        ),
        (["-o", f"weights={WEIGHTS}", "DETRPostProcess.no_such_key=1"], "no_such_key"),
        (["-o", f"weights={WEIGHTS}", "DETRPostProcess=null"], "'DETRPostProcess' is None"),
        (["-o", f"weights={WEIGHTS}", "DETR.post_process=null"], "'DETR.post_process' is None"),
        (["-o", f"weights={WEIGHTS}", "use_focal_loss=False"], "'use_focal_loss' is False"),
        (["-o", f"weights={WEIGHTS}", "with_mask=True"], "masks are not supported"),
        (["-o", f"weights={WEIGHTS}", "exclude_post_process=maybe"], "'exclude_post_process' is 'maybe'"),
        (["-o", f"weights={WEIGHTS}", "TestReader.inputs_def=5"], "'inputs_def' is 5"),
        (["-o", f"weights={WEIGHTS}", "TestReader.inputs_def.image_shape=[1,224,224]"], "expected [3, height, width]"),
        (
            ["-o", f"weights={WEIGHTS}", "TestReader.inputs_def.image_shape=[3,224,224]", "eval_size=[256,256]"],
            "gives the input size [224, 224], 'eval_size' is [256, 256]",
        ),
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


@pytest.mark.parametrize(
    ("override", "expected"),
    [("eval_size=[64, 96]", (64, 96)), ("TestReader.inputs_def.image_shape=[3, 32, 64]", (32, 64))],
)
def test_the_size_that_is_asked_for_counts(tmp_path: Path, override: str, expected: tuple[int, int]) -> None:
    """A config that has its size in two places, of which the command line changes one."""
    from act_pipeline.graph.model_files import inspect_model

    config = tmp_path / "model.yml"
    config.write_text(
        f"_BASE_: [{MODEL_CONFIG}]\nTestReader: {{inputs_def: {{image_shape: [3, 224, 224]}}}}\n", encoding="utf-8"
    )
    model = export_model(config, tmp_path, [f"weights={WEIGHTS}", override, "RTDETRTransformer.num_queries=40"])
    assert inspect_model(model).input_size == expected


WITHOUT_POST_PROCESS = ("exclude_post_process=True", "export={post_process: False}")


@pytest.fixture(scope="module", params=WITHOUT_POST_PROCESS)
def raw_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The sample exported up to its boxes and logits."""
    return export_model(MODEL_CONFIG, tmp_path_factory.mktemp("raw"), [f"weights={WEIGHTS}", request.param])


def test_without_its_post_process_a_model_takes_images_and_gives_boxes_and_logits(raw_model) -> None:
    """PaddleDetection 7150, PaddleSlim 1869."""
    from act_pipeline.graph.model_files import inspect_model

    summary = inspect_model(raw_model)
    assert dict(summary.inputs) == {"image": (-1, 3, 224, 224)}
    assert list(summary.output_shapes.values()) == [(-1, 50, 4), (-1, 50, 10)]


@pytest.mark.parametrize("raw_model", WITHOUT_POST_PROCESS[:1], indirect=True, scope="module")
def test_boxes_and_logits_become_the_detections_of_the_post_process(raw_model, sample_model, tmp_path: Path) -> None:
    from sample_fixtures import reader_of_scenes

    from act_pipeline.data.builtin_sample import make_sample
    from act_pipeline.engines import create_engine
    from act_pipeline.engines.paddle.tensors import PaddleTensors

    make_sample(tmp_path / "data", 1, 2, seed=0, size=96, progress=False)
    batch = next(iter(reader_of_scenes(tmp_path / "data").loader("eval", batch_size=2)))
    runner = PaddleTensors(raw_model)
    boxes, logits = next(runner.run([batch]))
    runner.close()
    scores = np.sort((1 / (1 + np.exp(-logits))).reshape(2, -1))[:, ::-1][:, :50]
    found = []
    for model in (sample_model, raw_model):
        engine = create_engine("paddle_onednn", model)
        outputs = engine.run(batch)
        engine.close()
        images = np.split(outputs["bbox"], np.cumsum(outputs["bbox_num"])[:-1])
        found.append(np.stack([image[:50] for image in images]))
    whole, decoded = found
    assert np.abs(whole[:, :, 1] - scores).max() < 1e-4
    assert ((boxes > -0.5) & (boxes < 1.5)).all()
    assert np.abs(decoded[:, :, 1] - scores).max() < 1e-4
    for one, other in zip(whole, decoded):
        one[:, 2:] = np.clip(one[:, 2:], 0, 96)  # the graph's own post-process does not clip
        for row in one[one[:, 1] > 0.3]:  # rounding decides the order of two rows with equal scores
            apart = np.abs(other - row) / [1, 1, 96, 96, 96, 96]
            assert apart.max(axis=1).min() < 1e-3


def test_dual_queries_are_detected_by_the_first_group_alone() -> None:
    """As in PaddleDetection's DETRPostProcess of its Group DINO models."""
    import paddle

    from act_pipeline.rtdetr.build import register_modules

    register_modules()
    from act_pipeline.rtdetr.architecture import DETRPostProcess

    generator = np.random.default_rng(0)
    boxes = paddle.to_tensor(generator.uniform(0.2, 0.8, (2, 9, 4)).astype(np.float32))
    logits = paddle.to_tensor(generator.normal(size=(2, 9, 5)).astype(np.float32))
    sizes = paddle.full([2, 2], 100.0), paddle.ones([2, 2]), [100, 100]
    dual = DETRPostProcess(5, 12, dual_queries=True, dual_groups=2, use_focal_loss=True)
    alone = DETRPostProcess(5, 12, use_focal_loss=True)
    found, number = dual((boxes, logits, None), *sizes)
    expected, _ = alone((boxes[:, :3], logits[:, :3], None), *sizes)
    assert number.tolist() == [12, 12]
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_a_missing_config_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool("-c", str(tmp_path / "none.yml")) == 2
    assert "none.yml" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path: Path):
    """A local server with one file and a counter of the requests."""
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
    before = hash_files(sorted(path for path in (tmp_path / "rtdetr_sample").iterdir() if path.is_file()))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device", "model.pdiparams")

    monkeypatch.setattr("act_pipeline.graph.static_graph.StaticGraph.save", full_disk)
    code = run_tool("-c", str(MODEL_CONFIG), "-o", f"weights={WEIGHTS}", f"--output_dir={tmp_path}")
    assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["rtdetr_sample"]
    assert hash_files(sorted(path for path in (tmp_path / "rtdetr_sample").iterdir() if path.is_file())) == before


def test_the_forward_of_a_class_is_converted_once_for_all_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paddle alone converts it for each layer anew: half of the time of an export."""
    import paddle
    from paddle.jit.dy2static.program_translator import FunctionCache

    from act_pipeline.graph.quick_building import quick_building

    class Block(paddle.nn.Layer):
        def forward(self, x):
            return x * 2.0

    class Net(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = paddle.nn.LayerList([Block() for _ in range(4)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    converted: list[str] = []
    convert = FunctionCache._convert

    def count(cache, function):
        converted.append(function.__qualname__.rpartition(".<locals>.")[2])
        return convert(cache, function)

    monkeypatch.setattr(FunctionCache, "_convert", count)
    spec = [paddle.static.InputSpec([None, 3], name="x")]
    with quick_building():
        paddle.jit.save(paddle.jit.to_static(Net(), input_spec=spec, full_graph=True), str(tmp_path / "model"))
    assert converted.count("Block.forward") == converted.count("Net.forward") == 1
    run = paddle.jit.load(str(tmp_path / "model"))
    assert run(paddle.ones([1, 3])).numpy().tolist() == [[16.0] * 3]
