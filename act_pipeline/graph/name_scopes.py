"""Modules of ops, in the attribute in which Paddle stores the scopes of ``paddle.static.name_scope``."""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "op_namescope"


def set_module(op: Any, name: str) -> None:
    """Store a module's name in an op.

    Args:
        op: a Paddle operator.
        name: dotted name, ``encoder.layers.0.fc1``.
    """
    op._set_attr(_ATTRIBUTE, f"/{name}/")


def module_of(op: Any) -> str:
    """Return the dotted module name stored in an op; empty if there is none.

    Args:
        op: a Paddle operator; programs without scopes have ``/``.
    """
    scope = op.attr(_ATTRIBUTE) if op.has_attr(_ATTRIBUTE) else ""
    return ".".join(part for part in str(scope).split("/") if part)
