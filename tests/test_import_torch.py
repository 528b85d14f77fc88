"""Checkpoints of lyuwenyu/RT-DETR become models of this project; no code in them runs."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from import_fixtures import catch_models
from transformers_fixtures import HGNET_S, SMALL, random_weights, to_lyuwenyu, write_pickle, write_pth

from act_pipeline.core.errors import UserError
from act_pipeline.importers.hugging_face.model_config import model_content
from act_pipeline.importers.torch_file import TorchFile
from act_pipeline.importers.torch_weights import import_torch_checkpoint

REAL = Path(__file__).parent / "data" / "torch" / "small.pth"
PROTO = b"\x80\x02"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A PaddleDetection config of a small model."""
    path = tmp_path_factory.mktemp("config") / "small.yml"
    path.write_text(yaml.safe_dump({**model_content(SMALL, "", 3), "eval_size": [64, 64]}))
    return path


@pytest.fixture(scope="module")
def weights(config: Path) -> dict[str, np.ndarray]:
    from act_pipeline.rtdetr.build import build_model

    return random_weights(build_model(config).state_dict())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models that imports have filled, which are not exported."""
    return catch_models(monkeypatch)


def assert_weights(model: Any, weights: dict[str, np.ndarray]) -> None:
    found = model.state_dict()
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert np.array_equal(found[name].numpy(), array), name


def test_a_file_of_pytorch_is_read() -> None:
    """``small.pth`` is of torch 2.13: a whole training checkpoint, with tensors of several kinds in ``ema``."""
    with TorchFile(REAL) as file:
        assert list(file.content) == ["date", "last_epoch", "model", "optimizer", "lr_scheduler", "ema", "scaler"]
        assert file.content["lr_scheduler"]["milestones"] == {1000: 1}
        tensors = file.content["ema"]["module"]
        assert file.read(tensors["conv.weight"]).tolist() == (np.arange(6).reshape(3, 2, 1, 1) / 4).tolist()
        assert file.read(tensors["norm.running_mean"]).tolist() == [1, 2, 3]
        assert file.read(tensors["half"]).tolist() == [0.5, -2]
        assert file.read(tensors["bf"]).tolist() == [[1.5, 3]]
        assert file.read(tensors["turned"]).tolist() == [[0, 3], [1, 4], [2, 5]]
        assert file.read(tensors["channels_last"]).tolist() == np.arange(24).reshape(1, 2, 3, 4).tolist()
        assert file.read(tensors["param"]).tolist() == [7]
        with pytest.raises(UserError, match="a weight holds int64"):
            file.read(tensors["norm.num_batches_tracked"])


@pytest.mark.parametrize("version", [1, 2])
def test_all_weights_arrive(version: int, config: Path, weights, loaded, tmp_path: Path) -> None:
    state = OrderedDict(to_lyuwenyu(weights, version))
    state["encoder.input_proj.0.1.num_batches_tracked"] = np.array(3)
    state["decoder.anchors"] = np.ones((1, 84, 4), np.float32)
    if version == 2:
        state["decoder.decoder.layers.0.cross_attn.num_points_scale"] = np.full(12, 0.25, np.float32)
    path = write_pth(tmp_path / "model.pth", {"model": {"a": np.zeros(1, np.float32)}, "ema": {"module": state}})
    import_torch_checkpoint(path, config, tmp_path / "out")
    assert_weights(loaded[0], weights)


def test_the_names_of_hgnetv2_arrive(loaded, tmp_path: Path) -> None:
    from act_pipeline.rtdetr.build import build_model

    small = {**SMALL, "backbone_config": HGNET_S, "encoder_in_channels": [256, 512, 1024]}
    path = tmp_path / "hgnet.yml"
    path.write_text(yaml.safe_dump({**model_content(small, "", 3), "eval_size": [64, 64]}))
    weights = random_weights(build_model(path).state_dict())
    checkpoint = write_pth(tmp_path / "model.pth", {"ema": None, "model": to_lyuwenyu(weights, 2)})
    import_torch_checkpoint(checkpoint, path, tmp_path / "out")
    assert_weights(loaded[0], weights)


def test_weights_alone_and_of_several_gpus_arrive(config: Path, weights, loaded, tmp_path: Path) -> None:
    state = {f"module.{name}": array for name, array in to_lyuwenyu(weights).items()}
    import_torch_checkpoint(write_pth(tmp_path / "model.pth", state), config, tmp_path / "out")
    assert_weights(loaded[0], weights)


def test_the_second_version_is_named(config: Path, weights, loaded, tmp_path: Path, caplog) -> None:
    state = to_lyuwenyu(weights, 2)
    scale = "decoder.decoder.layers.0.cross_attn.num_points_scale"
    path = write_pth(tmp_path / "model.pth", {"model": {**state, scale: np.full(12, 0.25, np.float32)}})
    import_torch_checkpoint(path, config, tmp_path / "out")
    assert "RT-DETRv2" in caplog.text and "'discrete'" in caplog.text
    different = np.array([1 / 3] * 3 + [1 / 6] * 6 + [1 / 3] * 3, np.float32)
    path = write_pth(tmp_path / "model.pth", {"model": {**state, scale: different}})
    with pytest.raises(UserError, match="different numbers of points"):
        import_torch_checkpoint(path, config, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("decoder.enc_output.0.bias"), "there is nothing for transformer.enc_output.0.bias"),
        (lambda state: state.update(extra=np.ones(1, np.float32)), "extra is not in the model"),
        (
            lambda state: state.update({"decoder.enc_output.0.bias": np.ones(3, np.float32)}),
            r"decoder.enc_output.0.bias is \[3\], expected \[32\]",
        ),
        (
            lambda state: state.update({"decoder.enc_score_head.bias": np.ones(80, np.float32)}),
            r"has \[80\] classes, .* has num_classes 3; set num_classes",
        ),
        (
            lambda state: state.update({"decoder.enc_output.proj.bias": np.ones(32, np.float32)}),
            "are one weight",
        ),
        (
            lambda state: state.update({"decoder.denoising_class_embed.weight": np.ones((2, 32), np.float32)}),
            r"denoising_class_embed.weight is \[2, 32\], expected \[3, 32\]",
        ),
        (
            lambda state: state.update({"decoder.enc_output.0.bias": np.ones(32, np.int64)}),
            "holds int64, expected floating-point",
        ),
    ],
)
def test_weights_of_another_model_end_in_one_line(change, words, config, weights, loaded, tmp_path: Path) -> None:
    state = to_lyuwenyu(weights)
    change(state)
    path = write_pth(tmp_path / "model.pth", {"model": state})
    with pytest.raises(UserError, match=words) as caught:
        import_torch_checkpoint(path, config, tmp_path / "out")
    assert "model.pth" in str(caught.value)


@pytest.mark.parametrize("content", [{"optimizer": {}}, {}, [], "text", 3, {"model": 3}, {"model": {1: np.ones(1)}}])
def test_a_checkpoint_without_weights_ends_in_one_line(content: Any, config: Path, tmp_path: Path) -> None:
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = {"model": {1: np.ones(1, np.float32)}}
    path = write_pth(tmp_path / "model.pth", content)
    with pytest.raises(UserError, match="expected the weights of lyuwenyu/RT-DETR under 'ema' or 'model'"):
        import_torch_checkpoint(path, config, tmp_path / "out")


def test_a_config_of_pytorch_is_told_from_paddledetections(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "rtdetr_r18vd_6x_coco.yml"
    path.write_text("__include__: ['./include/rtdetr_r50vd.yml']\nPResNet: {depth: 18}\n")
    with pytest.raises(UserError, match="is a config of lyuwenyu/RT-DETR, expected PaddleDetection's"):
        import_torch_checkpoint(REAL, path, tmp_path / "out")


class Harmful:
    """Writes a file when it is unpickled by Python."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_code_in_a_checkpoint_runs(protocol: int, config: Path, tmp_path: Path) -> None:
    data = pickle.dumps({"model": Harmful(tmp_path / "touched")}, protocol)
    path = write_pickle(tmp_path / "model.pth", data)
    with pytest.raises(UserError, match=r"expected weights, numbers and text only.*torch.save"):
        import_torch_checkpoint(path, config, tmp_path / "out")
    assert not (tmp_path / "touched").exists()
    pickle.loads(data)
    assert (tmp_path / "touched").exists()  # so the pickle was harmful


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor_pickle(shape: bytes, stride: bytes, offset: bytes = b"K\x00", key: bytes = b"X\x01\x00\x00\x000") -> bytes:
    """Return a pickle of one tensor of 4 values."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + key + b"X\x03\x00\x00\x00cpuK\x04tQ"
    return PROTO + TENSOR + b"(" + storage + offset + shape + stride + b"\x89)tR."


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (PROTO, "damaged"),
        (PROTO + b".", "damaged"),
        (PROTO + b"}", "damaged"),
        (PROTO + b"tttt.", "damaged"),
        (PROTO + b"}u.", "damaged"),
        (PROTO + b"}}}s.", "a key is dict"),
        (PROTO + b"N" + b"\x85" * 100_000 + b"Ns.", "damaged"),
        (PROTO + b"}N" + b"\x85" * 100_000 + b"Ns.", "a key is tuple"),
        (PROTO + b"h\x05.", "damaged"),
        (PROTO + b"Nr\xff\xff\xff\xff.", "holds NoneType"),  # a memo of four thousand million entries
        (PROTO + b"X\xff\xff\xff\x7fa.", "damaged"),
        (PROTO + b"NNa.", "fills a NoneType"),
        (PROTO + b"K\x01)R.", "calls what is no function"),
        (PROTO + b"ccollections\nOrderedDict\n(K\x01tR.", "made of something else"),
        (PROTO + TENSOR + b")R.", "damaged"),
        (PROTO + TENSOR + b"}b.", "damaged"),
        (PROTO + b"cbuiltins\neval\n.", "holds builtins.eval"),
        (PROTO + b"ctorch\nload\n.", "holds torch.load"),
        (PROTO + b"c__builtin__\ngetattr\n.", "holds __builtin__.getattr"),
        (PROTO + b"\x82\x01.", "holds the instruction EXT1"),
        (PROTO + b"(cos\nsystem\no.", "holds os.system"),
        (b"(ios\nsystem\n.", "holds the instruction INST"),
        (PROTO + b"K\x01Q.", "damaged"),
        (PROTO + b"(NNNNNtQ.", "damaged"),
        (tensor_pickle(b"K\x05\x85", b"K\x01\x85"), r"shape \[5\] goes beyond the 4 values"),
        (tensor_pickle(b"K\x02\x85", b"K\x04\x85"), "goes beyond"),
        (tensor_pickle(b"K\x02\x85", b"K\x01\x85", b"K\x03"), "goes beyond"),
        (tensor_pickle(b"K\x05\x85", b"K\x00\x85"), "goes beyond"),
        (tensor_pickle(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "no storage, offset, shape or stride"),
        (tensor_pickle(b"K\x02\x85", b"K\x01K\x01\x86"), "1 dimensions and 2 strides"),
        (tensor_pickle(b"K\x02\x85", b"K\x01\x85", key=b"X\x06\x00\x00\x00../../"), "no number"),
    ],
)
def test_a_hostile_pickle_ends_in_one_line(data: bytes, words: str, config: Path, tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "model.pth", data, _0=struct.pack("<4f", 1, 2, 3, 4))
    with pytest.raises(UserError, match=words) as caught:
        import_torch_checkpoint(path, config, tmp_path / "out")
    assert "model.pth" in str(caught.value) and len(str(caught.value)) < 700


def test_a_damaged_zip_ends_in_one_line(tmp_path: Path) -> None:
    whole = write_pickle(
        tmp_path / "whole.pth", tensor_pickle(b"K\x02\x85", b"K\x02\x85"), _0=struct.pack("<4f", *range(4))
    )
    with TorchFile(whole) as file:
        assert file.read(file.content).tolist() == [0, 2]
    content = whole.read_bytes()
    path = tmp_path / "model.pth"
    for damaged, words in (
        (b"", "no checkpoint in PyTorch's zip format"),
        (content[: len(content) // 2], "no checkpoint in PyTorch's zip format"),
        (pickle.dumps({"model": 1}), "no checkpoint in PyTorch's zip format"),
        (
            content.replace(b"\x80\x02ctorch", b"\x80\x02cporch", 1),
            "data.pkl in the zip is not as torch.save writes it",
        ),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            TorchFile(path)
    with pytest.raises(UserError, match="cannot be read"):
        TorchFile(tmp_path / "none.pth")
    write_pth(path, {"a": np.zeros(4, np.float32)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="it is compressed"):
        TorchFile(path)
    for members, words in (({}, "no item"), ({"_0": b"123"}, "it has 3 bytes, expected 16")):
        write_pickle(path, tensor_pickle(b"K\x02\x85", b"K\x02\x85"), **members)
        with TorchFile(path) as file, pytest.raises(UserError, match=words):
            file.read(file.content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    with pytest.raises(UserError, match="2 files data.pkl, expected one"):
        TorchFile(path)
