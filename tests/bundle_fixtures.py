"""Bundles unpacked, their scripts imported as on the device, and pictures of every odd kind."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from inference_fixtures import CLASS_NAMES, SIZE

from act_pipeline.core.artifacts import InferenceModel

STEPS = [
    {"type": "Resize", "target_size": [SIZE, SIZE], "keep_ratio": False, "interp": 2},
    {"type": "NormalizeImage", "mean": [0.0] * 3, "std": [1.0] * 3, "norm_type": "none"},
    {"type": "Permute"},
]
DEVICE = Path(__file__).resolve().parents[1] / "act_pipeline" / "bundle" / "device"
# Fails every import of what the device does not have, as an environment without it does.
_EMPTY = """\
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
"""
ABSENT = ("paddle", "act_pipeline", "ppdet", "paddleslim", "onnx", "scipy", "pycocotools", "yaml", "matplotlib")


def described(model: InferenceModel, folder: Path, **changes) -> InferenceModel:
    """Return a copy of a model with an `infer_cfg.yml`."""
    shutil.copytree(model.directory, folder)
    content = {"arch": "DETR", "Preprocess": STEPS, "label_list": list(CLASS_NAMES), **changes}
    (folder / "infer_cfg.yml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return InferenceModel.load(folder)


def load_script(name: str) -> ModuleType:
    """Import a script of the device from its file, with its neighbours."""
    if str(DEVICE) not in sys.path:
        sys.path.insert(0, str(DEVICE))
    spec = importlib.util.spec_from_file_location(name, DEVICE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a bundle, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path) as archive:
        archive.extractall(folder)
    return folder / path.stem


def on_device(folder: Path, script: str, *arguments: str, absent: tuple[str, ...] = ABSENT) -> Any:
    """Run a script of a bundle in a process in which some packages cannot be imported."""
    (folder.parent / "site").mkdir(exist_ok=True)
    (folder.parent / "site" / "sitecustomize.py").write_text(_EMPTY.format(absent=absent))
    environment = {**os.environ, "PYTHONPATH": str(folder.parent / "site")}
    return subprocess.run(
        [sys.executable, str(folder / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
        cwd=folder.parent,
    )


def run_build(folder: Path, script: str, told: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run build.sh with a trtexec that notes its arguments."""
    folder.mkdir(exist_ok=True)
    (folder / "build.sh").write_text(script)
    (folder / "trtexec").write_text(
        f'#!/bin/sh\nif [ "$1" = --help ]; then echo "&&&& RUNNING TensorRT.trtexec [{told}] # trtexec --help"; exit 0; fi\n'
        'echo "$@" > called\n'
    )
    (folder / "trtexec").chmod(0o755)
    environment = {**os.environ, "TRTEXEC": str(folder / "trtexec")}
    return subprocess.run(
        ["sh", str(folder / "build.sh"), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def odd_pictures(folder: Path, count: int = 100) -> list[Path]:
    """Write pictures of all modes, formats, orientations and extreme sizes."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    sizes = [(1, 50), (50, 1), (1, 1), (3, 900), (900, 3), (64, 64), (33, 77), (481, 333), (17, 640), (224, 223)]
    modes = ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16", "exif", "progressive"]
    made = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        mode = modes[(number // len(sizes)) % len(modes)]
        pixels = random.integers(0, 256, (height, width, 4), np.uint8)
        smooth = Image.fromarray(pixels[..., :3]).resize((width, height))
        path = folder / f"{number:03}"
        if mode in ("CMYK", "exif", "progressive"):
            picture = smooth.convert("CMYK") if mode == "CMYK" else smooth
            exif = Image.Exif()
            exif[0x0112] = 1 + number % 8 if mode == "exif" else 1
            path = path.with_suffix(".jpg")
            picture.save(path, quality=90, exif=exif, progressive=mode == "progressive")
        elif mode == "I;16":
            path = path.with_suffix(".png")
            Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16)).save(path)
        else:
            path = path.with_suffix(".bmp" if mode == "RGB" and number % 3 == 0 else ".png")
            (Image.fromarray(pixels) if mode in ("RGBA", "LA") else smooth).convert(mode).save(path)
        made.append(path)
    return made


def tar_names(path: Path) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        return sorted(entry.name for entry in archive.getmembers())


def export_raw_model(directory: Path, family: str) -> Any:
    """Export a network of 32 x 32 pixels with the raw outputs of a family: 16 boxes on a grid, of two classes."""
    import paddle

    paddle.enable_static()
    main, startup = paddle.static.Program(), paddle.static.Program()
    centres = np.stack(np.meshgrid(np.arange(4) * 8 + 4, np.arange(4) * 8 + 4), -1).reshape(16, 2)
    grid = np.concatenate([centres, np.full((16, 2), 11)], 1).astype(np.float32)  # neighbours overlap
    weights = np.random.default_rng(2).normal(0, 0.3, (2, 3, 8, 8)).astype(np.float32)
    scope = paddle.static.Scope()
    with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup), paddle.utils.unique_name.guard():
        image = paddle.static.data("image", [-1, 3, 32, 32], "float32")

        def constant(name: str, value: np.ndarray) -> Any:
            attr = paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(value))
            return paddle.create_parameter(list(value.shape), "float32", attr=attr)

        logits = paddle.nn.functional.conv2d(image, constant("w", weights), stride=8).reshape([-1, 2, 16])
        nothing = logits[:, :1] * 0
        if family == "yolo":
            boxes = constant("grid", grid.T[None]) + nothing
            outputs = [paddle.concat([boxes, paddle.nn.functional.sigmoid(logits)], 1)]
        else:
            boxes = constant("grid", grid[None] / 32) + nothing.transpose([0, 2, 1])
            outputs = [logits.transpose([0, 2, 1]), boxes]
        executor = paddle.static.Executor(paddle.CPUPlace())
        executor.run(startup)
        directory.mkdir(parents=True, exist_ok=True)
        paddle.static.save_inference_model(str(directory / "model"), [image], outputs, executor, program=main)
    paddle.disable_static()
    return InferenceModel.load(directory)
