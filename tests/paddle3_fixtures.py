"""Stand-ins for a Python with Paddle 3, and model folders as Paddle 3 writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PIR = {"base_code": {"magic": "pir", "trainable": True, "version": 3}, "program": {"regions": []}}
# As PaddleX 3 writes it for a detector of PaddleDetection.
INFERENCE_YML = """
mode: paddle
draw_threshold: 0.5
metric: COCO
use_dynamic_shape: false
Global:
  model_name: RT-DETR-L
arch: DETR
min_subgraph_size: 3
Preprocess:
- interp: 2
  keep_ratio: false
  target_size: [32, 32]
  type: Resize
- mean: [0.0, 0.0, 0.0]
  norm_type: none
  std: [1.0, 1.0, 1.0]
  type: NormalizeImage
- type: Permute
label_list: [disc, square]
"""
# Answers the probe for versions, then does what BODY says with `action`, `program`, `parameters` and `arguments`.
_FAKE = """#!{python}
import os, sys
if sys.argv[2] == "-c":
    print({paddle!r}); print({paddle2onnx!r}); raise SystemExit
_, _, _, action, program, parameters, *arguments = sys.argv
{body}
"""
# Writes the ONNX file that lies beside the program, and gives what ONNX Runtime computes, times FACTOR.
CONVERTS = """
import shutil
import numpy as np
import onnxruntime
onnx = program.replace(".json", ".onnx")
if action == "export":
    shutil.copy(onnx, arguments[0])
else:
    outputs = onnxruntime.InferenceSession(onnx).run(None, dict(np.load(arguments[0])))
    np.savez(arguments[1], **{str(index): output * FACTOR for index, output in enumerate(outputs)})
"""


def model_folder(folder: Path, description: str | None = INFERENCE_YML) -> Path:
    """Write a folder with a program of Paddle 3 without ops, and return it."""
    folder.mkdir(parents=True)
    (folder / "inference.json").write_text(json.dumps(PIR, separators=(",", ":")), encoding="utf-8")
    (folder / "inference.pdiparams").write_bytes(b"parameters")
    if description is not None:
        (folder / "inference.yml").write_text(description, encoding="utf-8")
    return folder


def fake_python(folder: Path, body: str = "", paddle: str = "3.2.2", paddle2onnx: str = "2.1.0") -> Path:
    """Write a program that stands for a Python with Paddle 3, and return it."""
    folder.mkdir(exist_ok=True)
    path = folder / "python"
    text = _FAKE.format(python=sys.executable, paddle=paddle, paddle2onnx=paddle2onnx, body=body)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path
