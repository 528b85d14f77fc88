"""Names of the PyTorch modules that the nodes of an ONNX file were exported from."""

from __future__ import annotations

import ast
from typing import Any

# torch.onnx.export(dynamo=True) stores the modules around a node here, from the outermost on; the last entry is the
# operation itself: "['', 'encoder', 'encoder.layers.0', 'encoder.layers.0.fc1', 'linear_3']".
_SCOPES = "pkg.torch.onnx.name_scopes"
_MOST_CHARACTERS = 1 << 14
_WEIGHT = ".weight"


def module_name(proto: Any) -> str:
    """Return the dotted module name of a node; empty if the file does not tell.

    It is taken from the metadata of PyTorch's newer exporter, or from the name of the weight
    (``model.22.cv2.0.weight``), or from the node's name, in which the older exporter writes the modules
    (``/encoder/layers.0/self_attn/MatMul``).

    Args:
        proto: an ``onnx.NodeProto``.
    """
    for entry in getattr(proto, "metadata_props", ()):
        if entry.key == _SCOPES and len(entry.value) <= _MOST_CHARACTERS:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(scopes, list) and len(scopes) > 1 and isinstance(scopes[-2], str):
                return _plain(scopes[-2])
    weight = next((name for name in proto.input if name.endswith(_WEIGHT)), None)
    if weight is not None:
        return _plain(weight[: -len(_WEIGHT)])
    return _plain(_joined(proto.name.split("/")[1:-1]))


def _joined(scopes: list[str]) -> str:
    """Join scopes; one inside a list repeats the list's name: ``blocks``, ``blocks.1`` are ``blocks.1``."""
    following = [*scopes[1:], ""]
    return ".".join(scope for scope, after in zip(scopes, following) if not after.startswith(f"{scope}."))


def _plain(name: str) -> str:
    """Return a name that can be an attribute of a Paddle op and a pattern of a config; else nothing."""
    return name if all(part.replace("_", "").replace("-", "").isalnum() for part in name.split(".")) else ""
