"""Export a trained RT-DETR or PP-YOLOE as a static graph: PaddleDetection's command and flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, add_opt
from act_pipeline.core.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "-c", "--config", required=True, help="model YAML, such as configs/rtdetr/rtdetr_r50vd_6x_coco.yml"
    )
    add_opt(
        parser,
        "set keys of the config: weights=PATH_OR_URL, trt=True, num_classes=3, exclude_nms=True (PP-YOLOE), "
        "TestReader.inputs_def.image_shape=[3,640,640]",
        "KEY=VALUE",
    )
    parser.add_argument(
        "--output_dir", default="output_inference", help="the model goes to OUTPUT_DIR/<name of the config>"
    )
    parser.add_argument("--export_serving_model", nargs="?", const=True, default=False, help=argparse.SUPPRESS)
    parser.add_argument("--slim_config", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse(argv)
    if str(arguments.export_serving_model).lower() not in ("false", "0"):
        raise UserError(
            "--export_serving_model is not supported; export, then convert the folder with paddle_serving_client"
        )
    if arguments.slim_config:
        raise UserError("--slim_config is not supported; export the float model and compress it with tools/compress.py")

    from act_pipeline.export import export_model

    model = export_model(arguments.config, arguments.output_dir, arguments.opt)
    print(f"exported {model.directory}: {model.bytes / 1e6:.2f} MB")
    return 0
