"""Write report.html and report.json into an INT8 model's folder: what it gains and loses, compared with FP32."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from act_pipeline.cli.flags import Parser
from act_pipeline.core.defaults import DEFAULT_READER, find_shipped
from act_pipeline.core.errors import UserError

if TYPE_CHECKING:
    from act_pipeline.data import Reader


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="folder of the INT8 model, with its act.json")
    parser.add_argument(
        "--reader_config",
        help="reader of the data that it was evaluated on; default: the one that the model's act.json names",
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
    parser.add_argument(
        "--search", metavar="FILE", help="a search.json; default: the one in the model's folder, if there is one"
    )
    parser.add_argument("--lang", default="en", help="language of the report, en or zh; default: %(default)s")
    arguments = parser.parse(argv)
    model = _compressed(Path(arguments.model_path))

    from act_pipeline.report import write_report

    path = write_report(
        model,
        _reader(arguments.reader_config, model),
        arguments.eval,
        lang=arguments.lang,
        analysis=arguments.analysis,
        progress=lambda line: print(line, file=sys.stderr),
        benchmark=arguments.benchmark,
        search=arguments.search,
    )
    print(f"report: {path}")
    return 0


def _compressed(folder: Path) -> Path:
    """Return the folder of a model that was compressed.

    Raises:
        UserError: it does not exist, or has no ``act.json``.
    """
    from act_pipeline.core.records import ACT_FILENAME

    if not folder.is_dir():
        raise UserError(f"--model_path={folder} does not exist, expected the folder that tools/compress.py wrote")
    if not (folder / ACT_FILENAME).is_file():
        raise UserError(
            f"--model_path={folder} has no {ACT_FILENAME}, expected the folder that tools/compress.py wrote; a report "
            "is about an INT8 model and its compression"
        )
    return folder


def _reader(given: str | None, model: Path) -> Reader:
    """Return the given reader, else the one of the compression, else the sample's."""
    from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
    from act_pipeline.data import Reader

    record = model / ACT_FILENAME
    if given is not None or not record.is_file():
        return Reader.load(given or find_shipped(DEFAULT_READER))
    named = ((read_record(record, ACT_SCHEMA).get("config") or {}).get("Global") or {}).get("reader_config")
    path = find_shipped(named or DEFAULT_READER)
    if not path.is_file():
        raise UserError(
            f"reader {path} does not exist, named by {record}: config.Global.reader_config; run in the folder of the "
            "compression, or give --reader_config"
        )
    return Reader.load(path)
