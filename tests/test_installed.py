"""The package as `pip install .` leaves it: from an empty folder, without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from act_pipeline import __version__

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = "configs/rtdetr/rtdetr_sample.yml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed package alone, made from a wheel."""
    if sys.version_info >= (3, 13):
        pytest.skip("setup.py asks for Python 3.12 at most")
    tree, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "installed"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for name in ("act_pipeline", "configs", "requirements"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]
    pip_off = {**os.environ, "PIP_NO_INDEX": "1", "PIP_USER": "0", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run(
        [*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)],
        cwd=tree, env=pip_off, check=True, timeout=120,
    )  # fmt: skip
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", str(wheel), "--no-deps", "--no-compile", "--target", str(target)],
        cwd=wheels, env=pip_off, check=True, timeout=120,
    )  # fmt: skip
    return target


class Place:
    """An empty folder to work in, from which the installed package is found and the repository is not."""

    def __init__(self, installed: Path, folder: Path) -> None:
        self.installed, self.folder = installed, folder
        self.environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(self, *arguments: str, code: int = 0, program: tuple[str, ...] = ("-m", "act_pipeline.cli.main")) -> str:
        """Run a command, which must end with ``code``; returns its stdout, or its stderr if it is to fail."""
        ended = subprocess.run(
            [sys.executable, *program, *arguments],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ended.returncode == code, ended.stderr
        return ended.stderr if code else ended.stdout


@pytest.fixture(scope="module")
def place(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(installed, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def exported(place: Place) -> str:
    """The sample's model, exported by the installed package under `output/rtdetr_sample`."""
    pytest.importorskip("paddle", reason="paddlepaddle is not installed")
    weights = place.installed / "act_pipeline" / "data" / "rtdetr_sample.pdparams"
    return place.run("export", "-c", SAMPLE, "-o", f"weights={weights}", "trt=True", "--output_dir", "output")


def test_the_command_stands_on_its_own(place: Place) -> None:
    where = place.run(program=("-c", "import act_pipeline; print(act_pipeline.__file__)")).strip()
    assert Path(where).parent.parent == place.installed
    assert "compress" in place.run("--help") and "--json" in place.run("doctor", "--help")
    script = place.installed / "bin" / "act-pipeline"
    assert place.run("--version", program=(str(script),)) == f"act-pipeline {__version__}\n"
    assert os.access(script, os.X_OK)
    assert "did you mean 'compress'?" in place.run("compres", code=2)


def test_the_configs_came_with_it(place: Place) -> None:
    source = (
        "from act_pipeline.core.defaults import CONFIGS, find_shipped; from act_pipeline.config import load_config;"
        "print(CONFIGS, load_config('configs/sample.yml').global_.reader_config, find_shipped('data/dataset.py'))"
    )
    configs, reader, own = place.run(program=("-c", source)).split()
    assert Path(configs) == place.installed / "act_pipeline" / "configs"
    assert Path(reader) == Path(configs) / "readers" / "sample_reader.yml"
    assert own == "data/dataset.py", "a folder of the user's was taken for one of the package's"
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.y*ml")}
    assert shipped == {path.relative_to(configs) for path in Path(configs).rglob("*.y*ml")} and len(shipped) > 20


def test_messages_name_its_commands(place: Place) -> None:
    said = place.run("compress", "-c", "configs/sample.yml", "-o", "Global.model_dir=none", code=2)
    assert said.startswith("error: model folder none does not exist, named by ") and said.count("\n") == 1
    assert said.endswith(
        f", looked for in {place.folder}, {place.installed / 'act_pipeline' / 'configs'} and "
        f"{place.installed / 'act_pipeline'}; export a model with act-pipeline export first, or correct it\n"
    )
    assert "act-pipeline onnx" in " ".join(place.run("eval", "--help").split())
    assert "tools/" not in place.run("compress", "--help")


def test_it_exports_the_sample(exported: str, place: Place) -> None:
    assert exported.startswith("exported output/rtdetr_sample: ")
    assert (place.folder / "output" / "rtdetr_sample" / "model.pdmodel").is_file()


@pytest.mark.slow
def test_it_compresses_and_evaluates_the_sample(exported: str, place: Place) -> None:
    place.run("make-sample", "--train", "8", "--val", "4", "--size", "256")
    settings = ["QuantPost.calib_images=4", "QuantPost.batch_size=1"]
    said = place.run("compress", "-c", "configs/sample_ptq.yml", "--save_dir", "output/int8", "-o", *settings)
    assert "INT8 model, act.json and report.html: output/int8" in said
    page = (place.folder / "output" / "int8" / "report.html").read_text(encoding="utf-8")
    assert "act-pipeline compress" in page and "tools/compress.py" not in page
    place.run("eval", "--model_path=output/int8", "--device=CPU", "--cpu_threads=1", "--json=eval.json")
    assert json.loads((place.folder / "eval.json").read_text())["images"] == 4
