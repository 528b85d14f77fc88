"""Collect the shapes of tensors, which TensorRT in Paddle needs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.fresh_process import package_environment
from act_pipeline.engines import Machine, find_support
from act_pipeline.inference.outcome import InferenceOutcome, Say
from act_pipeline.inference.request import InferenceRequest
from act_pipeline.inference.timing import first_images

# Set for the process started after the shapes were collected, so that it never collects and starts another one.
COLLECTED_VARIABLE = "ACT_PIPELINE_SHAPES_COLLECTED"


def collect_if_stale(
    request: InferenceRequest,
    model: InferenceModel,
    reader: Any,
    summary: Any,
    *,
    device: str,
    threads: int,
    here: Machine,
    inference: Any,
    say: Say,
) -> Path | None:
    """Return the path of newly collected shapes; None if the existing ones are valid.

    Raises:
        UserError: they cannot be collected, or another process writes to the model's folder.
    """
    from act_pipeline.engines.paddle.dynamic_shape import ShapeKey, collect, stale_reason

    height, width = reader.input_size
    key = ShapeKey(model.content_hash(), (int(height), int(width)), request.batch_size, str(here.paddle))
    reason = stale_reason(model, key)
    if reason is None:
        return None
    if os.environ.get(COLLECTED_VARIABLE):
        raise UserError(f"{reason}, right after collecting; is another process writing to {model.directory}?")
    say(f"{reason}: collecting shapes on the {device}")
    find_support("paddle", "fp32", device, here).require()
    batch = first_images(request, reader, request.batch_size)
    one = {name: array[:1] for name, array in batch.items()}
    return collect(model, key, [one, batch], device=device, threads=threads, summary=summary, inference=inference)


def continue_in_a_new_process(rerun: Sequence[str] | None, say: Say) -> InferenceOutcome:
    """Run the command again: Paddle cannot build TensorRT's engine in the process that collected the shapes.

    Args:
        rerun: the command; None: the outcome says what to do.
        say: takes a line about what happens next.
    """
    if rerun is None:
        return InferenceOutcome(lines=["shapes are collected; run it again in a fresh process to build the engine"])
    say("shapes are collected; going on in a fresh process")
    code = subprocess.run(list(rerun), env=package_environment(**{COLLECTED_VARIABLE: "1"}), check=False).returncode
    return InferenceOutcome(exit_code=code if code >= 0 else 128 - code)
