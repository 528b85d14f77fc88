"""The notebook runs from top to bottom on a few scenes of the sample."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "notebooks" / "rtdetr_act.ipynb"


def tags_of(cell) -> list[str]:
    return cell["metadata"].get("tags", [])


def test_the_notebook_is_clean() -> None:
    """No outputs, no shell commands except for the installation, and no local paths."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    shell = [cell for cell in code if any(line.lstrip().startswith(("!", "%pip", "%%bash")) for line in cell["source"])]
    assert [tags_of(cell) for cell in shell] == [["install"]]
    assert [tags_of(cell) for cell in code].count(["parameters"]) == 1
    assert not any(word in NOTEBOOK.read_text(encoding="utf-8") for word in ("/home/", "/tmp/", "/root/"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in tags_of(cell)]
    parameters = next(cell for cell in notebook.cells if "parameters" in tags_of(cell))
    names = [line.split("=")[0].strip() for line in parameters.source.splitlines()]
    values = ["12, 8", "8", "1", "0.2", repr(str(tmp_path))]
    assert len(names) == len(values)
    parameters.source = "\n".join(f"{name} = {value}" for name, value in zip(names, values))
    # 12 of the 116 ops, each measured alone, and one calibration instead of five; the following cells do not depend
    # on these numbers.
    (configured,) = [cell for cell in notebook.cells if "load_config(\n" in cell.source]
    drop = 'f"Strategy.max_drop={MAX_DROP}",'
    assert configured.source.count(drop) == 1
    configured.source = configured.source.replace(
        drop, f'{drop} "QuantPost.quantize_op_types=[depthwise_conv2d]", "Strategy.name=ptq",'
    )
    # The kernel of this environment, independent of the machine's kernels.
    kernels = tmp_path / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernels / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "python3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    text = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) >= 4 and "* kept, within max_drop 0.2" in text and "INT8: mAP 0." in text
    assert (tmp_path / "int8" / "report.html").exists() and (tmp_path / "analysis" / "analysis.json").exists()
