"""Serve the versions of a repository: Triton (KServe v2 over HTTP and gRPC), a page, metrics, canary and roll back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from act_pipeline.cli.flags import Parser, at_least
from act_pipeline.core.errors import UserError

_MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--repository", required=True, help="folder of the versions, made by promote")
    parser.add_argument("--rules", help="YAML file of the rules; default: configs/serving/rules.yml")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all; default: %(default)s")
    parser.add_argument(
        "--port", type=_port, default=8000, help="HTTP: page, /metrics, KServe at /v2; default: %(default)s"
    )
    parser.add_argument("--grpc_port", type=_port, help="gRPC of KServe; 0: none; default: the one after --port")
    parser.add_argument("--workers", type=at_least(1), default=1, help="processes with the model; default: %(default)s")
    parser.add_argument(
        "--cpu_threads", type=at_least(1), help="CPU threads of each; default: all CPUs, shared among the workers"
    )
    parser.add_argument(
        "--max_batch_size", type=at_least(1), default=8, help="most images in a batch; default: %(default)s"
    )
    parser.add_argument(
        "--preferred_batch_size",
        type=_sizes,
        default=(),
        metavar="N,N",
        help="batches that wait for no further requests",
    )
    parser.add_argument(
        "--max_queue_delay_microseconds",
        type=at_least(0),
        default=2000,
        help="how long a request waits for others; default: %(default)s",
    )
    limits = parser.add_argument_group("limits, beyond which requests are refused")
    limits.add_argument("--max_queue", type=at_least(1), default=128, help="waiting requests; default: %(default)s")
    limits.add_argument(
        "--max_seconds",
        type=at_least(1),
        default=30,
        help="to arrive, in the queue, in the model; default: %(default)s",
    )
    limits.add_argument("--max_body_mib", type=at_least(1), default=64, help="HTTP body; default: %(default)s")
    limits.add_argument("--max_picture_mib", type=at_least(1), default=20, help="JPEG or PNG; default: %(default)s")
    limits.add_argument(
        "--max_picture_megapixels", type=at_least(1), default=50, help="pixels of a picture; default: %(default)s"
    )
    limits.add_argument("--max_connections", type=at_least(1), default=256, help="HTTP; default: %(default)s")
    arguments = parser.parse(argv)

    from act_pipeline.server.run import serve
    from act_pipeline.server.settings import Batching, Limits, ServeSettings

    largest = max(arguments.preferred_batch_size, default=0)
    if largest > arguments.max_batch_size:
        raise UserError(
            f"--preferred_batch_size has {largest}, expected at most --max_batch_size={arguments.max_batch_size}"
        )
    settings = ServeSettings(
        repository=Path(arguments.repository),
        rules=Path(arguments.rules) if arguments.rules else None,
        host=arguments.host,
        port=arguments.port,
        grpc_port=arguments.grpc_port,
        workers=arguments.workers,
        threads=arguments.cpu_threads,
        batching=Batching(
            arguments.max_batch_size, arguments.preferred_batch_size, arguments.max_queue_delay_microseconds
        ),
        limits=Limits(
            body_bytes=arguments.max_body_mib * _MIB,
            picture_bytes=arguments.max_picture_mib * _MIB,
            picture_pixels=arguments.max_picture_megapixels * 1_000_000,
            queue=arguments.max_queue,
            seconds=float(arguments.max_seconds),
            connections=arguments.max_connections,
        ),
    )
    serve(settings, lambda line: print(line, file=sys.stderr, flush=True))
    return 0


def _port(text: str) -> int:
    if text.isdigit() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"found {text!r}, expected a port, 0 to 65535")


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected batch sizes such as 4,8")
    return tuple(sorted({int(part) for part in parts}))
