"""PaddleDetection's imports for object tracking are deferred until they are used, and invisible to others before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PPDET = """
import matplotlib.pyplot as plt
import sklearn
print("please install numba for tracking")
print("a line that is no such advice")
"""
ASKED = """
import sys
from act_pipeline.core.paddledet import import_ppdet

ppdet = import_ppdet()
print([name for name in ("sklearn", "matplotlib.pyplot") if name in sys.modules])
print(ppdet.sklearn.answer, ppdet.sklearn.answer)
import matplotlib.pyplot
print(matplotlib.pyplot.answer, ppdet.plt.answer is matplotlib.pyplot.answer, import_ppdet() is ppdet)
"""


def test_what_tracking_needs_is_imported_on_demand(tmp_path: Path) -> None:
    for path, text in (
        ("ppdet/__init__.py", PPDET),
        ("sklearn/__init__.py", "print('sklearn')\nanswer = 42"),
        ("matplotlib/__init__.py", ""),
        ("matplotlib/pyplot.py", "print('pyplot')\nanswer = object()"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    ended = subprocess.run([sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True)
    lines = ended.stdout.splitlines()
    assert ended.returncode == 0, ended.stderr
    assert lines[:4] == ["a line that is no such advice", "[]", "sklearn", "42 42"]
    assert lines[4] == "pyplot" and lines[5].endswith("True True") and len(lines) == 6
