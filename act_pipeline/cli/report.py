"""Write report.html and report.json beside an INT8 model: what it gains, what it loses, and where."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from act_pipeline.cli.flags import Parser
from act_pipeline.core.defaults import CONFIGS


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="folder of the INT8 model, with its act.json")
    parser.add_argument(
        "--reader_config",
        default=str(CONFIGS / "readers" / "sample_reader.yml"),
        help="reader of the data that it was evaluated on; default: %(default)s",
    )
    parser.add_argument(
        "--eval",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="records of deploy/infer_eval.py --json: FP16, and the engines that will run the model",
    )
    parser.add_argument("--benchmark", metavar="FILE", help="record of deploy/benchmark.py --json")
    parser.add_argument(
        "--analysis", metavar="FILE", help="an analysis.json; default: the one in the model's folder, if there is one"
    )
    parser.add_argument("--lang", default="en", help="language of the report, en or zh; default: %(default)s")
    arguments = parser.parse(argv)

    from act_pipeline.data import Reader
    from act_pipeline.report import write_report

    path = write_report(
        arguments.model_path,
        Reader.load(arguments.reader_config),
        arguments.eval,
        lang=arguments.lang,
        analysis=arguments.analysis,
        progress=lambda line: print(line, file=sys.stderr),
        benchmark=arguments.benchmark,
    )
    print(f"report: {path}")
    return 0
