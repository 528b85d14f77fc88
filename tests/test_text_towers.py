"""Models that take a text: their parts by name, and inputs that become constants at the import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import act_pipeline  # noqa: F401 - before paddle
from act_pipeline.cli.main import main
from act_pipeline.config.schema import Source
from act_pipeline.core.errors import UserError
from act_pipeline.data.transforms import Preprocess
from act_pipeline.families.prompt import make_prompt
from act_pipeline.graph.model_files import inspect_model
from act_pipeline.graph.quantizable_ops import quantizable_ops
from act_pipeline.graph.static_graph import StaticGraph, static_mode
from act_pipeline.importers.import_model import import_onnx, write_prompt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxslim")
pytest.importorskip("onnxruntime")

PROMPT = make_prompt(
    "disc . a square .", {"disc": "disc", "square": "a square"}, input_ids=[101, 5, 1012, 6, 7, 1012, 102]
)
TOKENS, QUERIES = 8, 4


def text_detector(path: Path) -> Path:
    """Write a detector with a text tower, a backbone, a product of both, a top-k and a decoder, one matmul or two each."""
    helper, numpy_helper, rng = onnx.helper, onnx.numpy_helper, np.random.default_rng(0)
    weights = {
        name: rng.normal(0, 0.3, size).astype(np.float32)
        for name, size in (
            ("table", (1024, 8)),
            ("text", (8, 8)),
            ("filter", (8, 3, 4, 4)),
            ("image", (8, 8)),
            ("head", (8, 8)),
        )
    }
    constants = {
        **weights, "k": np.array([QUERIES]), "flat": np.array([1, 8, 16]), "rows": np.array([1, 16, 8]),
        "last": np.array([-1]), "pick": np.array([1, 1, 8]), "box": np.full((1, 8, 4), 0.1, np.float32),
        "low": np.float32(-1e4), "one": np.float32(1), "area": np.array([1, 1, 4, 4]), "cells": np.array([1, 16, 1]),
    }  # fmt: skip
    nodes = [
        ("Gather", "table input_ids", "words"), ("MatMul", "words text", "text_features"),
        ("Conv", "pixel_values filter", "map"), ("Reshape", "map flat", "flat_map"),
        ("Transpose", "flat_map", "memory"), ("MatMul", "memory image", "image_features"),
        ("Cast", "pixel_mask", "valid"), ("Unsqueeze", "valid last0", "valid4"), ("MaxPool", "valid4", "pooled"),
        ("Reshape", "pooled cells", "cell"), ("Mul", "image_features cell", "masked"),
        ("Transpose", "text_features", "text_columns"), ("MatMul", "masked text_columns", "scores"),
        ("ReduceMax", "scores", "best"), ("TopK", "best k", "values order"), ("Unsqueeze", "order last", "order3"),
        ("Tile", "order3 pick", "index"), ("GatherElements", "masked index", "queries"),
        ("MatMul", "queries head", "decoded"), ("MatMul", "decoded text_columns", "raw"),
        ("Cast", "attention_mask", "present"), ("Sub", "one present", "absent"), ("Mul", "absent low", "penalty"),
        ("Add", "raw penalty", "logits"), ("MatMul", "decoded box", "offsets"), ("Sigmoid", "offsets", "pred_boxes"),
    ]  # fmt: skip
    attrs = {
        "map": {"strides": [4, 4]}, "memory": {"perm": [0, 2, 1]}, "text_columns": {"perm": [0, 2, 1]},
        "valid": {"to": 1}, "present": {"to": 1}, "best": {"axes": [-1], "keepdims": 0},
        "pooled": {"kernel_shape": [4, 4], "strides": [4, 4]}, "queries": {"axis": 1},
    }  # fmt: skip
    constants["last0"] = np.array([1])
    inputs = {"pixel_values": (1, [1, 3, 16, 16]), "input_ids": (7, [1, TOKENS]), "attention_mask": (7, [1, TOKENS]),
              "pixel_mask": (7, [1, 16, 16])}  # fmt: skip
    outputs = {"logits": [1, QUERIES, TOKENS], "pred_boxes": [1, QUERIES, 4]}
    made = [
        helper.make_node(kind, read.split(), wrote.split(), name=wrote.split()[0], **attrs.get(wrote.split()[0], {}))
        for kind, read, wrote in nodes
    ]
    graph = helper.make_graph(
        made,
        "text_detector",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, 1, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def test_parts_are_named_by_what_they_depend_on(tmp_path: Path) -> None:
    made = import_onnx(text_detector(tmp_path / "d.onnx"), tmp_path / "made", fixed_batch=True, prompt=PROMPT)
    with static_mode():
        graph = StaticGraph.load(made.model)
        groups = [op.group for op in quantizable_ops(graph, ["conv2d", "matmul_v2"])]
        graph.close()
    expected = {"backbone": 2, "decoder": 3, "encoder": 1, "text": 1}
    assert {group: groups.count(group) for group in sorted(set(groups))} == expected


@pytest.mark.parametrize(
    ("freeze", "left"),
    [
        (None, {"image", "input_ids", "attention_mask", "pixel_mask"}),
        ("pixel_mask", {"image", "input_ids", "attention_mask"}),
        ("prompt", {"image"}),
    ],
)
def test_frozen_inputs_become_constants(freeze: str | None, left: set[str], tmp_path: Path) -> None:
    path = text_detector(tmp_path / "d.onnx")
    made = import_onnx(path, tmp_path / "made", fixed_batch=True, prompt=PROMPT, freeze=freeze)
    assert set(inspect_model(made.model).inputs) == left and made.max_difference < 1e-5
    assert made.model.infer_cfg()["prompt"]["input_ids"] == list(PROMPT.input_ids)
    if freeze == "prompt":
        with pytest.raises(UserError, match="takes no text .* import it again: its prompt was frozen"):
            write_prompt(made.model, PROMPT)
    else:
        write_prompt(made.model, PROMPT)


def test_a_model_that_takes_text_needs_a_prompt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", "--onnx", str(text_detector(tmp_path / "d.onnx")), "--output", str(tmp_path / "made")]
    for family in ([], ["--family", "detr_raw"]):  # without the tokens nothing can run it, whatever its outputs are
        assert main([*arguments, *family]) == 2
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and "takes text (input_ids, attention_mask), expected what it looks for" in line
        assert "give --prompt with --vocab or --input_ids" in line
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_frozen_is_refused(tmp_path: Path) -> None:
    path = text_detector(tmp_path / "d.onnx")
    with pytest.raises(UserError, match="freeze is 'prompt', but there is no prompt"):
        import_onnx(path, tmp_path / "made", freeze="prompt")


def test_pictures_are_resized_as_pillow_does(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "p.png")
    source = Source(tmp_path / "reader.yml")

    def preprocess(interp: object) -> Preprocess:
        steps = [
            {"Decode": {}},
            {"Resize": {"target_size": [20, 30], "keep_ratio": False, "interp": interp}},
            {"Permute": {}},
        ]
        return Preprocess(steps, [], 2, source, "EvalReader")

    sample = preprocess("pillow_bicubic").sample(tmp_path / "p.png", 0)
    expected = np.asarray(Image.fromarray(picture).resize((30, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(sample["image"], expected.transpose(2, 0, 1))
    np.testing.assert_allclose(sample["scale_factor"], [20 / 50, 30 / 70])
    assert np.abs(preprocess(2).sample(tmp_path / "p.png", 0)["image"] - sample["image"]).max() > 20
    with pytest.raises(UserError, match="interp is 'pillow_cubic', expected .*did you mean"):
        preprocess("pillow_cubic")
