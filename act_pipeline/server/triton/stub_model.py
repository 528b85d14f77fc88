"""The model that Triton's Python backend runs: it passes batches on to the server's process, and the answers back.

Triton's process runs a copy of this file, without the package: the standard library, NumPy, and what Triton gives.
"""

import fcntl
import json
import os
import time
from multiprocessing.connection import Client

import numpy as np
import triton_python_backend_utils as pb_utils

INPUTS = ("picture", "image", "im_shape", "scale_factor")


def _end_with_server(connection):
    """Let the kernel end this process (SIGIO) with the server's, whose end closes a connection that is otherwise idle.

    Triton may be killed together with the server, without a chance to end this process, which may hang then with
    Python's lock held, so that no thread of it could watch. A timer would end it after any pause (`docker pause`).
    """
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)
    if connection.poll():  # it ended before
        os._exit(1)


class TritonPythonModel:
    """One instance: a connection to the server's process."""

    def initialize(self, args):
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "bridge.json")) as file:
            bridge = json.load(file)
        self._address, self._key = bridge["address"], bytes.fromhex(bridge["key"])
        self._connection = None
        self._connect(10.0)
        self._idle = Client(self._address, "AF_UNIX", authkey=self._key)
        _end_with_server(self._idle)

    def execute(self, requests):
        batch = []
        for request in requests:
            inputs = {}
            for name in INPUTS:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    inputs[name] = tensor.as_numpy()
            batch.append((request.request_id(), request.parameters(), inputs))
        try:
            connection = self._connection or self._connect(1.0)
            connection.send(batch)
            answers = connection.recv()
        except (OSError, EOFError) as error:
            self._connection = None
            answers = [(False, f"the server's process does not answer: {error}")] * len(requests)
        return [self._response(request, answer) for request, answer in zip(requests, answers)]

    def finalize(self):
        if self._connection is not None:
            self._connection.close()

    def _connect(self, seconds):
        end = time.monotonic() + seconds
        while True:
            try:
                self._connection = Client(self._address, "AF_UNIX", authkey=self._key)
                return self._connection
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def _response(self, request, answer):
        if not isinstance(answer, dict):
            by_client, reason = answer
            code = pb_utils.TritonError.INVALID_ARG if by_client else pb_utils.TritonError.UNAVAILABLE
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(reason, code))
        asked = set(request.requested_output_names())
        tensors = [
            pb_utils.Tensor(name, np.ascontiguousarray(value)) for name, value in answer.items() if name in asked
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)
