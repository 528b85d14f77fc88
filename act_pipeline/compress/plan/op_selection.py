"""Select the ops that compute in INT8: resolve the patterns of the config's ``quantize`` on a model's ops."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

from act_pipeline.config import Quantize
from act_pipeline.core.errors import UserError, suggest
from act_pipeline.graph.name_scopes import KEPT_SCOPE, mark_kept
from act_pipeline.graph.quantizable_ops import QuantizableOp
from act_pipeline.graph.rtdetr_modules import OTHER_GROUP
from act_pipeline.graph.static_graph import StaticGraph


@dataclass(frozen=True)
class Selection:
    """The precision of each quantizable op of a model.

    Attributes:
        ops: all quantizable ops, in the order of the program.
        kept: name of an op that stays float -> the reason.
        weight_only: names of ops with float activations whose weights are stored in INT8.
        dynamic: those of ``weight_only`` whose activations are rounded by their own range when the model runs.
        by_default: those of ``kept`` that only :func:`act_pipeline.graph.float_by_default.float_by_default` keeps,
            and nothing in the config.
    """

    ops: tuple[QuantizableOp, ...]
    kept: dict[str, str] = field(default_factory=dict)
    weight_only: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()
    by_default: tuple[str, ...] = ()

    @property
    def int8(self) -> list[str]:
        """The names of the ops that compute in INT8."""
        return [op.name for op in self.ops if op.name not in self.kept and op.name not in self.weight_only]

    def revert_to_float(self, names: Sequence[str], reason: str) -> Selection:
        """Return a selection in which more ops are left in float.

        Args:
            names: names of the ops.
            reason: the reason, for ``kept``.
        """
        kept = {**self.kept, **{name: reason for name in names}}
        return _selection(self.ops, kept, self.weight_only, self.dynamic, self.by_default)

    def take_back(self, names: Collection[str]) -> Selection:
        """Return a selection in which ops of ``by_default`` compute in INT8.

        Args:
            names: names of the ops.
        """
        kept = {name: reason for name, reason in self.kept.items() if name not in names}
        by_default = [name for name in self.by_default if name not in names]
        return _selection(self.ops, kept, self.weight_only, self.dynamic, by_default)


def select(
    ops: Sequence[QuantizableOp], quantize: Quantize, path: Path, sensitive: Mapping[str, str] | None = None
) -> Selection:
    """Resolve the patterns of a config's ``quantize``.

    Args:
        ops: the quantizable ops of the model.
        quantize: the patterns.
        path: the config's file, for messages.
        sensitive: name of an op that stays float unless ``quantize.include`` matches it -> the reason.

    Raises:
        UserError: a pattern matches no op, an op is both ``weight_only`` and ``dynamic``, or no op is left to quantize.
    """
    kept: dict[str, str] = {}
    included = _matching(ops, quantize.include, "include", path)
    if quantize.include:
        kept.update({op.name: "not in quantize.include" for op in ops if op.name not in included})
    sensitive = {name: why for name, why in (sensitive or {}).items() if name not in included and name not in kept}
    kept.update(sensitive)
    kept.update(
        {name: f"quantize.exclude: {why}" for name, why in _matching(ops, quantize.exclude, "exclude", path).items()}
    )
    weights = _matching(ops, quantize.weight_only, "weight_only", path)
    dynamic = _matching(ops, quantize.dynamic, "dynamic", path)
    for name in (name for name in dynamic if name in weights and name not in kept):
        raise UserError(
            f"{path}: quantize.dynamic: '{dynamic[name]}' and quantize.weight_only: '{weights[name]}' both match "
            f"{name}, expected one of them; name it in one"
        )
    asked = {
        **{name: f"quantize.weight_only: {why}" for name, why in weights.items()},
        **{name: f"quantize.dynamic: {why}" for name, why in dynamic.items()},
    }
    without = [op.name for op in ops if op.name in asked and op.name not in kept and op.weight is None]
    kept.update({name: f"{asked[name]}, and it has no weight" for name in without})
    by_default = [name for name, why in sensitive.items() if kept[name] == why and name not in asked]
    selection = _selection(tuple(ops), kept, [op.name for op in ops if op.name in asked], tuple(dynamic), by_default)
    if not selection.int8 and not selection.weight_only:
        raise UserError(f"{path}: quantize leaves none of {len(ops)} ops in INT8; exclude less, or include more")
    return selection


def check_dynamic(graph: StaticGraph, selection: Selection, path: Path) -> None:
    """Check that the ops with dynamic activations are MatMuls with a scale for each column of their weight.

    Args:
        graph: the float graph that the ops are of.
        selection: the selected ops.
        path: the config's file, for messages.

    Raises:
        UserError: an op is no ``matmul_v2``, or its weight is no matrix or is transposed.
    """
    block = graph.program.global_block()
    chosen = {op.name: op for op in selection.ops if op.name in selection.dynamic}
    for raw in block.ops:
        op = chosen.get(raw.output_arg_names[0]) if raw.output_arg_names else None
        if op is None:
            continue
        if op.type != "matmul_v2":
            found = f"is a {op.type}"
        elif op.weight != raw.input("Y")[0]:
            found = "has its weight on the left"
        elif len(block.var(op.weight).shape) != 2:
            found = f"has a weight of the shape {list(block.var(op.weight).shape)}"
        elif raw.attr("trans_y"):
            found = "transposes its weight"
        else:
            continue
        raise UserError(
            f"{path}: quantize.dynamic: {op.name} (module {op.module}) {found}, expected a matmul_v2 whose right "
            "input is a weight [in, out] that it does not transpose; match fewer ops, or use quantize.weight_only"
        )


def _selection(
    ops: tuple[QuantizableOp, ...],
    kept: dict[str, str],
    weight_only: Sequence[str],
    dynamic: Sequence[str],
    by_default: Sequence[str],
) -> Selection:
    """Return a selection without the ops that are kept among those with INT8 weights."""
    left = tuple(name for name in weight_only if name not in kept)
    return Selection(ops, kept, left, tuple(name for name in left if name in dynamic), tuple(by_default))


def _matching(ops: Sequence[QuantizableOp], patterns: Sequence[str], key: str, path: Path) -> dict[str, str]:
    """Return the name of each op that matches -> the first pattern that it matches."""
    found: dict[str, str] = {}
    for pattern in patterns:
        matched = [op.name for op in ops if _matches(op, pattern)]
        if not matched:
            known = sorted({name for op in ops for name in (op.type, op.group, op.module, op.name)})
            groups = [f"{group}, " for group in dict.fromkeys(op.group for op in ops) if group != OTHER_GROUP]
            example = f" such as {ops[0].module}" if ops else ""
            raise UserError(
                f"{path}: quantize.{key}: '{pattern}' matches none of the {len(ops)} ops, expected an op type, "
                f"{''.join(groups)}an op's name or a glob over module names{example}{suggest(pattern, known)}"
            )
        for name in matched:
            found.setdefault(name, pattern)
    return found


def _matches(op: QuantizableOp, pattern: str) -> bool:
    if pattern in (op.type, op.group, op.name):
        return True
    # A module's name includes its sublayers, as in PaddlePaddle's own lists of layers.
    return fnmatch.fnmatchcase(op.module, pattern) or fnmatch.fnmatchcase(op.module, f"{pattern}.*")


def mark_float(graph: StaticGraph, kept: Sequence[str]) -> None:
    """Mark ops so that PaddleSlim's passes insert no Q/DQ before them, in calibration and in training.

    Args:
        graph: the float graph; the ops' name scope is changed.
        kept: names of the ops.
    """
    _mark(graph, kept, True)


def unmark_float(graph: StaticGraph, names: Collection[str]) -> None:
    """Take the mark of :func:`mark_float` away from ops."""
    _mark(graph, names, False)


def _mark(graph: StaticGraph, names: Collection[str], kept: bool) -> None:
    wanted = set(names)
    for op in graph.program.global_block().ops:
        if op.output_arg_names and op.output_arg_names[0] in wanted:
            mark_kept(op, kept)


def skip_patterns(not_quant_pattern: Union[str, Sequence[str]]) -> list[str]:
    """Return PaddleSlim's ``not_quant_pattern`` with the mark of :func:`mark_float` added."""
    patterns = [not_quant_pattern] if isinstance(not_quant_pattern, str) else list(not_quant_pattern)
    return [*patterns, KEPT_SCOPE]
