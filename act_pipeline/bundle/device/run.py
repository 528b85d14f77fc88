#!/usr/bin/env python3
"""Detect objects with the model of this folder, in pictures, a video or a camera's stream.

Needs NumPy, OpenCV (or Pillow), and one runtime: TensorRT, TensorRT-RTX, OpenVINO or ONNX Runtime. Python 3.6 or later.
"""

import argparse
import importlib.util
import json
import os
import sys
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from preprocess import Refused, cv2, one_line, preprocess, read_picture  # noqa: E402

SCHEMA = "act_pipeline.bundle/1"
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def load_bundle(folder=HERE):
    path = os.path.join(folder, "bundle.json")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except ValueError as error:
        raise Refused("%s is no JSON (%s): make the bundle again" % (path, error)) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise Refused("%s is no description of a bundle, expected the schema %s: make it again" % (path, SCHEMA))
    return found


def decode(bundle, outputs, samples):
    """Return the detections of each picture, float32 [K, 6]: class, score, x1, y1, x2, y2 in its own pixels."""
    family, clip = bundle["family"], bundle["post"].get("clip", True)
    count, found = len(samples), []
    if family == "detr_raw":
        logits, boxes = (np.asarray(outputs[place], np.float32) for place in bundle["roles"])
        scores = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
        scores[logits == -np.inf] = 0  # marks what is no class
        high, wide = bundle["input_size"]
        half = boxes[..., 2:4] / 2
        boxes = np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], -1)
        for each, corners in zip(scores, boxes * np.array([wide, high, wide, high], np.float32)):
            flat, most = each.reshape(-1), bundle["post"]["keep_top_k"]
            best = np.argsort(-flat, kind="mergesort")[: len(flat) if most == -1 else most]
            best = best[flat[best] > bundle["post"]["score_threshold"]]
            found.append(np.column_stack([best % each.shape[1], flat[best], corners[best // each.shape[1]]]))
    elif family == "end2end":
        for rows in outputs[0]:
            rows = rows[rows[:, 4] > bundle["post"]["score_threshold"]]
            rows = rows[np.argsort(-rows[:, 4], kind="mergesort")]
            found.append(np.column_stack([np.rint(rows[:, 5]), rows[:, 4], rows[:, :4]]))
    elif len(outputs) == 2:  # bbox [K, 6], bbox_num [N]
        ends = np.cumsum(np.asarray(outputs[1]).reshape(-1).astype(np.int64))
        found = np.split(np.asarray(outputs[0], np.float32).reshape(-1, 6)[: ends[-1]], ends[:-1])
    else:  # EfficientNMS_TRT
        number, boxes, scores, classes = outputs
        kept = [int(each) for each in np.asarray(number).reshape(-1)]
        found = [np.column_stack([classes[i, :k], scores[i, :k], boxes[i, :k]]) for i, k in enumerate(kept)]
        found = [rows[rows[:, 1] >= 0] for rows in found]  # with a low threshold the plugin counts rows that are none
    results = []
    for rows, sample in zip(found[:count], samples):
        rows = np.array(rows, np.float32)
        scale, size = np.tile(sample["scale_factor"][::-1], 2), np.tile(sample["im_shape"][::-1], 2)
        if family in ("detr_raw", "end2end", "nms_on_input"):
            rows[:, 2:] = rows[:, 2:] - np.tile(sample["pad_offset"][::-1], 2)
            rows[:, 2:] = (np.clip(rows[:, 2:], 0, size) if clip else rows[:, 2:]) / scale
        elif family == "nms_on_original" and clip:
            rows[:, 2:] = np.clip(rows[:, 2:], 0, size / scale)
        results.append(rows)
    return results


class OnnxRuntime:
    def __init__(self, bundle, path):
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self.title, self.names = "ONNX Runtime " + onnxruntime.__version__, bundle["outputs"]
        # WeightBiasQuantization rounds float biases, by scales that FP16 may not hold: scores would change by up to 0.3
        self._session = onnxruntime.InferenceSession(
            path,
            providers=onnxruntime.get_available_providers(),
            disabled_optimizers=["WeightBiasQuantization"],
        )

    def run(self, inputs):
        return self._session.run(self.names, inputs)


class OpenVINO:
    def __init__(self, bundle, path):
        import openvino

        self.title, self._openvino = "OpenVINO " + openvino.__version__, openvino
        self._core, self._bundle, self._requests = openvino.Core(), bundle, {}
        self._model = self._core.read_model(path)

    def run(self, inputs):
        batch = len(inputs["image"])
        if batch not in self._requests:  # a fixed batch is quicker, and some INT8 files are only right with one
            model = self._model.clone()
            for parameter in model.get_parameters() if not self._bundle["fixed_batch"] else ():
                shape = parameter.get_partial_shape()
                shape[0] = batch
                parameter.set_partial_shape(shape)
            model.validate_nodes_and_infer_types()
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            self._requests[batch] = self._core.compile_model(model, "CPU", settings).create_infer_request()
        request = self._requests[batch]
        request.infer(inputs)
        return [request.get_output_tensor(place).data.copy() for place in range(len(self._bundle["outputs"]))]


def _tensorrt(bundle, path):
    from tensorrt_runtime import TensorRT

    return TensorRT(bundle, path)


RUNTIMES = {"tensorrt": _tensorrt, "openvino": OpenVINO, "onnxruntime": OnnxRuntime}
MODULES = {
    "tensorrt": ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
}


class Detector:
    """The model of a bundle in a runtime."""

    def __init__(self, bundle, runtime="auto", folder=HERE, model=None):
        plan = os.path.join(folder, "model.plan")
        if runtime == "auto":
            order = ["openvino", "onnxruntime"] if bundle["target"] == "cpu" else ["tensorrt"]
            there = [name for name in order if any(importlib.util.find_spec(module) for module in MODULES[name])]
            if not there:
                names = " or ".join(MODULES[name][0] for name in order)
                raise Refused("this machine has no %s; install it, or choose with --runtime" % names)
            runtime = there[0]
        if runtime == "tensorrt" and model is None and not os.path.exists(plan):
            raise Refused("%s does not exist: run ./build.sh on this machine first" % plan)
        path = model or (plan if runtime == "tensorrt" else os.path.join(folder, bundle["files"].get(runtime, "")))
        if not os.path.isfile(path):
            raise Refused("this bundle is for %s, and has no file for %s" % (bundle["target"], runtime))
        self.bundle, self.path = bundle, path
        try:
            self.engine = RUNTIMES[runtime](bundle, path)
        except Refused:
            raise
        except Exception as error:  # each runtime has exceptions of its own
            raise Refused("%s cannot load %s: %s" % (runtime, path, one_line(error))) from None

    def detect(self, images):
        """Return the detections of RGB pictures, see ``decode``."""
        samples = [preprocess(image, self.bundle["preprocess"]) for image in images]
        if len(samples) > self.bundle["batch"]:
            raise Refused("the bundle is for batches of at most %d" % self.bundle["batch"])
        fill = self.bundle["batch"] - len(samples) if self.bundle["fixed_batch"] else 0
        padded = samples + samples[-1:] * fill
        inputs = {name: np.stack([sample[name] for sample in padded]) for name in self.bundle["inputs"]}
        try:
            return decode(self.bundle, self.engine.run(inputs), samples)
        except Refused:
            raise
        except Exception as error:
            raise Refused("%s cannot run the model: %s" % (self.engine.title, one_line(error))) from None


def detect_pictures(detector, options):
    """Detect in picture files; print, draw and time."""
    files = []
    for path in options.pictures or [os.path.join(HERE, "pictures")]:
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else []
        files += [os.path.join(path, name) for name in inside if name.lower().endswith(PICTURES)] or [path]
    names, results = detector.bundle["classes"], []
    for first in range(0, len(files), options.batch):
        chunk = files[first : first + options.batch]
        images = [read_picture(path) for path in chunk]
        for path, image, rows in zip(chunk, images, detector.detect(images)):
            rows = rows[rows[:, 1] >= options.threshold]
            print("%s: %d detections" % (path, len(rows)))
            for row in rows:
                print("  %-16s %.3f  x1 %.1f  y1 %.1f  x2 %.1f  y2 %.1f" % ((label(names, row[0]),) + tuple(row[1:])))
            results.append({"file": path, "detections": [[float(value) for value in row] for row in rows]})
            if options.draw:
                draw(image, rows, names, os.path.join(options.draw, os.path.basename(path)))
        if options.repeat and first == 0:
            seconds = []
            for _ in range(options.repeat + 3):
                started = time.perf_counter()
                detector.detect(images)
                seconds.append(time.perf_counter() - started)
            median = float(np.median(seconds[3:]))
            told = (1000 * median, len(images), len(images) / median)
            print("%.2f ms for a batch of %d, preprocessing included: %.1f pictures a second" % told)
    return results


def detect_stream(detector, options):
    """Detect in a video or a camera's stream, a frame at a time, and print the frames a second."""
    if cv2 is None:
        raise Refused("--video needs OpenCV")
    stream = cv2.VideoCapture(int(options.video) if options.video.isdigit() else options.video)
    if not stream.isOpened():
        raise Refused("OpenCV cannot open --video=%s, expected a file, a URL or a camera's number" % options.video)
    frames, objects, started = 0, 0, time.perf_counter()
    told = started
    while not options.frames or frames < options.frames:
        there, frame = stream.read()
        if not there:
            break
        (rows,) = detector.detect([cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)])
        frames, objects, now = frames + 1, int((rows[:, 1] >= options.threshold).sum()), time.perf_counter()
        if now - told >= 1:
            told = now
            print("%d frames, %.1f FPS, %d objects in the last one" % (frames, frames / (now - started), objects))
    stream.release()
    if not frames:
        raise Refused("--video=%s has no frames" % options.video)
    print("%d frames in all, %.1f FPS" % (frames, frames / (time.perf_counter() - started)))
    return []


def draw(image, rows, names, path):
    """Write a picture with its boxes."""
    if cv2 is None:
        raise Refused("--draw needs OpenCV")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    canvas = np.ascontiguousarray(image[..., ::-1])
    for row in rows:
        x1, y1, x2, y2 = (int(round(float(value))) for value in row[2:])
        cv2.rectangle(canvas, (x1, y1), (x2, y2), (0, 200, 0), 2)
        text = "%s %.2f" % (label(names, row[0]), row[1])
        cv2.putText(canvas, text, (x1, max(y1 - 4, 12)), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 200, 0), 1)
    if not cv2.imwrite(path, canvas):
        raise Refused("%s cannot be written" % path)


def label(names, index):
    return names[int(index)] if int(index) < len(names) else "class %d" % index


def add_runtime_flags(parser):
    parser.add_argument("--runtime", default="auto", choices=["auto"] + list(RUNTIMES), help="what runs the model")
    parser.add_argument("--model", help="another file than the bundle's: a plan for tensorrt, else an ONNX file")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", help="files or folders; default: the pictures of the bundle")
    parser.add_argument("--video", help="a video file, a URL, or the number of a camera, such as 0")
    parser.add_argument("--frames", type=int, help="end after this number of frames")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a run")
    parser.add_argument("--threshold", type=float, default=0.3, help="the lowest score that is shown")
    parser.add_argument(
        "--repeat", type=int, default=0, help="time the first batch, median of this number of runs (0: no timing)"
    )
    parser.add_argument("--draw", help="folder for the pictures with their boxes")
    parser.add_argument("--json", help="file for the detections")
    add_runtime_flags(parser)
    options = parser.parse_args(argv)
    try:
        if options.batch < 1:
            raise Refused("--batch is %d, expected at least 1" % options.batch)
        if options.repeat < 0:
            raise Refused("--repeat is %d, expected at least 0, which is no timing" % options.repeat)
        detector = Detector(load_bundle(), options.runtime, model=options.model)
        print("%s on %s" % (detector.engine.title, detector.path))
        results = (detect_stream if options.video else detect_pictures)(detector, options)
        if options.json:
            with open(options.json, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)
    except (Refused, OSError) as error:
        print("error: %s" % one_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
