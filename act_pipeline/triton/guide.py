"""The README of a repository: the steps on the server's machine."""

from __future__ import annotations

from act_pipeline.engines.tensorrt.targets import Target, Version
from act_pipeline.triton.model_configs import Plan

_IMAGE = """\
# {name}: a repository for Triton Inference Server, on {device}

The Python backend needs NumPy and OpenCV, which NVIDIA's image lacks. IMAGE is that image by its full name, such as
.../nvidia/tritonserver:YY.MM-py3, of a release{release}.

```
cat > /tmp/Dockerfile <<END
FROM IMAGE
RUN pip install opencv-python-headless
END
docker build -t triton - < /tmp/Dockerfile
```
"""
_BUILD = """\
Build the engine on the GPU that will serve it:

```
docker run --rm {gpus}-v $PWD:/models triton sh /models/build.sh
```
"""
_SERVE = """\
Serve, and look:

```
docker run --rm {gpus}--shm-size=1g -p8000:8000 -p8001:8001 -p8002:8002 -v $PWD:/models triton \\
    tritonserver --model-repository=/models
curl -s localhost:8000/v2/health/ready
curl -s localhost:8002/metrics | grep nv_inference
```

Send the content of picture files (`pip install tritonclient[grpc]`):

```
import numpy, tritonclient.grpc as grpc
content = numpy.array([[open("picture.jpg", "rb").read()]], dtype=object)
picture = grpc.InferInput("picture", content.shape, "BYTES")
picture.set_data_from_numpy(content)
answer = grpc.InferenceServerClient("localhost:8001").infer("{name}", [picture])
print(*(answer.as_numpy(name) for name in ("boxes", "scores", "labels", "count")))
```

`boxes` are x1, y1, x2, y2 in pixels of the picture. The names of the classes are the parameter `classes` in
`{name}/config.pbtxt`, the least score is `min_score` in `{name}_postprocess/config.pbtxt`. {batches}

A new version of the model is `{name}_detector/2/` with its file; the latest one answers.
"""
_MODEL_SERVER = """\
OpenVINO Model Server serves the detector alone: its inputs and outputs are those of `{name}_detector/config.pbtxt`,
with the batch as the first size.

```
docker run --rm -p9000:9000 -p8000:8000 -v $PWD:/models openvino/model_server:latest \\
    --config_path /models/config.json --port 9000 --rest_port 8000
```
"""


def guide(plan: Plan, target: Target, version: Version | None) -> str:
    """Return the README.

    Args:
        plan: what the configs are made from.
        target: the device.
        version: its TensorRT; None: another backend.
    """
    if not plan.max_batch:
        batches = f"A request has {plan.batch} picture{'s' if plan.batch > 1 else ''}: the model's batch is fixed."
    elif plan.max_batch == 1:
        batches = "A request has one picture."
    else:
        batches = f"Requests are joined to batches of up to {plan.max_batch}, for at most {plan.queue_delay_us} us."
    values = {
        "name": plan.name,
        "device": target.device,
        "gpus": "--gpus all " if version else "",
        "release": f" with {version.title} (its release notes tell)" if version else "",
        "batches": batches,
    }
    parts = [_IMAGE, *([_BUILD] if version else []), _SERVE, *([_MODEL_SERVER] if plan.backend == "openvino" else [])]
    return "\n".join(part.format(**values) for part in parts)
