"""Outputs of the network to detections, in Triton's Python backend, by run.py of a bundle."""

import json
import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from run import decode, load_bundle  # noqa: E402

GEOMETRY = ("im_shape", "scale_factor", "pad_offset")


class TritonPythonModel:
    """Gives ``boxes`` [N, M, 4] (x1, y1, x2, y2 in pixels of the picture), ``scores`` and ``labels`` [N, M].

    ``count`` [N, 1] are the detections of each picture. M is that of the picture with the most; the others have rows
    with the label -1 after their own.
    """

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._names = [value["name"] for value in config["input"] if value["name"] not in GEOMETRY]
        self._min_score = float(config["parameters"]["min_score"]["string_value"])
        self._bundle = load_bundle(HERE)

    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        def array(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

        geometry = {name: array(name) for name in GEOMETRY}
        samples = [{name: values[i] for name, values in geometry.items()} for i in range(len(geometry["im_shape"]))]
        outputs = [array(name) for name in self._names]
        if self._bundle["by_picture"]:  # bbox [N, M, 6], bbox_num [N, 1]
            counts = outputs[1].reshape(-1)
            outputs = [np.concatenate([rows[:count] for rows, count in zip(outputs[0], counts)]), counts]
        found = [rows[rows[:, 1] >= self._min_score] for rows in decode(self._bundle, outputs, samples)]
        most = max(map(len, found))
        padded = np.zeros((len(found), most, 6), np.float32)
        padded[..., 0] = -1
        for place, rows in enumerate(found):
            padded[place, : len(rows)] = rows
        arrays = {
            "boxes": np.ascontiguousarray(padded[..., 2:]),
            "scores": np.ascontiguousarray(padded[..., 1]),
            "labels": padded[..., 0].astype(np.int32),
            "count": np.array([[len(rows)] for rows in found], np.int32),
        }
        return pb_utils.InferenceResponse(
            output_tensors=[pb_utils.Tensor(name, value) for name, value in arrays.items()]
        )
