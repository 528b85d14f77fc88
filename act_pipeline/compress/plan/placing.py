"""``Strategy.placement: measured``: ops that the runtime computes sooner in float are reverted."""

from __future__ import annotations

import contextlib
from typing import Any

from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.placement import MIXED, Placement, place, verdict_line
from act_pipeline.compress.plan.placement_cache import StoredMeasurements
from act_pipeline.compress.plan.placement_groups import group_ops, structure_hash
from act_pipeline.compress.plan.placement_timing import ROUNDS, Timer
from act_pipeline.config import Config
from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.cpus import available_cpus
from act_pipeline.core.errors import UserError
from act_pipeline.core.package_versions import versions
from act_pipeline.core.timing import timed
from act_pipeline.engines import machine
from act_pipeline.engines.registry import find_support
from act_pipeline.evaluation.act_json import PlacementRecord
from act_pipeline.graph.static_graph import StaticGraph
from act_pipeline.onnx_export.export import lowering_hash

ENGINES = ("openvino", "onnxruntime")
_IMAGES = 4


def check_placement(config: Config, engine: str, device: str) -> None:
    """Check that the placement can be measured in the engine.

    Raises:
        UserError: it is asked for, and the engine is another one.
    """
    if config.strategy.placement == "measured" and (engine not in ENGINES or device != "CPU"):
        raise UserError(
            f"{config.path}: Strategy.placement is measured, and the engine is {engine} on the {device}, expected one "
            f"of {', '.join(ENGINES)} on the CPU: set Strategy.engine, or Strategy.placement: all"
        )


def place_by_measurement(job: Job, chosen: Candidate, model: InferenceModel) -> tuple[Candidate, PlacementRecord]:
    """Measure groups of ops with and without Q/DQ, and revert those to float that are faster so.

    Args:
        job: the compression; the new candidate, if there is one, is added to it.
        chosen: an INT8 model.
        model: the original float model.

    Returns:
        The candidate to save, and the decision. It is ``chosen`` where no group gains, and where the model with
        reverted ops is not within the limits although ``chosen`` is.
    """
    engine, threads = job.judge.engine, available_cpus()
    seconds: dict[str, float] = {}
    with timed(seconds, "placement"):
        float_ops = {entry["output"] for entry in (*chosen.inventory.kept, *chosen.inventory.weight_only)}
        ops = [op for op in chosen.selection.ops if op.name not in float_ops]
        with contextlib.closing(StaticGraph.load(job.model)) as graph:
            groups = group_ops(graph, ops)
            structure = structure_hash(graph, groups)
        timer = Timer(
            chosen.model, chosen.source, model, engine, threads, job.held_out.feeds[:_IMAGES],
            job.folder("placement"), job.judge.decoder, job.say,
        )  # fmt: skip
        measure = StoredMeasurements(timer, _identity(structure, engine, threads, chosen.source is None))
        floats = [name for name in ("fp32", "bf16") if _runs(engine, name)]
        found = place(groups, measure, floats)
    chosen.seconds.update(seconds)
    placed = _placed(job, chosen, found)
    kept = placed if placed is not None and (job.tried.meets(placed) or not job.tried.meets(chosen)) else chosen
    if found.verdict == MIXED and kept is chosen:
        job.say("placement: the model with the faster ops in float is not within the limits; all stay in INT8")
        found = found.without_reverts()
    return kept, _record(found, engine, len(ops), measure)


def _placed(job: Job, chosen: Candidate, found: Placement) -> Candidate | None:
    """Return the candidate with the ops of a decision in float, evaluated; None: there are none."""
    names = found.ops
    if not names or len(names) == sum(chosen.inventory.quantized.values()):
        return None
    selection = chosen.selection.revert_to_float(names, f"faster in float in {job.judge.engine}")
    placed = revert_to_float(chosen.model, names, job.folder("placed"), chosen.source)
    inventory = inventory_of(placed, job.config.op_types, job.config.op_section, selection)
    return job.tried.add(
        Candidate(
            f"{chosen.name}, placed",
            "mixed",
            placed,
            chosen.source,
            selection,
            inventory,
            chosen.details,
            note=f"{len(names)} ops in float, which is faster in {job.judge.engine}",
            reverted=chosen.reverted,
        )
    )


def _identity(structure: str, engine: str, threads: int, trained: bool) -> dict[str, Any]:
    return {
        "structure": structure,
        "engine": engine,
        "version": versions().get(engine),
        "export": lowering_hash(),
        "cpu": machine().cpu,
        "threads": threads,
        "rounds": ROUNDS,
        "int8 weights": trained,
    }


def _record(found: Placement, engine: str, ops: int, measure: StoredMeasurements) -> PlacementRecord:
    return PlacementRecord(
        verdict=found.verdict,
        line=verdict_line(found.verdict, len(found.ops), ops, engine, found.float_precision),
        engine=engine,
        ops=ops,
        reverted=list(found.ops),
        groups={group.name: len(group.ops) for group in found.reverted},
        gains=dict(found.gains),
        latency_ms=dict(found.latency_ms),
        int8_gain=found.int8_gain,
        float_precision=found.float_precision,
        measured=measure.made,
        from_cache=measure.reused,
    )


def _runs(engine: str, precision: str) -> bool:
    try:
        return find_support(engine, precision, "CPU").available
    except UserError:
        return False
