"""Time a training by stock PaddleSlim and by this package side by side: seconds by stage, and the ratio of the totals.

With --peer nncf, instead: NNCF's post-training quantization compared with this package's `ptq` and `auto`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from act_pipeline.cli.flags import add_opt
from act_pipeline.core.defaults import CONFIGS
from act_pipeline.core.errors import UserError

_PEER_HELP = """\
--peer nncf, for which NNCF must be installed (requirements/nncf.txt, Python 3.10 or later):
  The same float model, the same calibration images (QuantPost.calib_images, 200 unless the config says otherwise), one
  after the other in one run, each in a process of its own. nncf: nncf.quantize with model_type=TRANSFORMER, on the
  model as exported to ONNX. ptq: calibration, without Strategy.max_drop. auto: within Strategy.max_drop. None finds
  the float model's evaluation or ONNX file of another side or an earlier run.
  start             packages, the reader
  prepare           nncf: lowering to ONNX, reading it; ours: folding constants and BatchNorm, checks
  quantize          nncf: all of nncf.quantize, which calibrates and corrects biases; ours: rounding, after `calibrate`
                    (the images) and `choose` (auto: which calibration changes detections least)
  evaluate          ours: the float model and each candidate on --eval_images, latencies, the reference; nncf: nothing
  quantization      all but start, prepare, save, evaluate and other
  total - evaluate  what remains of the total without evaluations
  The ratios are ours / NNCF's: below 1, ours took less. Last, after the clock has stopped: each model's mAP in OpenVINO
  on --eval_images, and the size of what OpenVINO read; --no_map leaves that out.
  --train_iter and --eval_iter have no meaning here.

  python tools/benchmark_compress.py --peer nncf -c configs/sample.yml --eval_images 0 -o QuantPost.calib_images=100
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_PEER_HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "-c",
        "--config",
        default=str(CONFIGS / "sample_qat_dis.yml"),
        help="a config with Distillation, QuantAware and TrainConfig; default: %(default)s",
    )
    add_opt(parser, "set keys of the config: Global.model_dir=output/my_rtdetr")
    parser.add_argument("--train_iter", type=int, default=50, help="iterations of training; default: %(default)s")
    parser.add_argument(
        "--eval_iter", type=int, default=10, help="iterations between evaluations; default: %(default)s"
    )
    parser.add_argument(
        "--eval_images", type=int, default=50, help="images of each evaluation; 0: all; default: %(default)s"
    )
    parser.add_argument("--only", choices=["stock", "ours"], help="one of the two; default: both, stock first")
    parser.add_argument("--peer", choices=["nncf"], help="compare NNCF with ptq and auto instead; see below")
    parser.add_argument("--no_map", action="store_true", help="with --peer: do not evaluate the models in OpenVINO")
    parser.add_argument("--json", metavar="FILE", help="write the record there")
    arguments = parser.parse_args(argv)
    if arguments.only and arguments.peer:
        raise UserError(f"--only={arguments.only} is a side of the training, which --peer replaces; leave one out")
    if arguments.no_map and not arguments.peer:
        raise UserError("--no_map has a meaning with --peer only: a training is scored while it runs; leave it out")

    from act_pipeline.core.records import write_record

    options, images = tuple(arguments.opt), arguments.eval_images or None
    if arguments.peer:
        from tools.dev.peer_run import PEER_SCHEMA, PeerRequest, compare_peer, peer_table

        record = compare_peer(PeerRequest(arguments.config, options, images, arguments.no_map))
        schema, table = PEER_SCHEMA, peer_table(record)
    else:
        from tools.dev.compress_run import COMPRESS_SCHEMA, SIDES, Request, compare, compress_table

        request = Request(arguments.config, options, arguments.train_iter, arguments.eval_iter, images)
        record = compare(request, (arguments.only,) if arguments.only else SIDES)
        schema, table = COMPRESS_SCHEMA, compress_table(record)
    if arguments.json:
        write_record(arguments.json, schema, record)
    print(table)
    return 1 if any(row["failure"] for row in record["rows"].values()) else 0
