"""The content of picture files to inputs of the network, in Triton's Python backend, by preprocess.py of a bundle."""

import json
import os
import sys

import numpy as np
import triton_python_backend_utils as pb_utils

# OpenCV reads it when it is imported: a file of a few kilobytes may otherwise unpack to gigabytes.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(64 << 20))
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

from preprocess import Refused, decode_picture, preprocess  # noqa: E402
from run import load_bundle  # noqa: E402


class TritonPythonModel:
    """Takes ``picture``, texts [N, 1]; gives ``image``, ``im_shape``, ``scale_factor`` and ``pad_offset`` [N, ...]."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._names = [output["name"] for output in config["output"]]
        self._max_bytes = int(config["parameters"]["max_bytes"]["string_value"])
        self._steps = load_bundle(HERE)["preprocess"]

    def execute(self, requests):
        """Answer each request by itself: a picture that cannot be read fails its own request alone."""
        responses = []
        for request in requests:
            pictures = pb_utils.get_input_tensor_by_name(request, "picture").as_numpy().reshape(-1)
            try:
                samples = [self._sample(content, place) for place, content in enumerate(pictures)]
            except Refused as refused:
                responses.append(
                    pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(refused)))
                )
                continue
            arrays = [np.stack([sample[name] for sample in samples]) for name in self._names]
            tensors = [pb_utils.Tensor(name, array) for name, array in zip(self._names, arrays)]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses

    def _sample(self, content, place):
        if len(content) > self._max_bytes:
            raise Refused("picture %d has %d bytes, expected at most %d" % (place, len(content), self._max_bytes))
        return preprocess(decode_picture(content, "picture %d" % place), self._steps)
