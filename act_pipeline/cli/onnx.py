"""Export a model to ONNX, for OpenVINO, ONNX Runtime or TensorRT.

The file of an INT8 model holds its scales in QuantizeLinear and DequantizeLinear ops (Q/DQ), in the form that the
runtime of --target computes right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from act_pipeline.cli.flags import Parser
from act_pipeline.core.errors import UserError


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--batch is {text!r}, expected a positive integer, or 'dynamic'")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="the model's folder")
    parser.add_argument("--model_filename", default="model.pdmodel")
    parser.add_argument("--params_filename", default="model.pdiparams")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output", help="the file to write")
    place.add_argument("--output_dir", help="write OUTPUT_DIR/model_<target>.onnx")
    parser.add_argument(
        "--target",
        default="cpu",
        help="cpu (uint8 with zero points: OpenVINO, also ONNX Runtime), onnxruntime (the same with outputs of "
        "convolutions rounded: ONNX Runtime's INT8 kernels), tensorrt (int8, zero point 0), or tensorrt_rtx (the same "
        "with all activations at the scale 1: smaller plans)",
    )
    parser.add_argument("--precision", default="auto", help="auto (what the model is), int8 or fp32")
    parser.add_argument(
        "--float16", action="store_true", help="float work in FP16, for GPUs; the post-process stays FP32"
    )
    parser.add_argument("--opset", type=int, default=17)
    parser.add_argument("--batch", default="dynamic", help="a fixed batch size, or dynamic")
    parser.add_argument(
        "--nms",
        default="none",
        help="none (boxes and scores; the engines of this package apply the NMS), onnx (NonMaxSuppression in the file: "
        "bbox [K, 6], bbox_num [N]), tensorrt (TensorRT's plugin EfficientNMS_TRT)",
    )
    arguments = parser.parse(argv)

    from act_pipeline.core.artifacts import InferenceModel, OnnxModel
    from act_pipeline.core.output_places import require_writable_file
    from act_pipeline.onnx_export import lower

    suffix = "_fp16" if arguments.float16 else ""
    output, flag = arguments.output, "--output"
    if output is None:
        output, flag = str(Path(arguments.output_dir) / f"model_{arguments.target}{suffix}.onnx"), "--output_dir"
    require_writable_file(output, flag, "model.onnx")
    model = InferenceModel.load(arguments.model_path, arguments.model_filename, arguments.params_filename)
    lowered = lower(
        model,
        Path(output),
        arguments.target,
        opset=arguments.opset,
        batch=_batch(arguments.batch),
        precision=arguments.precision,
        float16=arguments.float16,
        nms=arguments.nms,
    )
    print(lowered.summary())
    print(f"record of the export, for the engines of this package: {OnnxModel(lowered.path).record_path}")
    return 0
