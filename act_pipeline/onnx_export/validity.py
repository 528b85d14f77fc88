"""Whether an ONNX graph is valid."""

from __future__ import annotations

from typing import Any


def invalid_reason(proto: Any) -> str | None:
    """Return why an ONNX model is not valid, in one line; None: it is.

    Args:
        proto: an ``onnx.ModelProto``.
    """
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return " ".join(str(error).split())
    return None
