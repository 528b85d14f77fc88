"""Build a TensorRT engine of a model, on a machine without a GPU too (with tensorrt_rtx)."""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, parse_bool


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, print."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model_path", required=True, help="model folder, or an ONNX file written with --target tensorrt"
    )
    parser.add_argument("--model_filename", default="model.pdmodel")
    parser.add_argument("--params_filename", default="model.pdiparams")
    parser.add_argument("--precision", default="int8", help="int8 (an INT8 model), fp16 or fp32 (a float one)")
    parser.add_argument(
        "--output", help="the plan to write (default: the model's cache, where --engine=tensorrt looks)"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="the largest batch, at which it is fastest")
    parser.add_argument(
        "--float16_rest", type=parse_bool, default=True, help="of an INT8 model, compute what is float in FP16"
    )
    parser.add_argument(
        "--compute_capability", help="TensorRT-RTX: the GPU's, such as 8.9 (default: one plan for all from 8.0 on)"
    )
    parser.add_argument(
        "--target",
        help="the device that shall run it: t4, a10, orin, xavier, nano, rtx; refuses what an engine built here cannot "
        "do there, and says what it needs (default: this machine's GPU)",
    )
    parser.add_argument("--layers", action="store_true", help="print the engine's layers as JSON; needs a GPU")
    arguments = parser.parse(argv)

    from act_pipeline.core.artifacts import open_model
    from act_pipeline.engines.tensorrt.build import BuildOptions
    from act_pipeline.engines.tensorrt.plan import build_plan, inspect_plan, require_gpu_for_layers
    from act_pipeline.engines.tensorrt.targets import find_target

    if arguments.layers:
        require_gpu_for_layers()
    model = open_model(arguments.model_path, arguments.model_filename, arguments.params_filename)
    options = BuildOptions(
        arguments.float16_rest, detailed=arguments.layers, compute_capability=arguments.compute_capability
    )
    target = find_target(arguments.target) if arguments.target else None
    record = build_plan(
        model, arguments.output, arguments.precision, arguments.batch_size, options=options, target=target
    )
    print(record.summary())
    if arguments.layers:
        print(inspect_plan(record.path))
    return 0
