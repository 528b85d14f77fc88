"""What follows from a placement, wherever it was measured: the model with reverted ops, the choice, and the record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from act_pipeline.compress.accuracy_control.revert import revert_to_float
from act_pipeline.compress.candidates import Candidate, Candidates
from act_pipeline.compress.plan.op_inventory import inventory_of
from act_pipeline.compress.plan.placement import Placement, verdict_line
from act_pipeline.evaluation.act_measurements import PlacementRecord


def placed_candidate(
    chosen: Candidate, found: Placement, engine: str, folder: Path, op_types: Collection[str], section: str
) -> Candidate | None:
    """Return the candidate with the ops of a decision in float; None: there are none, or no op would be left in INT8.

    Args:
        chosen: the INT8 model that was measured.
        found: the decision.
        engine: the runtime.
        folder: an existing folder for the model.
        op_types, section: see :func:`act_pipeline.compress.plan.op_inventory.inventory_of`.
    """
    names = found.ops
    if not names or len(names) == sum(chosen.inventory.quantized.values()):
        return None
    selection = chosen.selection.revert_to_float(names, f"faster in float in {engine}")
    placed = revert_to_float(chosen.model, names, folder, chosen.source)
    return Candidate(
        f"{chosen.name}, placed",
        "mixed",
        placed,
        chosen.source,
        selection,
        inventory_of(placed, op_types, section, selection),
        chosen.details,
        note=f"{len(names)} ops in float, which is faster in {engine}",
        reverted=chosen.reverted,
    )


def keep_placed(
    tried: Candidates, chosen: Candidate, placed: Candidate | None, found: Placement, say: Callable[[str], None]
) -> tuple[Candidate, Placement]:
    """Evaluate the candidate of a decision, and return the candidate to keep and what is decided then.

    Args:
        tried: evaluates it, and knows the limits.
        chosen: the INT8 model that was measured, one of ``tried``.
        placed: see :func:`placed_candidate`.
        found: the decision.
        say: is called with a line where the faster model is not within the limits.
    """
    if placed is not None:
        tried.add(placed)
        if tried.meets(placed) or not tried.meets(chosen):
            return placed, found
        say("placement: the model with the faster ops in float is not within the limits; all stay in INT8")
    return chosen, found.without_reverts() if found.ops else found


def placement_record(
    found: Placement, engine: str, ops: int, made: int, reused: int, *, device: str | None = None, batch: int = 1
) -> PlacementRecord:
    """Return the record of a decision.

    Args:
        found: the decision.
        engine: the runtime, with its version where another machine has it.
        ops: number of ops that were in INT8 before.
        made, reused: number of measurements that were made, and that were known before.
        device: the machine that was measured; None: this one.
        batch: number of images that were timed at once.
    """
    where = "here" if device is None else f"on {device}"
    return PlacementRecord(
        verdict=found.verdict,
        line=verdict_line(found.verdict, len(found.ops), ops, engine, found.float_precision, where),
        engine=engine,
        ops=ops,
        reverted=list(found.ops),
        groups={group.name: len(group.ops) for group in found.reverted},
        gains=dict(found.gains),
        latency_ms=dict(found.latency_ms),
        int8_gain=found.int8_gain,
        float_precision=found.float_precision,
        measured=made,
        from_cache=reused,
        device=device,
        batch=batch,
    )
