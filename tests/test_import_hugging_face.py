"""Models of transformers become models of this project, and what does not fit ends in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from import_fixtures import catch_models
from transformers_fixtures import (
    HGNET_S,
    LABELS,
    PREPROCESSOR,
    SIZE,
    SMALL,
    random_weights,
    to_transformers,
    write_folder,
    write_safetensors,
)

from act_pipeline.core.errors import UserError
from act_pipeline.core.records import read_record
from act_pipeline.importers.hugging_face import import_hugging_face
from act_pipeline.importers.hugging_face.model_config import class_names, model_content
from act_pipeline.importers.hugging_face.preprocessor import input_section
from act_pipeline.importers.hugging_face.safetensors_file import read_safetensors
from act_pipeline.rtdetr.hf_weights import convert_state_dict, paddle_name

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
R18 = SHARED / "models" / "bccd_r18" / "rtdetr_r18vd_bccd.pdparams"
OFFICIAL = SHARED / "official_configs" / "paddledetection" / "rtdetr"


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Random weights of the small model, under PaddleDetection's names."""
    return random_weights(built(SMALL).state_dict())


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("small"), to_transformers(weights))


def built(config: dict[str, Any]) -> Any:
    from act_pipeline.rtdetr.build import build_model

    content = model_content(config, "config.json", len(LABELS))
    return build_model({**content, "eval_size": [SIZE, SIZE], "exclude_post_process": False})


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models that imports have filled, which are not exported."""
    return catch_models(monkeypatch)


# Names that transformers 5.24 wrote, or that the published checkpoints have.
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.backbone.model.embedder.embedder.2.convolution.weight", "backbone.conv1.conv1_3.conv.weight"),
        (
            "model.backbone.model.encoder.stages.0.layers.0.shortcut.normalization.running_var",
            "backbone.res2.res2a.short.norm._variance",
        ),
        (
            "model.backbone.model.encoder.stages.1.layers.0.shortcut.1.convolution.weight",
            "backbone.res3.res3a.short.conv.conv.weight",
        ),
        (
            "model.backbone.model.encoder.stages.2.layers.22.layer.2.normalization.running_mean",
            "backbone.res4.res4b22.branch2c.norm._mean",
        ),
        ("model.backbone.model.embedder.stem2a.convolution.weight", "backbone.stem.stem2a.conv.weight"),
        (
            "model.backbone.model.encoder.stages.2.blocks.0.aggregation.1.normalization.bias",
            "backbone.stages.2.blocks.0.aggregation_excitation_conv.bn.bias",
        ),
        ("model.encoder.encoder.0.layers.0.fc1.weight", "neck.encoder.0.layers.0.linear1.weight"),
        ("model.encoder.aifi.0.layers.0.mlp.fc1.weight", "neck.encoder.0.layers.0.linear1.weight"),
        ("model.encoder.aifi.0.layers.0.self_attn.o_proj.bias", "neck.encoder.0.layers.0.self_attn.out_proj.bias"),
        ("model.encoder.fpn_blocks.1.conv3.norm.weight", "neck.fpn_blocks.1.conv3.bn.weight"),
        (
            "model.decoder.layers.1.encoder_attn.sampling_offsets.bias",
            "transformer.decoder.layers.1.cross_attn.sampling_offsets.bias",
        ),
        ("class_embed.2.weight", "transformer.dec_score_head.2.weight"),
        ("model.decoder.bbox_embed.0.layers.2.bias", "transformer.dec_bbox_head.0.layers.2.bias"),
        ("model.decoder_input_proj.1.1.running_var", "transformer.input_proj.1.norm._variance"),
        ("model.decoder.layers.0.encoder_attn.n_points_scale", None),
        ("model.encoder_input_proj.0.1.num_batches_tracked", None),
    ],
)
def test_a_name_of_transformers_is_paddledetections(theirs: str, ours: str | None) -> None:
    assert paddle_name(theirs, {0: 3, 1: 4, 2: 23, 3: 3}) == ours


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("backbone", ["resnet", "hgnet"])
def test_all_weights_arrive(version: int, backbone: str, weights: dict[str, np.ndarray]) -> None:
    if backbone == "hgnet":
        config = {**SMALL, "backbone_config": HGNET_S, "encoder_in_channels": [256, 512, 1024]}
        weights = random_weights(built(config).state_dict(), 1)
    state = to_transformers(weights, version)
    # transformers also lists the decoder's heads at the top, in files of some versions there alone.
    for name in [name for name in state if name.startswith("model.decoder.class_embed.")]:
        state[name[len("model.decoder.") :]] = state.pop(name) if version == 4 else state[name] + 0
    found = convert_state_dict(state)
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert np.array_equal(found[name], array), name


def test_a_folder_becomes_a_model(folder: Path, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    import paddle

    from act_pipeline.engines import create_engine

    output = tmp_path / "imported"
    model = import_hugging_face(folder, output)
    assert model.directory == output
    record = read_record(output / "export.json", "act_pipeline.export/1")
    assert record["importer"] == "hugging_face" and record["label_list"] == list(LABELS.values())
    described = model.infer_cfg()
    assert described["label_list"] == ["RBC", "WBC", "Platelets"]
    resize, normalize, permute = described["Preprocess"]
    assert resize == {"target_size": [SIZE, SIZE], "keep_ratio": False, "interp": 2, "type": "Resize"}
    assert normalize["norm_type"] == "none" and normalize["is_scale"] is True and permute["type"] == "Permute"

    expected = built(SMALL)
    expected.set_state_dict(weights)
    expected.eval()
    random = np.random.default_rng(0)
    inputs = {
        "image": random.random((2, 3, SIZE, SIZE), np.float32),
        "im_shape": np.full((2, 2), SIZE, np.float32),
        "scale_factor": np.ones((2, 2), np.float32),
    }
    wanted = expected({name: paddle.to_tensor(array) for name, array in inputs.items()})["bbox"].numpy()
    engine = create_engine("paddle_onednn", model, "fp32", "CPU", 2)
    found = engine.run(inputs)["bbox"]
    engine.close()
    assert found.shape == wanted.shape == (40, 6) and wanted[:, 1].std() > 1e-3
    order, wanted_order = (np.lexsort(rows[:, 1:].T.round(3)) for rows in (found, wanted))
    assert np.abs(found[order] - wanted[wanted_order]).max() < 1e-2


def test_the_folder_that_is_written_is_no_one_elses(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(UserError, match="holds mine.txt and no export.json.*choose another --output_dir"):
        import_hugging_face(folder, tmp_path)


def test_half_precision_and_integers_are_read(folder: Path, weights, loaded, tmp_path: Path) -> None:
    state: dict[str, Any] = {
        name: array.astype(np.float16) if index % 2 else (array.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
        for index, (name, array) in enumerate(to_transformers(weights).items())
    }
    state["model.encoder_input_proj.0.1.num_batches_tracked"] = np.array(7, np.int64)
    import_hugging_face(write_folder(tmp_path / "half", state), tmp_path / "out")
    for name, parameter in loaded[0].state_dict().items():
        assert np.allclose(parameter.numpy(), weights[name], atol=1e-3, rtol=1e-2), name


def test_the_second_version_is_the_first_where_it_samples_as_it(weights, loaded, tmp_path: Path) -> None:
    config = {**SMALL, "model_type": "rt_detr_v2", "decoder_offset_scale": 0.25, "decoder_method": "default"}
    state = to_transformers(weights)
    state["model.decoder.layers.0.encoder_attn.n_points_scale"] = np.full(12, 0.25, np.float32)
    import_hugging_face(write_folder(tmp_path / "v2", state, config), tmp_path / "out")
    found = loaded[0].state_dict()
    for name, array in weights.items():
        factor = 0.5 if "sampling_offsets" in name else 1
        assert np.array_equal(found[name].numpy(), array * np.float32(factor)), name


def test_training_without_denoising_leaves_zeros(weights, loaded, tmp_path: Path) -> None:
    state = {name: array for name, array in to_transformers(weights).items() if "denoising" not in name}
    import_hugging_face(write_folder(tmp_path / "plain", state), tmp_path / "out")
    assert not loaded[0].state_dict()["transformer.denoising_class_embed.weight"].numpy().any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "d_fine"}, 'model_type\' is "d_fine", expected rt_detr or rt_detr_v2; .*--onnx'),
        ({"model_type": ["rt_detr"]}, "model_type"),
        ({"decoder_method": "discrete"}, 'decoder_method\' is "discrete", expected "default".*--onnx'),
        ({"decoder_n_levels": 4}, "decoder_n_levels' is 4, expected 3"),
        ({"learn_initial_query": True}, "learn_initial_query"),
        ({"with_box_refine": 1}, "with_box_refine' is 1, expected true"),
        ({"normalize_before": True}, "normalize_before"),
        ({"batch_norm_eps": 1e-3}, "batch_norm_eps' is 0.001, expected 1e-05"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps"),
        ({"feat_strides": [4, 8, 16]}, "feat_strides"),
        ({"use_timm_backbone": True}, "use_timm_backbone"),
        ({"backbone": "resnet50"}, 'backbone\' is "resnet50", expected null'),
        ({"activation_function": "relu"}, "activation_function"),
        ({"encoder_activation_function": "gelu_new"}, "encoder_activation_function"),
        ({"hidden_expansion": "half"}, 'hidden_expansion\' is "half", expected a number'),
        ({"hidden_expansion": float("nan")}, "hidden_expansion"),
        ({"encoder_hidden_dim": 64}, "'encoder_hidden_dim' is 64, .*model.safetensors has 32"),
        ({"encoder_ffn_dim": 1024}, "'encoder_ffn_dim' is 1024, .* has 48"),
        ({"decoder_ffn_dim": 41}, "'decoder_ffn_dim' is 41, .* has 40"),
        ({"d_model": 65536}, "'d_model' is 65536, .* has 32"),
        ({"d_model": 0}, "'d_model' is 0, expected an integer"),
        ({"d_model": True}, "'d_model' is true"),
        ({"decoder_layers": 2}, "'decoder_layers' is 2, .* has 1"),
        ({"encoder_layers": 2}, "'encoder_layers' is 2, .* has 1"),
        ({"decoder_n_points": 8}, "'decoder_n_points' is 8, .* has 4"),
        ({"decoder_attention_heads": 5}, "expected a divisor of the 32 channels"),
        ({"num_queries": 1000}, "num_queries is 1000, but at 64 x 64"),
        ({"encode_proj_layers": [3]}, "encode_proj_layers"),
        ({"anchor_image_size": [640, 640]}, "input size is 64 x 64, key 'anchor_image_size'.*640"),
        ({"id2label": {"0": "RBC", "1": "WBC"}}, "id2label' has 2 names, expected .* '0' to '2'"),
        ({"id2label": {"0": "RBC", "1": "WBC", "3": "Platelets"}}, "id2label' has 3 names"),
        ({"id2label": {"0": "\ud800", "1": "WBC", "2": "Platelets"}}, "id2label"),
        ({"id2label": ["RBC", "WBC", "Platelets"]}, "id2label' has list"),
        ({"backbone_config": 3}, "backbone_config' is 3"),
        ({"backbone_config": {"model_type": "swin"}}, 'model_type is "swin", expected rt_detr_resnet or hgnet_v2'),
        ({"backbone_config": {"depths": [2, 2, 2, 3]}}, 'depths are "bottleneck" \\[2, 2, 2, 3\\]'),
        ({"backbone_config": {"layer_type": "basic"}}, "hidden_sizes are \\[256, 512, 1024, 2048\\]"),
        ({"backbone_config": {"out_indices": [1, 2, 3]}}, "out_indices is \\[1, 2, 3\\]"),
        ({"backbone_config": {"downsample_in_bottleneck": True}}, "downsample_in_bottleneck"),
        ({"backbone_config": {**HGNET_S, "use_learnable_affine_block": True}}, "use_learnable_affine_block"),
        ({"backbone_config": {**HGNET_S, "stage_num_blocks": [1, 1, 3, 1]}}, "none of PP-HGNetV2's S, L, X"),
    ],
)
def test_a_config_of_another_model_ends_in_one_line(changes, words: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, **changes}))
    with pytest.raises(UserError, match=words) as caught:
        import_hugging_face(tmp_path, tmp_path / "out")
    assert "config.json" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.decoder.layers.0.fc2.bias"), "there is nothing for transformer.decoder.layers"),
        (lambda state: state.update(extra=np.ones(1, np.float32)), "extra is no name of an RT-DETR"),
        (
            lambda state: state.update({"model.decoder.more.weight": np.ones(1, np.float32)}),
            "model.decoder.more.weight is no name",
        ),
        (
            lambda state: state.update({"model.enc_output.2.weight": np.ones(1, np.float32)}),
            "model.enc_output.2.weight is not in the model",
        ),
        (
            lambda state: state.update({"model.enc_output.0.bias": np.ones(31, np.float32)}),
            r"model.enc_output.0.bias has \[31\] .* expected \[32\]",
        ),
        (lambda state: state.pop("model.enc_score_head.bias"), "model.enc_score_head.bias is missing"),
        (
            lambda state: state.pop("model.decoder.layers.0.self_attn.k_proj.bias"),
            "in_proj_bias has q, v of shapes",
        ),
        (
            lambda state: state.update(
                {"model.decoder.layers.0.mlp.fc1.bias": state["model.decoder.layers.0.fc1.bias"]}
            ),
            "there a second time",
        ),
    ],
)
def test_weights_of_another_model_end_in_one_line(change, words: str, weights, tmp_path: Path) -> None:
    state = to_transformers(weights)
    change(state)
    with pytest.raises(UserError, match=words) as caught:
        import_hugging_face(write_folder(tmp_path / "model", state), tmp_path / "out")
    assert "model.safetensors" in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "has no model.safetensors"),
        (("pytorch_model.bin",), "pytorch_model.bin is a pickle.*AutoModelForObjectDetection"),
        (("model.safetensors.index.json", "model-00001-of-00002.safetensors"), "several files.*max_shard_size"),
        (("model.safetensors",), "config.json cannot be read"),
    ],
)
def test_a_folder_without_the_two_files_ends_in_one_line(files: tuple[str, ...], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=words):
        import_hugging_face(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="is no folder"):
        import_hugging_face(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1e', "\x00", "{'model_type': 1}"])
def test_a_config_that_is_no_json_object_ends_in_one_line(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        import_hugging_face(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"size": {"shortest_edge": 640}}, None, "'size'"),
        ({"do_resize": False}, None, "'do_resize' false"),
        ({"resample": 5}, None, "'resample' is 5"),
        ({"rescale_factor": 1.0}, None, "'rescale_factor' is 1.0"),
        ({"rescale_factor": float("nan")}, None, "'rescale_factor'"),
        ({"do_normalize": True, "image_std": [1, 0, 1]}, None, "'image_std'"),
        ({"do_normalize": "yes"}, None, "'do_normalize'"),
        ({"do_pad": True, "pad_size": {"height": 128, "width": 128}}, None, "'pad_size'"),
    ],
)
def test_another_preprocessing_ends_in_one_line(changes, size, words: str) -> None:
    with pytest.raises(UserError, match=words):
        input_section({**PREPROCESSOR, **changes}, "preprocessor_config.json", None, size)


def test_the_preprocessing_is_the_models_own() -> None:
    section = input_section({}, "", None, None)
    assert section["inputs_def"]["image_shape"] == [3, 640, 640]
    assert section["sample_transforms"][1]["Resize"]["interp"] == 1  # bilinear
    normalized = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}
    section = input_section({**PREPROCESSOR, **normalized}, "", None, (96, 128))
    assert section["inputs_def"]["image_shape"] == [3, 96, 128]
    assert section["sample_transforms"][2]["NormalizeImage"] == {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.25, 0.5],
        "is_scale": True,
        "norm_type": "mean_std",
    }


def test_class_names_are_those_of_annotation_files() -> None:
    assert class_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, "", 2) is None
    assert class_names({}, "", 2) is None
    from act_pipeline.export import coco_class_names

    coco = coco_class_names()
    darknet = {"couch": "sofa", "tv": "tvmonitor", "motorcycle": "motorbike", "airplane": "aeroplane"}
    darknet.update({"potted plant": "pottedplant", "dining table": "diningtable"})
    labels = {str(index): darknet.get(name, name) for index, name in enumerate(coco)}
    assert class_names({"id2label": labels}, "", 80) == coco
    assert class_names({"id2label": {"0": "sofa", "1": "cat"}}, "", 2) == ["sofa", "cat"]


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes"),
        (b"\x00" * 7, "has 7 bytes"),
        (b"\xff" * 16, "a header of 18446744073709551615 bytes"),
        (struct.pack("<Q", 100) + b"{}", "a header of 100 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"{x", "no JSON"),
        (struct.pack("<Q", 2) + b"[]", "its header is list"),
        (struct.pack("<Q", 2) + b"\xff\xff", "no JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "no JSON"),
        (struct.pack("<Q", 15) + b'{"a": 1,"a": 2}', "twice"),
        (header(a=TENSOR) + b"\x00" * 7, "do not fit"),
        (header(a=TENSOR) + b"\x00" * 9, "9 bytes of data, its header names 8"),
        (header(a=TENSOR, b=TENSOR) + b"\x00" * 8, "begins at byte 0, expected 8"),
        (header(a={**TENSOR, "data_offsets": [4, 12]}) + b"\x00" * 12, "begins at byte 4, expected 0"),
        (header(a={**TENSOR, "data_offsets": [8, 0]}) + b"\x00" * 8, "do not fit"),
        (header(a={**TENSOR, "data_offsets": [-8, 0]}) + b"\x00" * 8, "data_offsets \\[-8, 0\\]"),
        (header(a={**TENSOR, "data_offsets": [0, 8, 8]}) + b"\x00" * 8, "expected lengths"),
        (header(a={**TENSOR, "shape": [2**61, 8]}) + b"\x00" * 8, "do not fit"),
        (header(a={**TENSOR, "shape": [2**70]}) + b"\x00" * 8, "expected lengths"),
        (header(a={**TENSOR, "shape": [0, 2**60], "data_offsets": [0, 0]}), "expected lengths"),
        (header(a={**TENSOR, "shape": [1] * 40 + [2]}) + b"\x00" * 8, "expected lengths"),
        (header(a={**TENSOR, "shape": [2.0]}) + b"\x00" * 8, "expected lengths"),
        (header(a={**TENSOR, "shape": [True, 2]}) + b"\x00" * 8, "expected lengths"),
        (header(a={**TENSOR, "dtype": "F4"}) + b"\x00" * 8, "dtype 'F4', expected one of"),
        (header(a={**TENSOR, "dtype": ["F32"]}) + b"\x00" * 8, "dtype list"),
        (header(a=8) + b"\x00" * 8, "dtype NoneType"),
        (header(a={**TENSOR, "dtype": "F8_E4M3", "data_offsets": [0, 2]}) + b"\x00" * 2, "holds F8_E4M3"),
    ],
)
def test_a_hostile_safetensors_file_ends_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600


def test_safetensors_are_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(path, {"b": values, "scalar": np.array(2.5, np.float32), "count": np.array([3], np.int64)})
    found = read_safetensors(path)
    assert found.keys() == {"b", "scalar"} and np.array_equal(found["b"], values) and found["scalar"] == 2.5
    second = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    first = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(header(second=second, first=first) + np.array([1.0, 2.0], "<f4").tobytes())
    assert {name: array.tolist() for name, array in read_safetensors(path).items()} == {"first": [1], "second": [2]}


@pytest.mark.slow
def test_a_trained_model_detects_the_same_either_way(tmp_path: Path) -> None:
    """R18 of real photographs: its ``.pdparams`` exported, and the same weights as a folder of transformers."""
    if not R18.exists():
        pytest.skip("the trained R18 is not beside this repository")
    import paddle

    from act_pipeline.data import Reader
    from act_pipeline.engines import create_engine
    from act_pipeline.export import export_model

    trained = {name: np.asarray(array, np.float32) for name, array in paddle.load(str(R18), return_numpy=True).items()}
    config = {
        **{key: SMALL[key] for key in ("model_type", "backbone_config", "encoder_in_channels", "id2label")},
        "hidden_expansion": 0.5,
        "decoder_layers": 3,
    }
    folder = write_folder(
        tmp_path / "r18",
        to_transformers(trained),
        config,
        {**PREPROCESSOR, "size": {"height": 640, "width": 640}},
    )
    imported = import_hugging_face(folder, tmp_path / "imported")
    exported = export_model(
        OFFICIAL / "rtdetr_r18vd_6x_coco.yml", tmp_path, [f"weights={R18}", "trt=True", "num_classes=3"]
    )
    assert imported.infer_cfg()["Preprocess"] == [
        {**ours, **theirs}
        for ours, theirs in zip(imported.infer_cfg()["Preprocess"], exported.infer_cfg()["Preprocess"])
    ]
    reader = (
        Reader.load(REPOSITORY / "configs" / "readers" / "sample_reader.yml", ["num_classes=3"])
        .with_input_size(640, 640)
        .with_dataset(
            "eval",
            image_dir="images",
            anno_path="annotations/instances_test.json",
            dataset_dir=str(SHARED / "data" / "bccd"),
        )
    )
    engines = [create_engine("paddle_onednn", model, "fp32", "CPU", 2) for model in (imported, exported)]
    confident = 0
    for batch in list(reader.loader("eval", batch_size=2))[:4]:
        found, wanted = (engine.run(batch)["bbox"] for engine in engines)
        assert np.array_equal(found[:, 0], wanted[:, 0])
        assert np.abs(found[:, 1:] - wanted[:, 1:]).max() < 1e-4
        confident += int((wanted[:, 1] > 0.5).sum())
    for engine in engines:
        engine.close()
    assert confident > 50
