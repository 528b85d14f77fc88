"""Modules of ops, in the attribute in which Paddle stores the scopes of ``paddle.static.name_scope``."""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "op_namescope"
_LEVEL = "level_"
# PaddleSlim's passes look for this in the scope of an op, see `compress.plan.op_selection.skip_patterns`.
KEPT_SCOPE = "skip_quant/act_pipeline"


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
    return ".".join(part for part in _scope(op).removeprefix(f"/{KEPT_SCOPE}").split("/") if part)


def set_level(op: Any, name: str, level: int) -> None:
    """Store the name of the part of a module that computes one level of a pyramid.

    Args:
        op: a Paddle operator.
        name: dotted name of the module, ``decoder.layers.0.value_proj``.
        level: number of the level; the part is called ``decoder.layers.0.value_proj.level_0``.
    """
    set_module(op, f"{name}.{_LEVEL}{level}")


def is_of_level(op: Any) -> bool:
    """Return whether an op has a name of :func:`set_level`."""
    return module_of(op).rpartition(".")[2].startswith(_LEVEL)


def mark_kept(op: Any, kept: bool) -> None:
    """Mark an op so that PaddleSlim's passes insert no Q/DQ before it, or take the mark away; its module stays.

    Args:
        op: a Paddle operator.
        kept: whether it stays float.
    """
    scope = _scope(op).removeprefix(f"/{KEPT_SCOPE}") or "/"
    op._set_attr(_ATTRIBUTE, f"/{KEPT_SCOPE}{scope}" if kept else scope)


def _scope(op: Any) -> str:
    return str(op.attr(_ATTRIBUTE)) if op.has_attr(_ATTRIBUTE) else ""
