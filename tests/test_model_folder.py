"""Model folders in other forms: other file names, and models of Paddle 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from act_pipeline.core.artifacts import InferenceModel, open_model
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.static_graph import StaticGraph, static_mode

# The beginning of a program file of Paddle 3.
PIR = {"base_code": {"magic": "pir", "trainable": True, "version": 1}, "program": {"regions": []}}


def renamed(model: InferenceModel, folder: Path, program: str, parameters: str) -> Path:
    folder.mkdir()
    shutil.copyfile(model.model_path, folder / program)
    shutil.copyfile(model.params_path, folder / parameters)
    return folder


@pytest.mark.parametrize(
    ("program", "parameters"),
    [
        ("inference.pdmodel", "inference.pdiparams"),  # PaddleX 4745, 4132
        ("rtdetr.pdmodel", "rtdetr.pdiparams"),
        ("rtdetr.pdmodel", "weights.pdiparams"),
        ("model.pdmodel", "inference.pdiparams"),
    ],
)
def test_a_pair_of_other_names_is_found(
    float_model: InferenceModel, tmp_path: Path, program: str, parameters: str
) -> None:
    folder = renamed(float_model, tmp_path / "model", program, parameters)
    (folder / "rtdetr.pdiparams.info").write_bytes(b"of PaddleX")
    for path in (folder, folder / program):
        found = open_model(path)
        assert (found.directory, found.model_filename, found.params_filename) == (folder, program, parameters)
    assert inspect_model(found) == inspect_model(float_model)
    with static_mode():
        graph = StaticGraph.load(found)
        assert sorted(graph.feed_names) == ["im_shape", "image", "scale_factor"]
        graph.close()


def test_the_usual_names_come_first(float_model: InferenceModel, int8_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "model.pdmodel", "model.pdiparams")
    for name in ("inference", "another"):
        shutil.copyfile(int8_model.model_path, folder / f"{name}.pdmodel")
        shutil.copyfile(int8_model.params_path, folder / f"{name}.pdiparams")
    assert InferenceModel.load(folder).content_hash() == float_model.content_hash()
    (folder / "model.pdmodel").unlink()
    assert InferenceModel.load(folder).content_hash() == int8_model.content_hash()
    (folder / "inference.pdmodel").unlink()
    assert InferenceModel.load(folder).params_filename == "another.pdiparams"


def test_several_programs_are_a_question(float_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "a.pdmodel", "a.pdiparams")
    shutil.copyfile(float_model.model_path, folder / "b.pdmodel")
    with pytest.raises(UserError, match=r"2 \.pdmodel files \(a\.pdmodel, b\.pdmodel\).*model_filename"):
        InferenceModel.load(folder)
    assert InferenceModel.load(folder, "b.pdmodel").params_filename == "a.pdiparams"


@pytest.mark.parametrize("name", ["inference.json", "model.json", "rtdetr.json"])
def test_a_model_of_paddle_3_is_named(float_model: InferenceModel, tmp_path: Path, name: str) -> None:
    """PaddleX 4745: the folder, the file in it, and the file by ``model_filename``."""
    folder = renamed(float_model, tmp_path / "model", name, "inference.pdiparams")
    (folder / name).write_text(json.dumps(PIR, separators=(",", ":")), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for path, names in ((folder, ()), (folder / name, ()), (folder, (name, "inference.pdiparams"))):
        command = f"import_model.py --paddle3 .*{name}, or export it again"
        with pytest.raises(UserError, match=f"{name} is a model of Paddle 3 .*{command}") as error:
            open_model(path, *names)
        assert "config.json" not in str(error.value)


def test_an_empty_folder_still_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.pdmodel is missing in the model folder"):
        InferenceModel.load(tmp_path)
    (tmp_path / "model.pdmodel").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.pdiparams is missing"):
        InferenceModel.load(tmp_path)


def test_the_description_beside_it_is_found(float_model: InferenceModel, tmp_path: Path) -> None:
    folder = renamed(float_model, tmp_path / "model", "inference.pdmodel", "inference.pdiparams")
    (folder / "inference.yml").write_text("label_list: [disc, square]\n", encoding="utf-8")
    assert InferenceModel.load(folder).infer_cfg() == {"label_list": ["disc", "square"]}
    (folder / "infer_cfg.yml").write_text("label_list: [a, b]\n", encoding="utf-8")
    assert InferenceModel.load(folder).infer_cfg() == {"label_list": ["a", "b"]}


def test_every_command_takes_a_pair_of_other_names(
    float_model: InferenceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from inference_fixtures import TinyReader, make_tiny_data

    from act_pipeline.cli import onnx
    from act_pipeline.inference import run_inference
    from act_pipeline.inference.request import InferenceRequest

    folder = renamed(float_model, tmp_path / "model", "inference.pdmodel", "inference.pdiparams")
    output = tmp_path / "model.onnx"
    assert run_command(onnx.main, [f"--model_path={folder}", f"--output={output}"]) == 0 and output.is_file()
    annotations = make_tiny_data(tmp_path / "data")
    reader = TinyReader(annotations, annotations.parent / "images")
    for engine in ("paddle", "paddle_onednn", "openvino", "onnxruntime"):
        if engine in ("openvino", "onnxruntime"):
            pytest.importorskip(engine)
        request = InferenceRequest(model_path=str(folder), engine=engine, precision="fp32", device="CPU")
        outcome = run_inference(request, reader=reader)
        assert outcome.record["map"] == pytest.approx(1.0), engine


def test_compress_refuses_a_model_that_is_int8(int8_model: InferenceModel, float_model: InferenceModel) -> None:
    """PaddleDetection 6365: such a model was quantized again."""
    from act_pipeline.engines.float_model import require_float

    require_float(float_model)
    with pytest.raises(UserError, match=r"model\.pdmodel is an INT8 model already.*Global\.model_dir"):
        require_float(int8_model)


@pytest.mark.parametrize("command", ["compress", "analyze"])
def test_the_commands_refuse_an_int8_model(
    int8_model: InferenceModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    import importlib

    from inference_fixtures import make_tiny_data

    annotations = make_tiny_data(tmp_path / "data", images=2)
    data = f"!COCODataSet {{image_dir: images, anno_path: {annotations.name}, dataset_dir: {annotations.parent}}}"
    (tmp_path / "reader.yml").write_text(
        f"metric: COCO\nnum_classes: 2\nTrainDataset: {data}\nEvalDataset: {data}\nEvalReader:\n  sample_transforms:\n"
        "    - Decode: {}\n    - Resize: {target_size: [32, 32], keep_ratio: False, interp: 2}\n"
        "    - NormalizeImage: {mean: [0, 0, 0], std: [1, 1, 1], norm_type: none}\n    - Permute: {}\n  "
        "batch_size: 1\n",
        encoding="utf-8",
    )
    (tmp_path / "config.yml").write_text(
        f"Global: {{reader_config: reader.yml, model_dir: {int8_model.directory}}}\nStrategy: {{name: ptq}}\n"
        "QuantPost: {quantize_op_types: [conv2d]}\n",
        encoding="utf-8",
    )
    output = {"compress": "save_dir", "analyze": "output_dir"}[command]
    arguments = [f"--config_path={tmp_path / 'config.yml'}", f"--{output}={tmp_path / 'output'}"]
    assert run_command(importlib.import_module(f"act_pipeline.cli.{command}").main, arguments) == 2
    assert "is an INT8 model already" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "output").exists()


def test_compress_refuses_what_paddle_inference_optimized(float_model: InferenceModel, tmp_path: Path) -> None:
    from paddle import inference

    from act_pipeline.engines.float_model import require_float

    folder = renamed(float_model, tmp_path / "model", "model.pdmodel", "model.pdiparams")
    config = inference.Config(str(folder / "model.pdmodel"), str(folder / "model.pdiparams"))
    config.disable_glog_info()
    config.enable_mkldnn()
    config.enable_save_optim_model(True)
    (tmp_path / "optimized").mkdir()
    config.set_optim_cache_dir(str(tmp_path / "optimized"))
    inference.create_predictor(config)
    with pytest.raises(
        UserError, match=r"_optimized\.pdmodel is written by Paddle Inference's optimization.*fused_conv2d"
    ):
        require_float(InferenceModel.load(tmp_path / "optimized"))


def test_compress_refuses_a_model_of_mixed_precision(float_model: InferenceModel, tmp_path: Path) -> None:
    """A model written by paddle.inference.convert_to_mixed_precision, which needs a GPU."""
    import numpy as np

    from act_pipeline.engines.float_model import require_float
    from act_pipeline.graph.parameters_file import read_parameters, write_parameters

    model = InferenceModel.load(renamed(float_model, tmp_path / "model", "model.pdmodel", "model.pdiparams"))
    values = read_parameters(model, inspect_model(model).parameters)
    write_parameters(model, {name: value.astype(np.float16) for name, value in values.items()})
    with pytest.raises(UserError, match=r"is of mixed precision \(1 parameters in 16 bits, such as w\)"):
        require_float(model)


def test_an_output_that_other_tools_wrote_last_is_saved_as_it_is(float_model: InferenceModel, tmp_path: Path) -> None:
    """Saving adds a last op of this name; an op that computes, or is read by another op, must not be removed."""
    import numpy as np
    import paddle

    feed = {
        "image": np.ones((1, 3, 32, 32), np.float32),
        "im_shape": np.full((1, 2), 32, np.float32),
        "scale_factor": np.ones((1, 2), np.float32),
    }

    def outputs(graph: StaticGraph) -> list[np.ndarray]:
        with paddle.static.scope_guard(graph.scope):
            return graph.executor.run(graph.program, feed=feed, fetch_list=graph.fetch_targets)

    with static_mode():
        graph = StaticGraph.load(float_model)
        before = outputs(graph)
        last = next(op for op in graph.program.global_block().ops if graph.fetch_targets[0].name in op.output_arg_names)
        last._set_attr("scale", 2.0)
        for turn in ("first", "again"):
            (tmp_path / turn).mkdir()
            graph = StaticGraph.load(graph.save(tmp_path / turn))
            np.testing.assert_allclose(outputs(graph)[0], 2 * before[0], rtol=1e-6)
            np.testing.assert_array_equal(outputs(graph)[1], before[1])


def test_an_input_that_nothing_reads_is_left_out(float_model: InferenceModel, tmp_path: Path) -> None:
    """Paddle refuses to save a graph with such an input."""
    with static_mode():
        graph = StaticGraph.load(float_model)
        graph.unwrap_outputs()
        block = graph.program.global_block()
        graph.fetch_targets = [block.var(next(op for op in block.ops if op.type == "conv2d").output("Output")[0])]
        saved = graph.save(tmp_path)
    assert list(inspect_model(saved).inputs) == ["image"]
