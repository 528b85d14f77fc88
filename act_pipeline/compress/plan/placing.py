"""``Strategy.placement: measured``: ops that the runtime computes sooner in float are reverted."""

from __future__ import annotations

import contextlib
from typing import Any

from act_pipeline.compress.candidates import Candidate
from act_pipeline.compress.job import Job
from act_pipeline.compress.plan.placed import keep_placed, placed_candidate, placement_record
from act_pipeline.compress.plan.placement import place
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
from act_pipeline.evaluation.act_measurements import PlacementRecord
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
    config = job.config
    placed = placed_candidate(chosen, found, engine, job.folder("placed"), config.op_types, config.op_section)
    kept, found = keep_placed(job.tried, chosen, placed, found, job.say)
    return kept, placement_record(found, engine, len(ops), measure.made, measure.reused)


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


def _runs(engine: str, precision: str) -> bool:
    try:
        return find_support(engine, precision, "CPU").available
    except UserError:
        return False
