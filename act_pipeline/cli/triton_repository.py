"""Write a repository for Triton Inference Server: the detector, its preprocessing and its detections as an ensemble."""

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
    parser.add_argument("--output", required=True, help="folder of the repository, for tritonserver --model-repository")
    parser.add_argument(
        "--backend",
        help="onnxruntime, openvino or tensorrt; default: openvino for --target=cpu, tensorrt for the others",
    )
    parser.add_argument("--target", default="cpu", help="cpu, t4, a10, orin or xavier; default: %(default)s")
    parser.add_argument(
        "--tensorrt", help="version of TensorRT in the server: 8.5, 8.6, 10 or 11 (default: the target's usual one)"
    )
    parser.add_argument("--name", default="detect", help="name of the ensemble; default: %(default)s")
    parser.add_argument(
        "--max_batch",
        type=at_least(1),
        metavar="N",
        help="the most pictures that the server puts into one run; default: 1 for openvino, else that of the target",
    )
    parser.add_argument(
        "--instances", type=at_least(1), default=1, metavar="N", help="copies of the detector; default: %(default)s"
    )
    parser.add_argument(
        "--queue_delay_us",
        type=at_least(0),
        default=2000,
        metavar="N",
        help="how long a request waits for others to share a batch, microseconds; default: %(default)s",
    )
    parser.add_argument(
        "--min_score", type=float, default=0.3, help="detections with lower scores are left out; default: %(default)s"
    )
    parser.add_argument(
        "--reader_config", help="reader YAML with the preprocessing; default: that of the model's infer_cfg.yml"
    )
    arguments = parser.parse(argv)

    from act_pipeline.triton import RepositoryRequest, make_repository

    print(make_repository(RepositoryRequest(**vars(arguments)), lambda line: print(line, file=sys.stderr)).summary())
    return 0
