"""The compression config: PaddleSlim's ACT schema, typed and checked before anything runs.

Sections and keys are those of ``paddleslim.auto_compression.strategy_config`` (2.6.0) and of the ``Global`` section of
PaddleSlim's detection example. To add a section, write its dataclass and name it in :class:`Config`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union

from act_pipeline.config.schema import Invalid, Source, build, key, to_mapping
from act_pipeline.config.training import TrainConfig
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME
from act_pipeline.core.defaults import find_shipped
from act_pipeline.core.yaml_files import apply_overrides, load_yaml, parse_override

# The losses of paddleslim.dist that take one teacher and one student tensor, as ACT calls them (`fsp` takes four).
# ACT runs `eval` on this name: nothing but a name known here may reach it.
DistillationLoss = Literal["detection", "soft_label", "l2", "dkd", "skd"]
QuantizeType = Literal["channel_wise_abs_max", "abs_max", "range_abs_max", "moving_average_abs_max"]
CalibrationAlgorithm = Literal["abs_max", "avg", "hist", "mse", "KL"]
JudgingEngine = Literal[
    "auto", "openvino", "onnxruntime", "paddle_trt", "tensorrt", "paddle_onednn", "paddle", "int8_reference"
]
StrategyName = Literal["auto", "ptq", "smooth_quant", "qat_dis"]
WeightedOp = Literal["conv2d", "depthwise_conv2d", "conv2d_transpose", "mul", "matmul", "matmul_v2"]
DEFAULT_CALIBRATION_IMAGES = 200
# paddleslim.quant.quanter: TRANSFORM_PASS_OP_TYPES (ops with weights), then QUANT_DEQUANT_PASS_OP_TYPES.
QuantizableOp = Literal[
    "conv2d",
    "depthwise_conv2d",
    "conv2d_transpose",
    "mul",
    "matmul",
    "matmul_v2",
    "pool2d",
    "elementwise_add",
    "concat",
    "softmax",
    "argmax",
    "transpose",
    "equal",
    "gather",
    "greater_equal",
    "greater_than",
    "less_equal",
    "less_than",
    "mean",
    "not_equal",
    "reshape",
    "reshape2",
    "transpose2",
    "nearest_interp",
    "trilinear_interp",
    "slice",
    "squeeze",
    "elementwise_sub",
    "relu",
    "relu6",
    "leaky_relu",
    "prelu",
    "tanh",
    "swish",
    "dropout",
    "batch_norm",
    "layer_norm",
    "sigmoid",
    "elementwise_mul",
    "elementwise_pow",
    "hard_swish",
    "hard_sigmoid",
    "gru",
    "lstm",
    "pad2d",
    "pad3d",
    "flatten",
    "flatten2",
    "unsqueeze2",
    "flatten_contiguous_range",
    "split",
    "squeeze2",
    "nearest_interp_v2",
    "bilinear_interp",
    "bilinear_interp_v2",
    "fill_constant_batch_size_like",
    "arg_max",
    "abs",
    "assign",
    "cast",
    "clip",
    "box_coder",
    "crop",
    "cumsum",
    "expand_v2",
    "fill_any_like",
    "fill_constant",
    "gelu",
    "instance_norm",
    "lookup_table",
    "lookup_table_v2",
    "norm",
    "p_norm",
    "pow",
    "reduce_mean",
    "stack",
    "top_k_v2",
    "logical_and",
    "logical_not",
    "meshgrid",
    "roi_align",
    "strided_slice",
    "where",
    "grid_sampler",
    "tile",
    "group_norm",
    "reduce_sum",
    "square",
    "softplus",
    "shuffle_channel",
    "reduce_max",
    "scale",
]


@dataclass(frozen=True)
class Global:
    """What is compressed and on which data; paths are resolved by :func:`act_pipeline.core.yaml_files.resolve_path`.

    Attributes:
        reader_config: the reader YAML.
        model_dir: folder of the float inference model.
        model_filename: the program in it.
        params_filename: its parameters.
        include_nms: whether the graph holds its post-process; RT-DETR's does.
        evaluation: whether the model is evaluated while it trains.
        input_list: the model's inputs by the reader's names, or ``{reader's name: model's name}``; None: the model's.
    """

    reader_config: Path
    model_dir: Path
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME
    include_nms: bool = True
    evaluation: bool = key(True, name="Evaluation")
    input_list: Optional[Union[list[str], dict[str, str]]] = None


@dataclass(frozen=True)
class Distillation:
    """ACT's ``Distillation``: the float model teaches the quantized one.

    Attributes:
        loss: one loss, or one a group of nodes. ``detection`` is not ACT's: it compares the scores and the boxes of the
            same queries (`compress.qat.detection_loss`), and finds these by itself.
        node: tensors to compare, in one group or several; empty: the outputs that ACT finds.
        alpha: weight of the loss, or of each group's.
        teacher_model_dir: folder of another teacher; None: the float model itself.
        teacher_model_filename: its program.
        teacher_params_filename: its parameters.
        teacher_cache_mb: the teacher runs outside the training program, in float, and its outputs are kept, so many
            10^6 bytes at most, for when the image comes again. 0: it runs within every step as PaddleSlim has it, the
            inputs of its matmuls rounded. ACT does not know this key.
    """

    loss: Union[DistillationLoss, list[DistillationLoss]] = "l2"
    node: Union[list[list[str]], list[str]] = key(factory=list)
    # ACT takes 0 for "not given" and uses 1.
    alpha: Union[float, list[float]] = key(1.0, above=0)
    teacher_model_dir: Optional[Path] = None
    teacher_model_filename: Optional[str] = None
    teacher_params_filename: Optional[str] = None
    teacher_cache_mb: int = key(512, at_least=0)

    def __post_init__(self) -> None:
        if "detection" in (self.loss if isinstance(self.loss, list) else [self.loss]) and (
            self.node or isinstance(self.loss, list)
        ):
            raise Invalid(
                "loss",
                "is detection, which finds what it compares, beside 'node'; delete 'node', or name soft_label or l2",
            )
        groups = len(self.node) if self.node and isinstance(self.node[0], list) else None
        for name, value in (("loss", self.loss), ("alpha", self.alpha)):
            if groups is None and isinstance(value, list):
                raise Invalid(name, f"is a list of {len(value)}, expected one value: 'node' holds no lists of nodes")
            if groups is not None and (not isinstance(value, list) or len(value) != groups):
                found = f"a list of {len(value)}" if isinstance(value, list) else "one value"
                raise Invalid(name, f"is {found}, expected a list of {groups}: one a list of nodes in 'node'")
        if self.teacher_model_dir is not None:
            for name in ("teacher_model_filename", "teacher_params_filename"):
                if getattr(self, name) is None:
                    raise Invalid(name, "is missing, expected a file name: 'teacher_model_dir' is given; add it")


@dataclass(frozen=True)
class QuantAware:
    """ACT's ``QuantAware``: training with fake quantization. Keys and defaults are PaddleSlim's."""

    quantize_op_types: list[QuantizableOp] = key(
        factory=lambda: ["conv2d", "depthwise_conv2d", "conv2d_transpose", "mul", "matmul", "matmul_v2"]
    )
    weight_bits: int = key(8, at_least=1, at_most=16)
    activation_bits: int = key(8, at_least=1, at_most=16)
    not_quant_pattern: Union[list[str], str] = key(factory=lambda: ["skip_quant"])
    use_pact: bool = False
    activation_quantize_type: QuantizeType = "moving_average_abs_max"
    weight_quantize_type: QuantizeType = "channel_wise_abs_max"
    dtype: Literal["int8"] = "int8"
    window_size: int = key(10000, at_least=1)
    moving_rate: float = key(0.9, above=0, at_most=1)
    for_tensorrt: bool = False
    onnx_format: bool = True
    is_full_quantize: bool = False

    def __post_init__(self) -> None:
        if not self.quantize_op_types:
            raise Invalid("quantize_op_types", "is empty, expected the ops to quantize, conv2d and matmul_v2 say")
        if self.for_tensorrt and self.weight_quantize_type != "channel_wise_abs_max":
            raise Invalid(
                "weight_quantize_type",
                f"is the text '{self.weight_quantize_type}', expected channel_wise_abs_max with for_tensorrt: true",
            )
        if self.for_tensorrt and self.activation_quantize_type not in ("range_abs_max", "moving_average_abs_max"):
            raise Invalid(
                "activation_quantize_type",
                f"is the text '{self.activation_quantize_type}', expected moving_average_abs_max or range_abs_max "
                "with for_tensorrt: true",
            )


@dataclass(frozen=True)
class QuantPost:
    """ACT's ``QuantPost``: post-training quantization. Keys are PaddleSlim's, and ``calib_images`` and ``seed``.

    The defaults of ``algo`` and ``bias_correction`` are not ACT's (``hist``, off): with these the mAP of RT-DETR stayed
    nearest to the float model's, whichever images were drawn.

    Attributes:
        algo: how an activation's threshold is found; see :func:`act_pipeline.calibration.thresholds.threshold`.
        hist_percent: the quantile of ``hist``.
        calib_images: how many images of TrainDataset are run, chosen at random; 100 to 1,000 do.
        batch_nums: ACT's way to say it, in batches; instead of ``calib_images``.
        batch_size: images in a run of the float graph; changes the memory it takes, not the result.
        seed: of the choice of the images.
        bias_correction: whether the mean error that rounded weights make is taken out of the biases.
        weight_quantize_type: ``channel_wise_abs_max``, or ``abs_max`` for one scale a weight.
        quantize_op_types: the ops to quantize.
        not_quant_pattern: name scopes of ops that stay float.
    """

    algo: CalibrationAlgorithm = "mse"
    hist_percent: float = key(0.9999, above=0, at_most=1)
    calib_images: Optional[int] = key(None, at_least=1)
    batch_nums: Optional[int] = key(None, at_least=1)
    batch_size: int = key(4, at_least=1)
    seed: int = key(0, at_least=0)
    bias_correction: bool = True
    weight_quantize_type: Literal["channel_wise_abs_max", "abs_max"] = "channel_wise_abs_max"
    quantize_op_types: list[WeightedOp] = key(
        factory=lambda: ["conv2d", "depthwise_conv2d", "mul", "matmul", "matmul_v2"]
    )
    not_quant_pattern: Union[list[str], str] = key(factory=lambda: ["skip_quant"])
    weight_bits: Literal[8] = 8
    activation_bits: Literal[8] = 8
    onnx_format: Literal[True] = True

    def __post_init__(self) -> None:
        if not self.quantize_op_types:
            raise Invalid("quantize_op_types", "is empty, expected the ops to quantize, conv2d and matmul_v2 say")
        if self.calib_images is not None and self.batch_nums is not None:
            raise Invalid("batch_nums", "is given beside 'calib_images', which says the same in images; delete one")

    @property
    def images(self) -> int:
        """How many calibration images are asked for."""
        if self.batch_nums is not None:
            return self.batch_nums * self.batch_size
        return DEFAULT_CALIBRATION_IMAGES if self.calib_images is None else self.calib_images


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant: activation outliers go into the weights of matmuls that follow a LayerNorm.

    ``alpha``, ``smooth_all_linears`` and ``search_alpha_min`` and ``_max`` are PaddleSlim's
    (``paddleslim.quant.advanced.Smooth``, ``PieceWiseSearch``), which searches if it is given a search function and
    takes 0.5 otherwise.

    Attributes:
        alpha: one for all layers, 0 to 1; None: the best of each layer is searched.
        search_alpha_min: the first to try.
        search_alpha_max: the last to try.
        search_alpha_step: from one to the next; PaddleSlim's is 0.01.
        smooth_all_linears: smooth the matmuls that follow no LayerNorm too; each costs a multiplication.
        min_improvement: the share by which a layer's squared error must fall for it to be smoothed.
        calib_images: how many of the calibration images are looked at.
        sample_rows: how many rows of each activation are kept, one half to choose by and one to measure on.
        seed: decides the choice of the rows.
    """

    alpha: Optional[float] = key(None, at_least=0, at_most=1)
    search_alpha_min: float = key(0.0, at_least=0, at_most=1)
    search_alpha_max: float = key(0.95, at_least=0, at_most=1)
    search_alpha_step: float = key(0.05, above=0)
    smooth_all_linears: bool = False
    min_improvement: float = key(0.2, at_least=0, at_most=1)
    calib_images: int = key(32, at_least=1)
    sample_rows: int = key(1024, at_least=2)
    seed: int = key(0, at_least=0)

    def __post_init__(self) -> None:
        if self.search_alpha_min > self.search_alpha_max:
            raise Invalid(
                "search_alpha_min",
                f"is {self.search_alpha_min}, expected at most search_alpha_max, which is {self.search_alpha_max}",
            )

    @property
    def alphas(self) -> list[float]:
        """What is tried: ``alpha`` alone, or the steps from ``search_alpha_min`` to ``search_alpha_max``, both
        included.
        """
        if self.alpha is not None:
            return [self.alpha]
        steps = int((self.search_alpha_max - self.search_alpha_min) / self.search_alpha_step + 1e-9)
        found = [round(self.search_alpha_min + step * self.search_alpha_step, 6) for step in range(steps + 1)]
        return found if found[-1] == self.search_alpha_max else [*found, self.search_alpha_max]


