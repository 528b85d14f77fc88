"""What runs in the Python that has Paddle 3, as a script: the export to ONNX, and the model's own outputs.

It imports nothing of this package, whose environment has another paddlepaddle.

    python -I paddle3_process.py export PROGRAM PARAMETERS ONNX OPSET
    python -I paddle3_process.py run PROGRAM PARAMETERS INPUTS_NPZ OUTPUTS_NPZ
"""

from __future__ import annotations

import os
import sys


def export(program: str, parameters: str, onnx: str, opset: str) -> None:
    """Write a model as an ONNX file."""
    import paddle2onnx

    # Of its optimizers none is asked for: they would install packages, and the importer simplifies by itself.
    paddle2onnx.export(
        program, parameters, onnx, opset_version=int(opset), enable_onnx_checker=True, optimize_tool="None"
    )


def run(program: str, parameters: str, inputs: str, outputs: str) -> None:
    """Run a model in Paddle Inference; ``outputs`` gets its outputs as ``0``, ``1``, ... in their order."""
    import numpy as np
    from paddle import inference

    config = inference.Config(program, parameters)
    config.disable_gpu()
    config.set_cpu_math_library_num_threads(2)
    # Without fusions: the reference is what the file says.
    config.switch_ir_optim(False)
    config.disable_mkldnn()
    config.disable_glog_info()
    predictor = inference.create_predictor(config)
    with np.load(inputs) as arrays:
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(np.ascontiguousarray(arrays[name]))
    predictor.run()
    found = [predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()]
    np.savez(outputs, **{str(index): array for index, array in enumerate(found)})


if __name__ == "__main__":
    os.environ.setdefault("GLOG_minloglevel", "2")
    {"export": export, "run": run}[sys.argv[1]](*sys.argv[2:])
