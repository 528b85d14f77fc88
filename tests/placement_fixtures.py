"""A small detector with four groups of ops, compressed once, and a stand-in for ``trtexec`` that knows their times."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from inference_fixtures import OBJECT, SIZE, make_tiny_data, write_reader
from together import made_once

import act_pipeline  # noqa: F401  (makes paddle importable)
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.graph.static_graph import static_mode

CONFIG = """
Global: {{reader_config: {reader}, Evaluation: true, model_dir: {model}}}
Strategy: {{name: ptq, max_drop: 0.5}}
QuantPost: {{calib_images: 4, algo: mse, quantize_op_types: [conv2d]}}
"""
# Of the convolutions, in the order of the program: 3x3 and 1x1 at 32 pixels, 3x3 and 1x1 at 16.
WEIGHTS = tuple(f"part{number}" for number in range(4))
GROUPS = tuple(f"model, {kernel} convolutions, {size}" for size in ("32x32", "16x16") for kernel in ("3x3", "1x1"))


@dataclass(frozen=True)
class Compressed:
    """The float model, its INT8 model, and the reader of the data."""

    float_model: InferenceModel
    int8: InferenceModel
    reader: Path


@pytest.fixture(scope="session")
def four_groups(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """The detector in INT8, by `compress`; its folders must not be modified."""

    def make(folder: Path) -> Compressed:
        from act_pipeline.compress import compress
        from act_pipeline.config import load_config

        model = make_detector(folder / "fp32")
        reader = write_reader(folder / "reader.yml", make_tiny_data(folder / "data", 16).parent)
        (folder / "compress.yml").write_text(CONFIG.format(reader=reader, model=model.directory), encoding="utf-8")
        compress(load_config(folder / "compress.yml"), folder / "int8", "CPU", progress=False)
        return Compressed(model, InferenceModel.load(folder / "int8"), reader)

    return made_once(tmp_path_factory, "four_groups", make)


def make_detector(directory: Path) -> InferenceModel:
    """Write a float model that detects ``OBJECT`` in every picture; four convolutions give the score."""
    import paddle

    rng = np.random.default_rng(0)

    def convolution(x, name: str, channels: int, kernel: int, stride: int = 1):
        values = rng.random((8, channels, kernel, kernel), dtype=np.float32) / (channels * kernel)
        attr = paddle.ParamAttr(name, initializer=paddle.nn.initializer.Assign(values))
        weight = paddle.create_parameter(list(values.shape), "float32", attr=attr)
        return paddle.nn.functional.relu(paddle.nn.functional.conv2d(x, weight, padding=kernel // 2, stride=stride))

    directory.mkdir(parents=True)
    with static_mode():
        main, startup, scope = paddle.static.Program(), paddle.static.Program(), paddle.static.Scope()
        with paddle.static.scope_guard(scope), paddle.static.program_guard(main, startup):
            with paddle.utils.unique_name.guard():
                image = paddle.static.data("image", [-1, 3, SIZE, SIZE], "float32")
                im_shape = paddle.static.data("im_shape", [-1, 2], "float32")
                scale_factor = paddle.static.data("scale_factor", [-1, 2], "float32")
                x = convolution(image, WEIGHTS[0], 3, 3)
                x = convolution(x, WEIGHTS[1], 8, 1)
                x = convolution(x, WEIGHTS[2], 8, 3, stride=2)
                x = convolution(x, WEIGHTS[3], 8, 1)
                score = paddle.nn.functional.sigmoid(x.mean(axis=[1, 2, 3]).reshape([-1, 1]))
                height, width = ((im_shape / scale_factor)[:, axis : axis + 1] for axis in (0, 1))
                sides = [side * share for side, share in zip((width, height, width, height), OBJECT)]
                found = paddle.concat([score * 0, score, *sides], 1)
                nothing = paddle.concat([score * 0 + 1, *[score * 0] * 3, width, height], 1)
                bbox = paddle.stack([found, nothing], 1).reshape([-1, 6])
                bbox_num = (paddle.sum(score * 0, axis=1) + 2).astype("int32")
                executor = paddle.static.Executor(paddle.CPUPlace())
                executor.run(startup)
                paddle.static.save_inference_model(
                    str(directory / "model"), [im_shape, image, scale_factor], [bbox, bbox_num], executor, program=main
                )
    return InferenceModel.load(directory)


# Reads the engine's time from the plan, which it wrote by what is in INT8 in the ONNX file.
_TRTEXEC = r"""#!/bin/sh
case "$*" in *--help*) echo "&&&& RUNNING TensorRT.trtexec [TensorRT v$FAKE_VERSION] # trtexec --help"; exit 0 ;; esac
echo "$*" >>"$FAKE_LOG"
if [ -n "$FAKE_CALLS" ] && [ "$(wc -l <"$FAKE_LOG")" -gt "$FAKE_CALLS" ]; then
    echo "[09/01/2026-10:00:00] [E] Error[1]: out of memory"
    exit 1
