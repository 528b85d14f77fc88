"""Try detectors of other families: make each with random weights, then import, compress by `ptq`, export and run it.

    python tools/dev/model_zoo.py --models yolov5n yolo11n --output output/zoo

The YOLOs are written as ONNX files and need no other package. RT-DETRv2 and D-FINE are made by transformers: name a
Python that has torch and transformers with --torch_python. PP-YOLOE+ s is paddledet's own. The random weights are such
that activations keep their range, and that some boxes have a score above 0.3; they detect nothing real, so INT8 is
compared with the float model, on pictures of the built-in sample.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError, run_command
from act_pipeline.core.package_versions import versions
from act_pipeline.data.builtin_sample import make_scene
from act_pipeline.importers import import_hugging_face
from act_pipeline.onnx_export import lower
from tools.dev.zoo import ppyoloe
from tools.dev.zoo.measure import Row, measure, table
from tools.dev.zoo.network import with_random_weights
from tools.dev.zoo.yolos import CLASSES, YOLOS

IN_TORCH = {"rtdetrv2": "rtdetrv2", "rtdetrv2-hf": "rtdetrv2", "d-fine": "d-fine"}
PPYOLOE = ("ppyoloe+s", "ppyoloe+s-onnx")
MODELS = (*YOLOS, *IN_TORCH, *PPYOLOE)
_MEASURED_ON = 6


def write_pictures(folder: Path, size: int, calib_images: int, eval_images: int) -> np.ndarray:
    """Write scenes of the built-in sample to ``train`` and ``val``; return some as an array, as the models take them.

    Args:
        folder: the folder to write to.
        size: the longer side of the scenes, and the input size of the models.
        calib_images, eval_images: number of scenes of each split.

    Returns:
        float32 [N, 3, size, size], RGB, 0 to 1.
    """
    arrays = []
    for split, count in (("train", calib_images), ("val", eval_images)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image = make_scene(split, 0, index, size).image
            cv2.imwrite(str(folder / split / f"{index:04d}.png"), image)
            if split == "train" and index < _MEASURED_ON:
                arrays.append(cv2.resize(image, (size, size))[:, :, ::-1].transpose(2, 0, 1))
    return np.stack(arrays).astype(np.float32) / np.float32(255)


def write_in_torch(python: str, kind: str, pictures: np.ndarray, folder: Path) -> Path:
    """Write RT-DETRv2 or D-FINE as ``model.onnx``, and as a folder of Hugging Face, ``hf``; return the ONNX file.

    Raises:
        UserError: the Python cannot be run, or lacks a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pictures.npy", pictures)
    script = Path(__file__).parent / "zoo" / "in_torch.py"
    command = [python, str(script), kind, str(folder / "pictures.npy"), str(folder / "model.onnx"), str(folder / "hf")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"--torch_python is {python}, which cannot be run ({error}); give another Python") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"--torch_python is {python}, which cannot make {kind}: {last}")
    return folder / "model.onnx"


def try_model(name: str, folder: Path, pictures: Path, array: np.ndarray, calib_images: int, python: str | None) -> Row:
    """Make one model, run all steps, and return its row; a step that refuses the model is named in it."""
    row, size = Row(name), array.shape[2]
    folder.mkdir(parents=True, exist_ok=True)
    onnx_file: Path | None = folder / "model.onnx"
    import_model: Callable[[Path], InferenceModel] | None = None
    if name in YOLOS:
        import onnx

        architecture, objectness = YOLOS[name]
        onnx.save(with_random_weights(architecture, array, CLASSES, objectness), str(onnx_file))
    elif name in IN_TORCH:
        onnx_file = write_in_torch(python or sys.executable, IN_TORCH[name], array, folder / "made")
        if name.endswith("-hf"):
            onnx_file, import_model = None, lambda target: import_hugging_face(folder / "made" / "hf", target)
    else:
        made = ppyoloe.write(folder / "made", array)
        if name == "ppyoloe+s":
            onnx_file, import_model = None, lambda target: ppyoloe.export(target, made)
        else:
            model = ppyoloe.export(folder / "made", made, ["exclude_nms=True"])
            onnx_file = lower(model, folder / "model.onnx").path
    try:
        measure(
            row, folder, pictures, size, keep_ratio=name in YOLOS, classes=CLASSES, calib_images=calib_images,
            onnx_file=onnx_file, import_model=import_model,
        )  # fmt: skip
    except UserError as error:
        row.error = str(error)
    except Exception as error:  # a defect of the package: the other models are tried all the same
        traceback.print_exc()
        row.error = f"{type(error).__name__}: {error}"
    return row


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(YOLOS), help="default: the YOLOs")
    parser.add_argument("--output", default="output/zoo", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--size", type=int, default=640, help="height and width of the input; default: %(default)s")
    parser.add_argument("--calib_images", type=int, default=32, help="pictures that calibrate; default: %(default)s")
    parser.add_argument("--eval_images", type=int, default=16, help="pictures that compare; default: %(default)s")
    parser.add_argument("--torch_python", metavar="PATH", help="a Python with torch and transformers")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(argv)
    if arguments.size < 64 or arguments.size % 32:
        raise UserError(f"--size is {arguments.size}, expected a multiple of 32, at least 64")
    if min(arguments.calib_images, arguments.eval_images) < 1:
        raise UserError("--calib_images and --eval_images are expected to be at least 1")
    output = Path(arguments.output)
    pictures = output / f"pictures_{arguments.size}"
    array = write_pictures(pictures, arguments.size, arguments.calib_images, arguments.eval_images)
    rows = []
    for name in arguments.models:
        start = time.perf_counter()
        rows.append(try_model(name, output / name, pictures, array, arguments.calib_images, arguments.torch_python))
        print(
            f"{name}: {time.perf_counter() - start:.0f} s{'; ' + rows[-1].error if rows[-1].error else ''}", flush=True
        )
        if arguments.json:
            content = {"command": vars(arguments), "versions": versions(), "rows": [row.as_json() for row in rows]}
            Path(arguments.json).write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
