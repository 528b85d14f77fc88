"""Make the built-in sample data set: scenes with real handwritten digits, in COCO's form.

Example: python tools/make_sample.py --output_dir dataset/sample --train 300 --val 120 --seed 0
"""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser
from act_pipeline.data.builtin_sample import make_sample


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, make the sample, say where it lies."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", default="dataset/sample", help="the folder to write (default: %(default)s)")
    parser.add_argument("--train", type=int, default=300, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=120, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="longer side in pixels (default: %(default)s)")
    flags = parser.parse(argv)
    made = make_sample(flags.output_dir, flags.train, flags.val, flags.seed, flags.size)
    counts = f"{flags.train} training and {flags.val} validation scenes"
    print(f"{flags.output_dir}: {counts}" if made else f"{flags.output_dir}: {counts} are there already")
    return 0
