"""What the commands are called here: the repository has scripts, an installed package has ``act-pipeline``."""

from __future__ import annotations

import re

from act_pipeline.core.defaults import INSTALLED

SCRIPTS = {
    "tools/export_model.py": "export",
    "tools/import_model.py": "import",
    "tools/compress.py": "compress",
    "deploy/infer_eval.py": "eval",
    "tools/analyze.py": "analyze",
    "deploy/benchmark.py": "benchmark",
    "tools/search.py": "search",
    "tools/report.py": "report",
    "deploy/export_onnx.py": "onnx",
    "deploy/build_engine.py": "engine",
    "deploy/bundle.py": "bundle",
    "deploy/placement.py": "placement",
    "deploy/triton_repository.py": "triton-repository",
    "deploy/promote.py": "promote",
    "deploy/rollback.py": "rollback",
    "deploy/history.py": "history",
    "deploy/serve.py": "serve",
    "tools/demo.py": "demo",
    "tools/make_sample.py": "make-sample",
}
_SCRIPT = re.compile(rf"(?<![\w/.])(?:python )?({'|'.join(map(re.escape, SCRIPTS))})")
_MAKE = re.compile(r"`make (demo|doctor)`(?!, or install)")


def name_commands(text: str, installed: bool = INSTALLED) -> str:
    """Return a text that names scripts of the repository, with the commands instead where there are no scripts.

    >>> name_commands("compress it with tools/compress.py; `make demo` does", installed=True)
    'compress it with act-pipeline compress; `act-pipeline demo` does'
    """
    if not installed:
        return text
    text = _SCRIPT.sub(lambda found: f"act-pipeline {SCRIPTS[found.group(1)]}", text)
    return _MAKE.sub(r"`act-pipeline \1`", text)
