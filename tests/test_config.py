"""The compression config: PaddleSlim's files unchanged, and a one-line message for every mistake."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest

from act_pipeline.config import Config, load_config
from act_pipeline.config import sections as config_module
from act_pipeline.config.schema import Source, build, key
from act_pipeline.config.training import TrainConfig
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
OFFICIAL = ROOT.parent / "shared" / "official_configs" / "paddleslim"
MODELS = ["r18vd", "r34vd", "r50vd", "r50vd_m", "r101vd", "hgnetv2_l", "hgnetv2_x"]

# The same schema and style as PaddleSlim's RT-DETR files.
ACT_CONFIG = """\
Global:
  reader_config: configs/rtdetr_reader.yml
  include_nms: True
  Evaluation: True
  model_dir: ./rtdetr_r50vd_6x_coco/
  model_filename: model.pdmodel
  params_filename: model.pdiparams

Distillation:
  alpha: 1.0
  loss: soft_label

QuantAware:
  onnx_format: true
  activation_quantize_type: 'moving_average_abs_max'
  quantize_op_types:
  - conv2d
  - depthwise_conv2d
  - matmul_v2

TrainConfig:
  train_iter: 200
  eval_iter: 50
  learning_rate:
    type: CosineAnnealingDecay
    learning_rate: 0.00003
    T_max: 10000
  optimizer_builder:
    optimizer:
      type: SGD
    weight_decay: 4.0e-05
