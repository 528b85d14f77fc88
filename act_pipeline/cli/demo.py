"""Run the whole path on the built-in sample and print what came out; what `make demo` runs."""

from __future__ import annotations

from collections.abc import Sequence

from act_pipeline.cli.flags import Parser, add_opt


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--output_dir", default="output", help="where the models and records go; default: %(default)s")
    add_opt(parser, "set keys of configs/sample.yml")
    arguments = parser.parse(argv)

    from act_pipeline.compress.result.summary import compression_table
    from act_pipeline.demo import run_demo
    from act_pipeline.evaluation.table import evaluation_table

    demo = run_demo(output_dir=arguments.output_dir, overrides=arguments.opt)
    print(compression_table(demo.compressed.record))
    print()
    print(evaluation_table(demo.evaluations))
    print()
    print(f"FP32 model: {demo.fp32.directory}; INT8 model, act.json and report.html: {demo.compressed.model.directory}")
    print(f"records of the evaluations: {arguments.output_dir}/eval_*.json")
    return 0
