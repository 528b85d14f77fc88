"""Check that a model is a float model as exported, which can be quantized."""

from __future__ import annotations

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.families.registry import decoder_of
from act_pipeline.graph.model_files import inspect_model

# Ops that only the graph optimization of Paddle Inference creates.
_FUSED_PREFIXES = ("fused_", "fusion_")
_FUSED_OPS = ("fc", "conv2d_fusion", "multihead_matmul")


def require_float(model: InferenceModel) -> None:
    """Check that a model can be quantized and evaluated.

    Args:
        model: the model to check.

    Raises:
        UserError: the model is INT8 already, was written by the graph optimization of Paddle Inference, has 16-bit
            parameters, or lacks the outputs of a detector.
    """
    summary = inspect_model(model)
    if summary.quantized:
        raise UserError(
            f"{model.model_path} is an INT8 model already, expected the float model that it was made of; give "
            "that one's folder as Global.model_dir"
        )
    fused = sorted(op for op in summary.op_counts if op.startswith(_FUSED_PREFIXES) or op in _FUSED_OPS)
    if fused:
        raise UserError(
            f"{model.model_path} is written by Paddle Inference's optimization (it holds {', '.join(fused[:3])}), "
            "which fuses what shall be quantized; give the model as it was exported"
        )
    if summary.half_parameters:
        raise UserError(
            f"{model.model_path} is of mixed precision ({len(summary.half_parameters)} parameters in 16 bits, such as "
            f"{summary.half_parameters[0]}), expected float32; give the model as it was exported"
        )
    decoder_of(model, summary.output_shapes)
