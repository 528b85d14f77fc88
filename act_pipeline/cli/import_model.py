"""Import an ONNX file of any detector as a float model that can be compressed, and check it against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser
from act_pipeline.core.errors import UserError


def _shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return input name -> shape of ``NAME:1,3,640,640``; the name may be left out."""
    found = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        numbers = sizes.strip("[] ").split(",")
        if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
            raise UserError(f"--input_shape is {text!r}, expected NAME:SIZES such as images:1,3,640,640")
        found[name.strip()] = [int(number) for number in numbers]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--onnx", required=True, metavar="FILE", help="the ONNX file")
    parser.add_argument(
        "--input_shape",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME:SIZES",
        help="shapes of inputs whose height, width or length is open: images:1,3,640,640",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="the folder to write; default: output_inference/<name of the file>"
    )
    parser.add_argument("--images", metavar="DIR", help="pictures to compare on; default: random numbers")
    parser.add_argument("--fixed_batch", action="store_true", help="keep the file's batch size instead of opening it")
    arguments = parser.parse(argv)
    shapes = _shapes(arguments.input_shape)

    from act_pipeline.importers import import_onnx

    imported = import_onnx(
        arguments.onnx,
        arguments.output,
        input_shape=shapes,
        images=arguments.images,
        fixed_batch=arguments.fixed_batch,
    )
    print(imported.summary())
    return 0
