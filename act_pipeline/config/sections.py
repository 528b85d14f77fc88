"""The sections of a compression config, by PaddleSlim's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

from act_pipeline.config.schema import Invalid, key
from act_pipeline.core.artifacts import MODEL_FILENAME, PARAMS_FILENAME, InferenceModel

# `detection`, and the losses of paddleslim.dist that ACT can call with one teacher and one student tensor (`fsp` takes
# four tensors). ACT runs `eval` on this name, so only names listed here may reach it.

DistillationLoss = Literal["detection", "soft_label", "l2", "dkd", "skd"]
QuantizeType = Literal["channel_wise_abs_max", "abs_max", "range_abs_max", "moving_average_abs_max"]
CalibrationAlgorithm = Literal["abs_max", "avg", "hist", "mse", "mce", "KL"]
JudgingEngine = Literal[
    "auto", "openvino", "onnxruntime", "paddle_trt", "tensorrt", "paddle_onednn", "paddle", "int8_reference"
]
PlacementName = Literal["all", "measured"]
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
    """Model and data of a compression; paths are resolved by :func:`act_pipeline.core.yaml_files.resolve_path`.

    Attributes:
        reader_config: the reader's YAML file.
        model_dir: folder of the float inference model.
        model_filename: file name of the program in ``model_dir``.
        params_filename: file name of the parameters in ``model_dir``.
        arch: the detector family (``act_pipeline.families``), or one of PaddleSlim's names such as ``YOLOv5``; None: as
            ``infer_cfg.yml`` and the model's outputs say.
        include_nms: PaddleSlim's key, without an effect: the model's outputs decide whether NMS is left to do.
        evaluation: whether the float model and the INT8 models are evaluated; ``auto`` needs it. ``agreement``: they
            are compared by their agreement only, without labels, as where EvalDataset is a folder of images (ACT has
            true and false).
        input_list: the model's inputs by the reader's names, or ``{reader's name: model's name}``; None: the model's
            own names.
    """

    reader_config: Path
    model_dir: Path
    model_filename: str = MODEL_FILENAME
    params_filename: str = PARAMS_FILENAME
    arch: Optional[str] = None
    include_nms: bool = True
    evaluation: Union[bool, Literal["agreement"]] = key(True, name="Evaluation")
    input_list: Optional[Union[list[str], dict[str, str]]] = None


@dataclass(frozen=True)
class Distillation:
    """ACT's ``Distillation``: the float model is the teacher of the quantized one.

    Attributes:
        loss: one loss, or a list with one loss for each group of ``node``. ``detection`` is not in ACT: it compares the
            scores and boxes of the same queries, or before NMS (`compress.qat.detection_loss`), and finds their tensors
            itself.
        node: names of the tensors to compare, in one group or a list of groups; empty: the outputs that ACT finds.
        alpha: weight of the loss, or a list with one weight for each group; above 0.
        teacher_model_dir: folder of a different teacher; None: the float model.
        teacher_model_filename: file name of the teacher's program.
        teacher_params_filename: file name of the teacher's parameters.
        teacher_cache_mb: size of the cache of the teacher's outputs, in 10^6 bytes. The teacher then runs in float,
            outside the training program, and its outputs are reused when an image comes again. 0: the teacher runs in
            every step as in PaddleSlim, which rounds the inputs of its matmuls. ACT does not have this key.
    """

    loss: Union[DistillationLoss, list[DistillationLoss]] = "l2"
    node: Union[list[list[str]], list[str]] = key(factory=list)
    # ACT treats 0 as "not given" and uses 1.
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
                "is detection, which selects its tensors itself, but 'node' is given; delete it, or set another loss",
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

    def teacher(self) -> Optional[InferenceModel]:
        """Open the other teacher; None: the float model itself teaches.

        Raises:
            UserError: a file of it is missing.
        """
        folder, program, parameters = self.teacher_model_dir, self.teacher_model_filename, self.teacher_params_filename
        if folder is None or program is None or parameters is None:
            return None
        return InferenceModel.load(folder, program, parameters)


@dataclass(frozen=True)
class QuantAware:
    """ACT's ``QuantAware``: training with fake quantization, with PaddleSlim's keys and defaults."""

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
    """ACT's ``QuantPost``: post-training quantization, with the additional keys ``calib_images`` and ``seed``.

    The defaults of ``algo`` and ``bias_correction`` differ from ACT's (``hist``, off): with these defaults the mAP of
    RT-DETR stayed nearest to the float model's, for every choice of calibration images that was tried.

    Attributes:
        algo: algorithm for the thresholds of activations; see
            :func:`act_pipeline.calibration.thresholds.threshold`.
        hist_percent: the quantile of ``hist``, in (0, 1].
        calib_images: the number of images of TrainDataset to calibrate on, chosen at random; 100 to 1,000 suffice.
            None: ``batch_nums``, or 200.
        batch_nums: ACT's key for the number of calibration batches; it excludes ``calib_images``.
        batch_size: images in a run of the float graph; it affects memory, not the result.
        seed: seed of the random choice of the images.
        bias_correction: whether to correct biases for the mean error that the rounding of weights causes.
        zero_points: whether OpenVINO and ONNX Runtime round one-sided activations (after ReLU, SiLU, softmax and so on)
            from their least value to their threshold, with a zero point, instead of symmetrically.
        round_residuals: whether residual connections read rounded maps in ``ptq`` and ``smooth_quant``; it is faster,
            and ``auto`` decides itself.
        weight_quantize_type: ``channel_wise_abs_max``, or ``abs_max`` for one scale a weight.
        quantize_op_types: the op types to quantize.
        not_quant_pattern: name scopes of ops that stay float.
        weight_bits, activation_bits, onnx_format: fixed to 8, 8 and true; keys of ACT's schema.
    """

    algo: CalibrationAlgorithm = "mse"
    hist_percent: float = key(0.9999, above=0, at_most=1)
    calib_images: Optional[int] = key(None, at_least=1)
    batch_nums: Optional[int] = key(None, at_least=1)
    batch_size: int = key(4, at_least=1)
    seed: int = key(0, at_least=0)
    bias_correction: bool = True
    zero_points: bool = True
    round_residuals: bool = False
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
            raise Invalid("batch_nums", "is given together with 'calib_images', which sets the same; delete one")

    @property
    def images(self) -> int:
        """The number of calibration images: from ``calib_images`` or ``batch_nums``, 200 if neither is set."""
        if self.batch_nums is not None:
            return self.batch_nums * self.batch_size
        return DEFAULT_CALIBRATION_IMAGES if self.calib_images is None else self.calib_images


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant and cross-layer equalization: move outliers of activations into the weights that multiply them.

    Those are the matmuls that follow a LayerNorm, and convolutions and matmuls that follow another one through ReLU.

    ``alpha``, ``smooth_all_linears``, ``search_alpha_min`` and ``search_alpha_max`` are PaddleSlim's names
    (``paddleslim.quant.advanced.Smooth`` and ``PieceWiseSearch``). PaddleSlim searches only if it gets a search
    function, and uses 0.5 otherwise.

    Attributes:
        alpha: one alpha for all layers, in [0, 1]; None: the best alpha of each layer is searched.
        search_alpha_min: the first alpha to try, in [0, 1].
        search_alpha_max: the last alpha to try, in [0, 1].
        search_alpha_step: distance between alphas; PaddleSlim's is 0.01.
        smooth_all_linears: also smooth all other matmuls; each activation costs one multiplication.
        min_improvement: the relative reduction of a layer's squared error that is required to smooth it, in [0, 1].
        calib_images: the number of calibration images that statistics are gathered on.
        sample_rows: the number of rows to sample of each activation; each half is rounded as the other one says.
        seed: seed of the random choice of the rows.
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
        """The alphas to try: only ``alpha``, or those from ``search_alpha_min`` to ``search_alpha_max`` inclusive."""
        if self.alpha is not None:
            return [self.alpha]
        steps = int((self.search_alpha_max - self.search_alpha_min) / self.search_alpha_step + 1e-9)
        found = [round(self.search_alpha_min + step * self.search_alpha_step, 6) for step in range(steps + 1)]
        return found if found[-1] == self.search_alpha_max else [*found, self.search_alpha_max]


@dataclass(frozen=True)
class Strategy:
    """The quantization strategy, and how much accuracy it may cost.

    Attributes:
        name: ``ptq``: calibration only. ``smooth_quant``: calibration after outliers of activations were moved into the
            weights. ``qat_dis``: training with distillation by PaddleSlim's ACT. ``auto``: these in turn, also with
            some ops reverted to float, until a model is within ``max_drop`` and has ``min_agreement``; without limits
            the best calibration.
        engine: the engine that evaluates the float model and the INT8 models, a name of
            ``deploy/infer_eval.py --engine``. ``auto``: the engine that runs INT8 fastest on this machine.
            ``int8_reference``: Paddle computes every Q/DQ op; it needs no other engine and is not used in deployment.
        max_drop: the largest absolute drop of mAP below the float model's, in [0, 1]. Ops are reverted to float until
            the drop is within it. None, or EvalDataset has no labels: no limit.
        min_agreement: the least agreement with the float model on the images of EvalDataset, in [0, 1], which needs no
            labels: the mean of IoU x lower score / higher score over the objects that either model detects with a score
            of at least 0.3; an object that only one of them detects counts 0. If both limits are set, both must hold.
            None: no limit.
        confidence: the share of resampled data sets on which the limits have to hold, in (0, 1) (a paired bootstrap
            over the images of EvalDataset, `evaluation.confidence`). 0.5: the measured figures decide.
        placement: ``all``: every quantized op computes in INT8. ``measured``: groups of ops that the engine computes at
            least 2% sooner in float on this machine, as measured with the whole model, are reverted; `engine` is then
            ``openvino`` or ``onnxruntime``, on the CPU.
        search: whether ``tools/compress.py`` then searches for a faster variant (fewer decoder layers, fewer queries)
            within ``max_drop``, as a second result in ``<save_dir>.search``; see docs/search.md.
    """

    name: StrategyName = "auto"
    engine: JudgingEngine = "auto"
    max_drop: Optional[float] = key(0.005, at_least=0, at_most=1)
    min_agreement: Optional[float] = key(None, at_least=0, at_most=1)
    confidence: float = key(0.5, above=0, below=1)
    placement: PlacementName = "all"
    search: bool = False


@dataclass(frozen=True)
class Quantize:
    """Patterns that select the ops to compute in INT8.

    A pattern is an op type (``matmul_v2``), a part of RT-DETR (``backbone``, ``encoder``, ``decoder``, ``head``), an
    op's name (the name of its output, as in ``act.json``) or a glob over module names
    (``transformer.decoder.*.cross_attn.*``).

    Attributes:
        include: the ops to quantize; empty: all ops of ``quantize_op_types``.
        exclude: ops to leave in float.
        weight_only: ops of the remaining ones whose weights are stored in INT8 and whose activations stay float.
        dynamic: MatMuls of the remaining ones whose weights are stored in INT8 and whose activations are rounded when
            the model runs, by the range of each tensor's own values; see docs/strategies.md for the runtimes that do.
    """

    include: list[str] = key(factory=list)
    exclude: list[str] = key(factory=list)
    weight_only: list[str] = key(factory=list)
    dynamic: list[str] = key(factory=list)
