"""The package for pip: `pip install .` resolves; paddlepaddle, paddleslim and paddledet come from requirements/*.txt.

paddleslim 2.6.0 and paddledet 2.6.0 cannot both be declared: one pins opencv-python==4.6.0.66, the other asks for
opencv-python<=4.6.0 and for an empty package `sklearn` that refuses to install. The locks hold both.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIGS = "act_pipeline.configs"
REQUIREMENTS = "act_pipeline.requirements"


def read_version():
    """Return ``__version__`` as the package states it, without importing it."""
    source = (ROOT / "act_pipeline" / "core" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE).group(1)


def read_description():
    """Return the README, or an empty text where it was not shipped."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="act_pipeline",
    version=read_version(),
    description="From a trained RT-DETR to a measured INT8 model: export, compress with PaddleSlim's ACT, evaluate",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9,<3.13",
    packages=[*find_packages(include=["act_pipeline", "act_pipeline.*"]), CONFIGS, REQUIREMENTS],
    # The wheel has the configs, and the lock of an environment that a command makes, in the package, where
    # act_pipeline/core/defaults.py finds them.
    package_dir={CONFIGS: "configs", REQUIREMENTS: "requirements"},
    package_data={
        "act_pipeline": ["data/*.pdparams", "**/*.yml", "**/*.json", "**/page.html", "report/page.css"],
        CONFIGS: ["**/*.yml", "**/*.yaml", "**/*.json"],
        REQUIREMENTS: ["paddle3.txt"],
    },
    entry_points={"console_scripts": ["act-pipeline=act_pipeline.cli.main:main"]},
    install_requires=[
        # Importing paddleslim with later ones of these two crashed the process.
        "matplotlib<3.9",
        "pillow<11",
        # The report.
        "jinja2",
        # paddlepaddle 2.6.2 was built against NumPy 1.
        "numpy>=1.23,<2",
        # What the lowering writes with, and the CPU runtime that reads it; the versions that go with numpy 1.23.
        "onnx>=1.19,<1.24",
        "openvino>=2025.3,<2026.5",
        # The same cv2 as opencv-python, without the windows (and without needing libGL).
        "opencv-python-headless==4.6.0.66",
        "pycocotools",
        "pyyaml",
        "requests",
        "scikit-learn",
        "scipy",
        # ppdet imports pkg_resources.
        "setuptools<81",
        "six",
        "threadpoolctl",
        "tqdm",
    ],
    extras_require={
        # One of the two: they put different files into the same folder.
        "cpu": ["paddlepaddle==2.6.2"],
        "gpu": ["paddlepaddle-gpu==2.6.2"],
        # Both are required now: names that commands and messages go on asking for.
        "onnx": [],
        "openvino": [],
        "onnxruntime": ["onnxruntime>=1.19,<1.32"],
        # `act-pipeline import --onnx`.
        "importers": ["onnxruntime>=1.19,<1.32", "onnxslim>=0.1.60"],
        # `act-pipeline benchmark --peer nncf`. It asks for numpy>=1.24 and runs on 1.23.5, which is what its lock has.
        "nncf": [
            'nncf>=3.4,<3.5; python_version >= "3.10"',
            'openvino>=2026,<2026.5; python_version >= "3.10"',
        ],
        # `act-pipeline serve`: the binaries of Triton.
        "serve": ["nvidia-pytriton==0.7.0"],
        # The wheels that the source archive tensorrt-rtx-cu12 names; cuda-bindings 13 wants a driver of CUDA 13.
        "tensorrt-rtx": [
            "cuda-bindings>=12.6,<13",
            "tensorrt-rtx-cu12-bindings==1.7.1.116",
            "tensorrt-rtx-cu12-libs==1.7.1.116",
        ],
        # `--executor ray` of `act-pipeline analyze` and `act-pipeline eval`; a client must be of the cluster's own
        # version, so there is no lock.
        "ray": ["ray>=2.9,<3"],
        "dev": [
            "cuda-bindings<13",
            "hypothesis",
            "mypy",
            "onnxruntime",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "tensorrt-rtx-cu12-bindings",
            "tensorrt-rtx-cu12-libs",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.9",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
