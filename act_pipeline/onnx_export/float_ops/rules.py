"""The type of an export rule, and the error and checks that all rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import numpy as np

from act_pipeline.onnx_export.graph_builder import GraphBuilder
from act_pipeline.onnx_export.program import DTYPES, Op

# Adds the nodes of an op and returns the ONNX name of its first output; None: the rule itself has stored the results in
# `values` or `constants`.
Rule = Callable[[GraphBuilder, Op], Optional[str]]


class CannotLower(Exception):
    """An op cannot be exported to ONNX; the caller adds the op's type and output to the reason."""


def element_type(op: Op, name: str = "dtype") -> type:
    """Return the NumPy type that an attribute of an op specifies.

    Args:
        op: the op.
        name: name of the attribute, which holds a Paddle ``VarType``.

    Raises:
        CannotLower: the type is not in :data:`act_pipeline.onnx_export.program.DTYPES`.
    """
    number = int(op.attrs[name])
    if number not in DTYPES:
        raise CannotLower(f"its element type {number} is not known")
    return DTYPES[number]


def refuse(op: Op, *slots: str) -> None:
    """Check that an op has none of the given optional input slots, which replace attributes at run time.

    Args:
        op: the op.
        *slots: names of the input slots.

    Raises:
        CannotLower: one of them is used.
    """
    for slot in slots:
        if slot in op.inputs:
            raise CannotLower(f"its {slot} is computed at run time")


def channels_first(op: Op) -> None:
    """Check that the channels of an op are axis 1, as in ONNX.

    Args:
        op: the op.

    Raises:
        CannotLower: they are the last axis.
    """
    for key in ("data_format", "data_layout"):
        layout = str(op.attrs.get(key, ""))
        if len(layout) > 2 and layout.endswith("C"):
            raise CannotLower(f"its layout is {layout}, expected NC{layout[1:-1]}")


def fixed_shape(build: GraphBuilder, name: str, first: int = 0) -> tuple[int, ...]:
    """Return the sizes of a tensor from an axis on.

    Args:
        build: the graph under construction.
        name: Paddle name of the tensor.
        first: the first axis.

    Raises:
        CannotLower: one of the sizes is open.
    """
    sizes = tuple(int(size) for size in build.shapes[name][first:])
    if min(sizes, default=0) < 0:
        raise CannotLower(f"the shape {list(build.shapes[name])} of {name!r} is open after axis {first}")
    return sizes


def vector(build: GraphBuilder, names: list[str]) -> str:
    """Return an int64 vector of the integers that Paddle passes as one tensor or as several of one element each.

    Args:
        build: the graph to extend.
        names: Paddle names of the tensors.
    """
    parts = []
    for name in names:
        if name in build.constants:
            parts.append(build.initializer(build.constants[name].astype(np.int64).reshape(-1)))
        else:
            parts.append(build.cast(build.reshape(build.get(name), -1), np.int64))
    return parts[0] if len(parts) == 1 else build.node("Concat", parts, axis=0)


def known_integers(build: GraphBuilder, names: list[str]) -> list[int] | None:
    """Return the integers that constant tensors hold, in order; None where one is computed at run time.

    Args:
        build: the graph under construction.
        names: Paddle names of the tensors.
    """
    if any(name not in build.constants for name in names):
        return None
    return [int(number) for name in names for number in build.constants[name].reshape(-1)]