"""


@pytest.fixture()
def act_config(tmp_path: Path) -> Path:
    path = tmp_path / "act.yaml"
    path.write_text(ACT_CONFIG, encoding="utf-8")
    return path


def message_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check_act_config(config: Config, train_iter: int, eval_iter: int) -> None:
    strategies, train = config.to_act()
    assert list(strategies) == ["Distillation", "QuantAware"]
    assert strategies["Distillation"] == {"loss": "soft_label", "node": [], "alpha": 1.0}
    quant = strategies["QuantAware"]
    assert quant["quantize_op_types"] == ["conv2d", "depthwise_conv2d", "matmul_v2"] and quant["onnx_format"] is True
    assert train["train_iter"] == train_iter and train["eval_iter"] == eval_iter
    assert train["learning_rate"] == {"type": "CosineAnnealingDecay", "learning_rate": 3e-05, "T_max": 10000}
    assert train["optimizer_builder"] == {"optimizer": {"type": "SGD"}, "weight_decay": 4e-05}
    assert config.global_.evaluation is True and config.global_.include_nms is True
    assert config.global_.reader_config.name == "rtdetr_reader.yml"


def test_the_schema_of_paddleslim_loads(act_config: Path) -> None:
    check_act_config(load_config(act_config), 200, 50)


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason="PaddleSlim's published configs are not at hand")
@pytest.mark.parametrize(
    "name, train_iter, eval_iter",
    [
        ("r50vd", 500, 100),
        ("r101vd", 200, 50),
        ("hgnetv2_l", 200, 50),
        ("hgnetv2_x", 500, 100),
    ],
)
def test_paddleslims_own_files_load_unchanged(name: str, train_iter: int, eval_iter: int) -> None:
    config = load_config(OFFICIAL / f"rtdetr_{name}_qat_dis.yaml")
    check_act_config(config, train_iter, eval_iter)
    assert config.global_.model_dir == Path(f"rtdetr_{name}_6x_coco")


@pytest.mark.parametrize("name", MODELS)
def test_ready_configs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs" / "act" / f"rtdetr_{name}_qat_dis.yaml")
    check_act_config(config, config.train_config.train_iter, config.train_config.eval_iter)
    assert config.global_.reader_config == ROOT / "configs" / "readers" / "rtdetr_reader.yml"
    assert config.global_.model_dir.parts[-2:] == ("output", f"rtdetr_{name}_6x_coco")


def test_what_act_gets_is_what_paddleslim_takes(act_config: Path) -> None:
    """Keys and defaults are compared with the installed paddleslim, so that they cannot diverge."""
    strategy_config = pytest.importorskip("paddleslim.auto_compression.strategy_config")
    from paddleslim.auto_compression.config_helpers import extract_strategy_config

    strategies, train = load_config(act_config).to_act()
    made = extract_strategy_config(strategies)
    assert set(made) == {"Distillation", "QuantAware"}
    assert strategy_config.TrainConfig(**train).train_iter == 200
    for ours, theirs in (
        (config_module.QuantAware, strategy_config.QuantAware),
        (config_module.Distillation, strategy_config.Distillation),
        (TrainConfig, strategy_config.TrainConfig),
    ):
        default = theirs()
        attributes = {name: value for name, value in vars(default).items() if name != "name"}
        own = {"snapshot_iter", "patience", "teacher_cache_mb"}  # not an ACT key
        assert {field.name for field in dataclasses.fields(ours)} - own == set(attributes)
        if ours is not TrainConfig:
            assert {name: getattr(ours(), name) for name in attributes} == attributes
    quanter = sys.modules["paddleslim.quant.quanter"]
    known = {*quanter.TRANSFORM_PASS_OP_TYPES, *quanter.QUANT_DEQUANT_PASS_OP_TYPES}
    assert set(typing.get_args(config_module.QuantizableOp)) == known
    assert set(typing.get_args(config_module.QuantizeType)) == set(quanter.WEIGHT_QUANTIZATION_TYPES)


def test_act_may_change_its_dicts(act_config: Path) -> None:
    config = load_config(act_config)
    first = config.to_act()
    first[1]["learning_rate"].pop("type")
    first[0]["QuantAware"]["quantize_op_types"].clear()
    assert config.to_act()[1]["learning_rate"]["type"] == "CosineAnnealingDecay"
    assert config.to_act()[0]["QuantAware"]["quantize_op_types"]


@pytest.mark.parametrize(
    ("strategy", "section", "types"),
    [
        ("qat_dis", "QuantAware", ["conv2d", "depthwise_conv2d", "matmul_v2"]),
        ("ptq", "QuantPost", ["matmul"]),
        ("smooth_quant", "QuantPost", ["matmul"]),
        ("auto", "QuantPost", ["matmul"]),
    ],
)
def test_which_section_names_the_types_of_ops(act_config: Path, strategy: str, section: str, types: list[str]) -> None:
    config = load_config(act_config, [f"Strategy.name={strategy}", "QuantPost.quantize_op_types=[matmul]"])
    assert config.op_section == section and config.op_types == types


def test_the_record_is_json_with_the_defaults(act_config: Path) -> None:
    record = json.loads(json.dumps(load_config(act_config).as_dict()))
    assert record["path"] == str(act_config)
    assert record["Global"]["Evaluation"] is True and record["QuantAware"]["weight_bits"] == 8
    assert record["TrainConfig"]["logging_iter"] == 10


def test_numbers_are_of_the_type_that_act_asserts(act_config: Path) -> None:
    config = load_config(
        act_config,
        [
            "Distillation.alpha=2",
            "TrainConfig.learning_rate=1",
            "QuantAware.moving_rate=1",
            "TrainConfig.optimizer_builder.weight_decay=1e-5",
        ],
    )
    assert type(config.distillation.alpha) is float
    assert type(config.train_config.learning_rate) is float
    assert type(config.quant_aware.moving_rate) is float
    assert config.train_config.optimizer_builder.weight_decay == 1e-5


def test_other_forms_that_act_has(act_config: Path) -> None:
    config = load_config(
        act_config,
        [
            "Global.input_list={image: x, scale_factor: y}",
            "Distillation.node=[[a, b], [c]]",
            "Distillation.loss=[l2, soft_label]",
            "Distillation.alpha=[1, 0.5]",
            "QuantAware.not_quant_pattern=skip",
            "TrainConfig.optimizer_builder.grad_clip={type: ClipGradByGlobalNorm, clip_norm: 1.0}",
            "TrainConfig.learning_rate={type: PiecewiseDecay, boundaries: [4500], values: [0.005, 0.0005]}",
        ],
    )
    strategies, train = config.to_act()
    assert strategies["Distillation"]["node"] == [["a", "b"], ["c"]]
    assert strategies["Distillation"]["alpha"] == [1.0, 0.5]
    assert train["optimizer_builder"]["grad_clip"] == {"type": "ClipGradByGlobalNorm", "clip_norm": 1.0}
    assert config.global_.input_list == {"image": "x", "scale_factor": "y"}
    assert load_config(act_config, ["Global.input_list=[image]"]).global_.input_list == ["image"]


def test_paths_are_resolved(act_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (act_config.parent / "teacher").mkdir()
    monkeypatch.chdir("/")
    config = load_config(
        act_config,
        [
            "Distillation.teacher_model_dir=teacher",
            "Distillation.teacher_model_filename=model.pdmodel",
            "Distillation.teacher_params_filename=model.pdiparams",
        ],
    )
    assert config.distillation.teacher_model_dir == act_config.parent / "teacher"
    assert config.to_act()[0]["Distillation"]["teacher_model_dir"] == str(act_config.parent / "teacher")


@pytest.mark.parametrize(
    "line, replacement, parts",
    [
        (
            "  train_iter: 200",
            "  train_itr: 200",
            [
                "{path}: TrainConfig.train_itr is not a known key",
                "expected one of epochs, train_iter",
                "did you mean 'train_iter'?",
            ],
        ),
        ("QuantAware:", "QuantAwar:", ["{path}: QuantAwar is not a known key", "did you mean 'QuantAware'?"]),
        ("  loss: soft_label", "  los: soft_label", ["Distillation.los is not a known key", "did you mean 'loss'?"]),
        (
            "  Evaluation: True",
            "  evaluation: True",
            ["Global.evaluation is not a known key", "did you mean 'Evaluation'?"],
        ),
        (
            "  train_iter: 200",
            "  train_iter: many",
            ["{path}: TrainConfig.train_iter is the text 'many', expected a whole number at least 1"],
        ),
        ("  train_iter: 200", "  train_iter: '200'", ["is the text '200'", "write it without quotes"]),
        (
            "  train_iter: 200",
            "  train_iter: 2.5",
            ["TrainConfig.train_iter is the number 2.5, expected a whole number"],
        ),
        (
            "  train_iter: 200",
            "  train_iter: 0",
            ["TrainConfig.train_iter is the number 0, expected a whole number at least 1"],
        ),
        ("  train_iter: 200", "  train_iter: true", ["is the boolean true, expected a whole number"]),
        ("  train_iter: 200", "  train_iter:", ["TrainConfig.train_iter is missing, and so is 'epochs'"]),
        (
            "  train_iter: 200",
            "  train_iter: 200\n  sharding_config: {stage: 2}",
            ["TrainConfig.sharding_config is for Paddle's"],
        ),
        (
            "  onnx_format: true",
            "  onnx_format: 'true'",
            ["QuantAware.onnx_format is the text 'true', expected true or false; write it without quotes"],
        ),
        ("  onnx_format: true", "  onnx_format: 1", ["QuantAware.onnx_format is the number 1, expected true or false"]),
        ("  onnx_format: true", "  weight_bits: 80", ["QuantAware.weight_bits is the number 80", "at most 16"]),
        (
            "  onnx_format: true",
            "  moving_rate: .inf",
            ["QuantAware.moving_rate is the number inf, expected a finite number"],
        ),
        (
            "  onnx_format: true",
            "  for_tensorrt: true\n  weight_quantize_type: abs_max",
            ["QuantAware.weight_quantize_type is the text 'abs_max', expected channel_wise_abs_max with for_tensorrt"],
        ),
        (
            "  activation_quantize_type: 'moving_average_abs_max'",
            "  activation_quantize_type: moving_avg_abs_max",
            ["QuantAware.activation_quantize_type", "did you mean 'moving_average_abs_max'?"],
        ),
        (
            "  - matmul_v2",
            "  - matmul_v3",
            ["QuantAware.quantize_op_types[2] is the text 'matmul_v3'", "did you mean 'matmul_v2'?"],
        ),
        (
            "  loss: soft_label",
            "  loss: soft_lable",
            ["Distillation.loss is the text 'soft_lable'", "did you mean 'soft_label'?"],
        ),
        (
            "  loss: soft_label",
            "  loss: __import__('os').getcwd",
            ["Distillation.loss is the text", "expected one of detection"],
        ),
        ("  loss: soft_label", "  loss: [l2]", ["Distillation.loss is a list of 1, expected one value"]),
        ("  alpha: 1.0", "  alpha: 0", ["Distillation.alpha is the number 0, expected a number above 0"]),
        (
            "  alpha: 1.0",
            "  node: [[a], [b]]\n  alpha: [1.0]",
            ["Distillation.loss is one value, expected a list of 2"],
        ),
        ("  alpha: 1.0", "  node: [a, 1]", ["Distillation.node[1] is the number 1, expected text"]),
        ("  alpha: 1.0", "  teacher_model_dir: t", ["Distillation.teacher_model_filename is missing"]),
        ("  model_dir: ./rtdetr_r50vd_6x_coco/", "", ["{path}: Global.model_dir is missing, expected a path; add it"]),
        (
            "  model_dir: ./rtdetr_r50vd_6x_coco/",
            "  model_dir: 5",
            ["Global.model_dir is the number 5, expected a path"],
        ),
        (
            "    T_max: 10000",
            "    T_maxx: 10000",
            [
                "TrainConfig.learning_rate.T_maxx is not an argument of paddle.optimizer.lr.CosineAnnealingDecay",
                "did you mean 'T_max'?",
            ],
        ),
        (
            "    T_max: 10000",
            "    T_max: soon",
            ["{path}: TrainConfig.learning_rate is refused by paddle.optimizer.lr.Cosine"],
        ),
        (
            "    type: CosineAnnealingDecay",
            "    type: CosineAnealingDecay",
            ["TrainConfig.learning_rate.type", "did you mean 'CosineAnnealingDecay'?"],
        ),
        (
            "    type: CosineAnnealingDecay",
            "    type: ReduceOnPlateau",
            ["TrainConfig.learning_rate.type is the text 'ReduceOnPl"],
        ),
        (
            "      type: SGD",
            "      type: Adamm",
            ["TrainConfig.optimizer_builder.optimizer.type", "did you mean 'Adam'?"],
        ),
        (
            "      type: SGD",
            "      type: Momentum\n      momentun: 0.9",
            ["optimizer_builder.optimizer.momentun is not an argument", "did you mean 'momentum'?"],
        ),
        (
            "      type: SGD",
            "      type: SGD\n      learning_rate: 1.0",
            ["optimizer.learning_rate is given to SGD by the keys around"],
        ),
        (
            "    weight_decay: 4.0e-05",
            "    weight_deca: 4.0e-05",
            ["optimizer_builder.weight_deca is not", "did you mean 'weight_decay'?"],
        ),
        (
            "    weight_decay: 4.0e-05",
            "    regularizer: {type: L2Decay, coef: 1}",
            ["optimizer_builder.regularizer.coef is not an arg"],
        ),
        (
            "    weight_decay: 4.0e-05",
            "    grad_clip: {type: ClipByNorm}",
            ["grad_clip.type is the text 'ClipByNorm'", "ClipGradByNorm"],
        ),
        ("Distillation:", "Quantization: {}\n\nDistillation:", ["Quantization is not a known key", "QuantAware"]),
        ("  eval_iter: 50", "  eval_iter: 50\n  eval_iter: 60", ["key 'eval_iter' is given a second time"]),
    ],
)
def test_mistakes_get_one_line(act_config: Path, line: str, replacement: str, parts: list[str]) -> None:
    assert ACT_CONFIG.count(line + "\n") == 1
    act_config.write_text(ACT_CONFIG.replace(line + "\n", replacement + "\n"), encoding="utf-8")
    message = message_of(act_config)
    assert str(act_config) in message
    for part in parts:
        assert part.format(path=act_config) in message


def test_a_section_of_another_kind_and_a_missing_one(act_config: Path) -> None:
    others = ACT_CONFIG[ACT_CONFIG.index("Distillation:") :]
    act_config.write_text("Global: configs/reader.yml\n" + others, encoding="utf-8")
    assert "Global is the text 'configs/reader.yml', expected a mapping of 'key: value' lines" in message_of(act_config)
    act_config.write_text(ACT_CONFIG[: ACT_CONFIG.index("TrainConfig:")], encoding="utf-8")
    assert f"{act_config}: TrainConfig is missing" in message_of(act_config)


def test_a_mistake_on_the_command_line_is_named_as_one(act_config: Path) -> None:
    assert message_of(act_config, "TrainConfig.train_itr=3").startswith("-o TrainConfig.train_itr is not a known key")
    assert message_of(act_config, "TrainConfig.train_iter=x").startswith("-o TrainConfig.train_iter is the text 'x'")
    assert message_of(act_config, "QuantAware.quantize_op_types=[x]").startswith("-o QuantAware.quantize_op_types[0]")
    assert message_of(act_config, "Sectoin.a=1").startswith("-o Sectoin.a: Sectoin is not a known key")
    # A mistake in the file is still reported for the file.
    act_config.write_text(ACT_CONFIG.replace("alpha: 1.0", "alpha: x"), encoding="utf-8")
    assert message_of(act_config, "TrainConfig.train_iter=3").startswith(f"{act_config}: Distillation.alpha")


def period_of(path: Path, *overrides: str) -> int:
    return load_config(path, overrides).to_act()[1]["learning_rate"]["T_max"]


def test_a_cosine_schedule_lasts_as_long_as_the_training(act_config: Path, caplog: pytest.LogCaptureFixture) -> None:
    act_config.write_text(ACT_CONFIG.replace("    T_max: 10000\n", ""), encoding="utf-8")
    assert period_of(act_config) == 200
    assert period_of(act_config, "TrainConfig.train_iter=60") == 60
    assert period_of(act_config, "TrainConfig.train_iter=60", "TrainConfig.learning_rate.T_max=80") == 80
    epochs = ["TrainConfig.train_iter=null", "TrainConfig.epochs=2"]
    assert "TrainConfig.learning_rate.T_max is missing, expected the argument" in message_of(act_config, *epochs)
    for path in ("sample.yml", "custom.yml", "auto/rtdetr_r50vd.yaml"):
        assert period_of(CONFIGS / path, "TrainConfig.train_iter=7") == 7
    assert not caplog.messages


def test_a_period_that_an_override_leaves_behind_is_named(act_config: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert period_of(act_config, "TrainConfig.train_iter=60") == 10000 and not caplog.messages  # PaddleSlim's own
    act_config.write_text(ACT_CONFIG.replace("T_max: 10000", "T_max: 200"), encoding="utf-8")
    assert period_of(act_config) == 200 and not caplog.messages
    assert period_of(act_config, "TrainConfig.train_iter=60", "TrainConfig.learning_rate.T_max=60") == 60
    assert not caplog.messages
    assert period_of(act_config, "TrainConfig.train_iter=60") == 200
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(
        f"{act_config}: TrainConfig.learning_rate.T_max is 200, as train_iter in the file, but train_iter is set to 60"
    )


def test_a_new_section_is_one_dataclass(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Extra:
        rate: float = key(0.5, at_least=0)

    Extended = dataclasses.make_dataclass(
        "Extended", [("extra", Extra, key(factory=Extra, name="Extra")), ("max_drop", float, key(0.005, at_least=0))]
    )
    source = Source(tmp_path / "c.yaml")
    assert build(Extended, {"Extra": {"rate": 1}}, source) == Extended(Extra(1.0))
    assert build(Extended, {"Extra": None, "max_drop": 0.1}, source) == Extended(Extra(), 0.1)
    with pytest.raises(UserError, match="max_drop is the number -1, expected a number at least 0"):
        build(Extended, {"max_drop": -1}, source)
    with pytest.raises(UserError, match="Extra.rat is not a known key, expected one of rate; did you mean 'rate'?"):
        build(Extended, {"Extra": {"rat": 1}}, source)
