"""Put a model and everything that its target machine needs into one file; nothing of this package is needed there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, at_least


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="the model's folder, INT8 or float")
    parser.add_argument("--model_filename", default="model.pdmodel")
    parser.add_argument("--params_filename", default="model.pdiparams")
    parser.add_argument(
        "--target", required=True, help="t4, a10, orin, xavier, nano (Nano and TX2), rtx (TensorRT-RTX) or cpu"
    )
    parser.add_argument("--output", required=True, metavar="FILE.tar", help="the file to write")
    parser.add_argument(
        "--tensorrt", help="version of TensorRT on the target: 8.2, 8.5, 8.6, 10 or 11 (default: its usual one)"
    )
    parser.add_argument("--batch", type=at_least(1), metavar="N", help="the largest batch (default: the target's)")
    parser.add_argument(
        "--reader_config", help="reader YAML, whose eval split gives three pictures (default: sample's)"
    )
    parser.add_argument("--pictures", nargs="+", default=[], metavar="FILE", help="these pictures instead")
    parser.add_argument(
        "--float_model_path",
        help="orin, xavier: the float model's folder, for the deep learning accelerator, which computes no Q/DQ",
    )
    arguments = parser.parse(argv)

    from act_pipeline.bundle import BundleRequest, make_bundle

    request = BundleRequest(**{**vars(arguments), "pictures": tuple(arguments.pictures)})
    print(make_bundle(request, lambda line: print(line, file=sys.stderr)).summary())
    return 0