@dataclass(frozen=True)
class Strategy:
    """Which way to INT8, and how much accuracy it may cost.

    Attributes:
        name: ``ptq``: calibration only. ``smooth_quant``: the same after outliers of activations were moved into the
            weights. ``qat_dis``: training with distillation, PaddleSlim's ACT. ``auto``: these in turn, with ops kept
            float where that is enough, until one is within ``max_drop``.
        engine: what evaluates the float model and the INT8 ones, a name of ``deploy/infer_eval.py --engine``; ``auto``:
            the one that this machine runs INT8 fastest in. ``int8_reference`` computes every Q/DQ in Paddle, which
            nobody deploys, and needs nothing more.
        max_drop: how much lower than the float model's the mAP may be, in [0, 1], absolute; ops are given back to float
            until it holds. None: whatever comes.
        confidence: how sure that must be, in (0, 1): the share of resampled data sets on which the drop is within
            ``max_drop`` (a paired bootstrap over the images of EvalDataset, `evaluation.confidence`). 0.5: the drop
            that is measured decides.
    """

    name: StrategyName = "auto"
    engine: JudgingEngine = "auto"
    max_drop: Optional[float] = key(0.005, at_least=0, at_most=1)
    confidence: float = key(0.5, above=0, below=1)


@dataclass(frozen=True)
class Quantize:
    """Which ops compute in INT8. A pattern is an op type (``matmul_v2``), a part of RT-DETR (``backbone``, ``encoder``,
    ``decoder``, ``head``), an op's name (its output, as ``act.json`` has it) or a glob over module names
    (``transformer.decoder.*.cross_attn.*``).

    Attributes:
        include: only these; empty: all of ``quantize_op_types``.
        exclude: not these.
        weight_only: of the rest, these keep float activations, and their weights are stored in INT8.
    """

    include: list[str] = key(factory=list)
    exclude: list[str] = key(factory=list)
    weight_only: list[str] = key(factory=list)


