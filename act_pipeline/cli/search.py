"""Find a faster variant of a detector without training: fewer decoder layers, fewer queries, another input size.

The model must come from tools/export_model.py, whose weights the variants are exported from. The best variants are
calibrated to INT8; the fastest within Strategy.max_drop of the full float model is named. Exit code 3 if there is none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, add_config, add_devices, add_opt, at_least, load_config_of
from act_pipeline.core.errors import Interrupted

NONE_WITHIN = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    add_config(parser, "compression config")
    parser.add_argument("--save_dir", default="output/search", help="folder of the results; default: %(default)s")
    parser.add_argument(
        "--layers", type=_numbers, metavar="N,...", help="decoder layers to try; default: all down to half of them"
    )
    parser.add_argument(
        "--queries", type=_numbers, metavar="N,...", help="queries to try; default: all, two thirds, one third"
    )
    parser.add_argument(
        "--sizes",
        type=_sizes,
        metavar="SIZE,...",
        help="input sizes to try, such as 576,640 or 480x640: multiples of 32; default: the model's own. Others cost "
        "much accuracy unless the model was trained at several",
    )
    parser.add_argument(
        "--candidates", type=at_least(1), default=2, metavar="N",
        help="variants to make INT8 besides the full model; default: %(default)s",
    )  # fmt: skip
    add_devices(parser, "where to calibrate")
    add_opt(parser, "set keys of the config: Strategy.max_drop=0.01 Global.model_dir=output/my_rtdetr")
    arguments = parser.parse(argv)

    from act_pipeline.core.interruption import interruptible
    from act_pipeline.search.search import search

    config = load_config_of(arguments)
    stopped = f"the search is not finished; the same command goes on with what is in {arguments.save_dir}"
    with interruptible(lambda: stopped):
        try:
            outcome = search(
                config, arguments.save_dir, arguments.devices, layers=arguments.layers, queries=arguments.queries,
                sizes=arguments.sizes, candidates=arguments.candidates,
            )  # fmt: skip
        except Interrupted as error:  # by a compression in it, which knows of its own result only
            raise Interrupted(error.signum, stopped) from None
    for line in outcome.lines:
        print(line)
    print(f"search.json, search.png and the models: {arguments.save_dir}")
    return 0 if outcome.chosen is not None else NONE_WITHIN


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected whole numbers such as 100,200,300") from None


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        edges = part.lower().split("x")
        if len(edges) > 2 or not all(edge.strip().isdigit() for edge in edges):
            raise argparse.ArgumentTypeError(f"found {part!r}, expected a size such as 640, or HEIGHTxWIDTH")
        found.append((int(edges[0]), int(edges[-1])))
    return tuple(found)