fi
onnx= save= load= times= profile=
for flag; do
    case "$flag" in
        --onnx=*) onnx="${flag#*=}" ;;
        --saveEngine=*) save="${flag#*=}" ;;
        --loadEngine=*) load="${flag#*=}" ;;
        --exportTimes=*) times="${flag#*=}" ;;
        --exportProfile=*) profile="${flag#*=}" ;;
    esac
done
if [ -n "$onnx" ]; then
    us="$FAKE_FIXED" number=0
    set -- $FAKE_FLOAT
    for int8 in $FAKE_INT8; do
        if grep -qa "part$number.int8" "$onnx"; then us=$((us + int8)); else us=$((us + $1)); fi
        number=$((number + 1))
        shift
    done
    echo "$us" >"$save"
    exit 0
fi
read -r us <"$load"
ms=$(printf '%d.%03d' $((us / 1000)) $((us % 1000)))
if [ -n "$times" ]; then
    {
        echo '['
        for start in 0.5 1.5 2.5; do
            [ "$start" = 0.5 ] && printf '  ' || printf ', '
            printf '{ "startEnqMs" : %s, "endEnqMs" : %s, "startH2dMs" : %s, "endH2dMs" : %s, ' $start $start $start $start
            printf '"startComputeMs" : %s, "endComputeMs" : 9, "startD2hMs" : 9, "endD2hMs" : 9, "h2dMs" : 0, ' $start
            printf '"computeMs" : %s, "d2hMs" : 0, "latencyMs" : 77 }\n' "$ms"
        done
        echo ']'
    } >"$times"
fi
if [ -n "$profile" ]; then
    printf '[\n  { "count" : 3 }\n' >"$profile"
    printf ', { "name" : "%s", "timeMs" : 9, "averageMs" : 3, "medianMs" : 3, "percentage" : 75 }\n' "conv2d_0.tmp_0 + relu" >>"$profile"
    printf ', { "name" : "Reformatting CopyNode for Input Tensor 0 to conv2d_0.tmp_0", "timeMs" : 3, ' >>"$profile"
    printf '"averageMs" : 1, "medianMs" : 1, "percentage" : 25 }\n]\n' >>"$profile"
fi
"""


class Device:
    """A machine with a GPU, as far as ``measure.sh`` needs one.

    Attributes:
        int8, float_: microseconds of each convolution, of :data:`WEIGHTS`.
        fixed: microseconds of the rest.
        version: as ``trtexec`` tells it.
        gpu: as ``nvidia-smi`` tells it.
        calls: number of calls of ``trtexec`` after which it fails; None: it does not.
    """

    def __init__(self, folder: Path, int8: list[int], float_: list[int], fixed: int = 1000) -> None:
        self.int8, self.float_, self.fixed = int8, float_, fixed
        self.version, self.gpu = "100300", "Tesla T4, 570.86.15"
        self.calls: int | None = None
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def called(self) -> list[str]:
        """The arguments of every call."""
        log = self._folder / "called"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    def measure(self, study: Path) -> subprocess.CompletedProcess:
        """Run ``measure.sh`` of a folder."""
        for name, text in (("trtexec", _TRTEXEC), ("nvidia-smi", f"#!/bin/sh\necho '{self.gpu}'\n")):
            (self._folder / name).write_text(text, encoding="utf-8")
            (self._folder / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{self._folder}{os.pathsep}{os.environ['PATH']}",
            "FAKE_LOG": str(self._folder / "called"),
            "FAKE_VERSION": self.version,
            "FAKE_CALLS": "" if self.calls is None else str(self.calls),
            "FAKE_FIXED": str(self.fixed),
            "FAKE_INT8": " ".join(map(str, self.int8)),
            "FAKE_FLOAT": " ".join(map(str, self.float_)),
        }
        return subprocess.run(
            ["sh", str(study / "measure.sh")], capture_output=True, text=True, env=environment, check=False, timeout=120
        )
