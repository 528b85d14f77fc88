"""Sensitivity of each op: the output error when this op alone computes in INT8.

PaddleSlim's ``AnalysisPTQ.statistical_analyse`` and ``metric_error_analyse`` write a model for each op. Here ops are
switched in one graph (`analysis.simulation`), and each figure is a sum over images, so that the work can be cut
anywhere: a unit is one op on one batch (`analysis.sensitivity_task`), measured in this process
(`analysis.sensitivity_runner`), in others, or on a cluster (`analysis.executors`), and kept as soon as it is there
(`analysis.ledger`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from act_pipeline.analysis.sensitivity_task import MAP
from act_pipeline.graph.int8_rounding import sqnr_db
from act_pipeline.graph.quantizable_ops import QuantizableOp

_ATTENTION = re.compile(r"^(.*\.(?:self|cross)_attn)(?:\.|$)")


@dataclass(frozen=True)
class OpSensitivity:
    """Output error of a model in which this op alone is in INT8.

    Attributes:
        name, type, module, group: see :class:`act_pipeline.graph.quantizable_ops.QuantizableOp`.
        sqnr_db: ``10 log10(signal / noise)`` of the outputs in dB, see
            :func:`act_pipeline.graph.raw_outputs.signal_and_noise`.
        error: noise / signal.
        share: share in the sum of all ops' errors, in [0, 1].
        detection_change: 1 - the mean agreement of the detections that reach a score of 0.3 with those of the float
            model, in [0, 1], see :mod:`act_pipeline.evaluation.matching`.
        map: mAP on the subset; None if not measured.
    """

    name: str
    type: str
    module: str
    group: str
    sqnr_db: float
    error: float
    share: float
    detection_change: float
    map: Optional[float] = None


@dataclass(frozen=True)
class BlockError:
    """Output error of a model in which a block of ops alone is in INT8.

    Attributes:
        group: group of the block's first op.
        ops: number of ops in the block.
        error: noise / signal of the outputs, see :func:`act_pipeline.graph.raw_outputs.signal_and_noise`.
    """

    group: str
    ops: int
    error: float


def summarize(ops: Sequence[QuantizableOp], measurements: Iterable[Mapping[str, Any]]) -> list[OpSensitivity]:
    """Sum the measurements of all units per op.

    Args:
        ops: of the task.
        measurements: of :meth:`act_pipeline.analysis.sensitivity_runner.SensitivityRunner.measure`.
    """
    sums: dict[str, dict[str, float]] = {}
    maps: dict[str, float] = {}
    for found in measurements:
        if found["batch"] == MAP:
            maps[found["op"]] = found["map"]
            continue
        into = sums.setdefault(found["op"], dict.fromkeys(("signal", "noise", "agreement", "objects"), 0.0))
        for key in into:
            into[key] += found[key]
    errors = {name: found["noise"] / found["signal"] if found["signal"] else 0.0 for name, found in sums.items()}
    total = sum(errors.values())
    return [
        OpSensitivity(
            name=op.name,
            type=op.type,
            module=op.module,
            group=op.group,
            sqnr_db=sqnr_db(errors[op.name]),
            error=errors[op.name],
            share=errors[op.name] / total if total else 0.0,
            detection_change=_detection_change(sums[op.name]),
            map=maps.get(op.name),
        )
        for op in ops
    ]


def _detection_change(sums: Mapping[str, float]) -> float:
    return 1 - sums["agreement"] / sums["objects"] if sums["objects"] else 0.0


def ranked(sensitivities: Collection[OpSensitivity]) -> list[OpSensitivity]:
    """Sort sensitivities in descending order of error, then of detection change."""
    return sorted(sensitivities, key=lambda op: (-op.error, -op.detection_change))


def group_shares(sensitivities: Sequence[OpSensitivity]) -> list[dict[str, Any]]:
    """Return ``name``, number of ``ops`` and ``share`` of the total error for each group; the shares add up to 1."""
    return _shares(sensitivities, lambda op: op.group)


def attention_shares(sensitivities: Sequence[OpSensitivity]) -> list[dict[str, Any]]:
    """Return ``name``, number of ``ops`` and ``share`` of the total error for each attention module.

    An attention module, e.g. ``transformer.decoder.layers.0.self_attn``, is part of its group.
    """

    def attention(op: OpSensitivity) -> str | None:
        found = _ATTENTION.match(op.module)
        return found.group(1) if found else None

    return _shares(sensitivities, attention)


def _shares(
    sensitivities: Sequence[OpSensitivity], name_of: Callable[[OpSensitivity], Optional[str]]
) -> list[dict[str, Any]]:
    shares: dict[str, dict[str, Any]] = {}
    for op in sensitivities:
        name = name_of(op)
        if name is not None:
            entry = shares.setdefault(name, {"name": name, "ops": 0, "share": 0.0})
            entry["ops"] += 1
            entry["share"] += op.share
    return list(shares.values())