@dataclass(frozen=True)
class Config:
    """A compression config.

    Attributes:
        path: the YAML file it was read from.
        global_: ``Global``.
        strategy: ``Strategy``, ``auto`` if there is none.
        quantize: which ops compute in INT8.
        distillation: ``Distillation``; ``qat_dis`` needs it.
        quant_aware: ``QuantAware``; ``qat_dis`` needs it.
        train_config: ``TrainConfig``; ``qat_dis`` needs it.
        quant_post: ``QuantPost``; how ``ptq`` and ``smooth_quant`` calibrate.
        smooth_quant: ``SmoothQuant``; what ``smooth_quant`` does before.
        overrides: ``Section.key=value`` each, what was set over the file's values.
    """

    path: Path = key(from_yaml=False)
    global_: Global = key(name="Global")
    strategy: Strategy = key(factory=Strategy, name="Strategy")
    quantize: Quantize = key(factory=Quantize)
    distillation: Optional[Distillation] = key(None, name="Distillation")
    quant_aware: Optional[QuantAware] = key(None, name="QuantAware")
    train_config: Optional[TrainConfig] = key(None, name="TrainConfig")
    quant_post: QuantPost = key(factory=QuantPost, name="QuantPost")
    smooth_quant: SmoothQuant = key(factory=SmoothQuant, name="SmoothQuant")
    overrides: tuple[str, ...] = key((), from_yaml=False)

    def __post_init__(self) -> None:
        sections = self._training_sections()
        begun = self.strategy.name == "auto" and any(section is not None for section in sections.values())
        if self.strategy.name == "qat_dis" or begun:
            for name, section in sections.items():
                if section is None:
                    raise Invalid(name, "is missing, expected a mapping of 'key: value' lines; add it")
        if self.strategy.name == "auto" and not self.global_.evaluation:
            raise Invalid(
                "Strategy.name", "is auto, which needs Global.Evaluation: true; name ptq, smooth_quant or qat_dis"
            )

    @property
    def trains(self) -> bool:
        """Whether the config says how to train."""
        return all(section is not None for section in self._training_sections().values())

    @property
    def op_section(self) -> str:
        """The section whose ``quantize_op_types`` hold: ``QuantAware`` or ``QuantPost``."""
        return "QuantAware" if self.strategy.name == "qat_dis" else "QuantPost"

    @property
    def op_types(self) -> list[str]:
        """The op types that shall compute in INT8, as :attr:`op_section` names them."""
        section = {"QuantAware": self.quant_aware, "QuantPost": self.quant_post}[self.op_section]
        return list(section.quantize_op_types)

    def _training_sections(self) -> dict[str, Any]:
        return {"Distillation": self.distillation, "QuantAware": self.quant_aware, "TrainConfig": self.train_config}

    def to_act(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return what ``paddleslim.auto_compression.AutoCompression`` takes, in dicts of its own (it changes them).

        Returns:
            The strategies, ``{"Distillation": {...}, "QuantAware": {...}}``, and the keys of ``TrainConfig``.
        """
        if self.distillation is None or self.quant_aware is None or self.train_config is None:
            raise ValueError(f"{self.strategy.name} has no training")
        strategies = {"Distillation": to_mapping(self.distillation), "QuantAware": to_mapping(self.quant_aware)}
        strategies["Distillation"].pop("teacher_cache_mb")
        train_config = to_mapping(self.train_config)
        for name in ("snapshot_iter", "patience"):
            train_config.pop(name, None)
        return strategies, train_config

    def as_dict(self) -> dict[str, Any]:
        """Return the whole config, defaults included, in types that JSON has."""
        return {"path": str(self.path), **to_mapping(self)}


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read and check a compression config.

    Args:
        path: a YAML file in ACT's schema; ``configs/...`` of this package too.
        overrides: ``Section.key=value`` each, set over the file's values.

    Raises:
        UserError: the file is no YAML, or a section, key, type or value is not as the schema has it.
    """
    path, overrides = find_shipped(path), list(overrides)
    content = apply_overrides(load_yaml(path), overrides)
    # A section that is named and left empty is there, with its defaults.
    content = {name: {} if value is None else value for name, value in content.items()}
    source = Source(path, tuple(".".join(parse_override(override)[0]) for override in overrides))
    return build(Config, content, source, path=path, overrides=tuple(overrides))
