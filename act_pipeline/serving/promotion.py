"""Promote a model: check its verdict, copy it into the repository, give it a share of the requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from act_pipeline.core.artifacts import InferenceModel, PlanModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME
from act_pipeline.serving.repository import Repository
from act_pipeline.serving.state import made_spare, promoted, rolled_back
from act_pipeline.serving.verdict import verdict_of
from act_pipeline.serving.version import PLAN_FILENAME, Version, write_version


def promote(
    repository: Repository,
    model_path: str | os.PathLike[str],
    share: int = 100,
    *,
    force: bool = False,
    spare: bool = False,
    category_ids: Optional[Sequence[int]] = None,
    float_model: Optional[Path] = None,
    plan: Optional[str | os.PathLike[str]] = None,
) -> tuple[Version, dict[str, Any]]:
    """Give a model a share of the requests, or keep it as the spare one.

    A model that the repository has already, known by the hash of its files and its record, keeps its number.

    Args:
        repository: the repository.
        model_path: the folder that ``compress`` wrote, or a version's folder in the repository.
        share: the share of the requests, percent, one of :data:`act_pipeline.serving.state.SHARES`.
        force: whether to promote a model whose ``act.json`` does not let it pass.
        spare: keep it as the lighter model that a rule may switch to; ``share`` is ignored.
        category_ids: the COCO category id of every class index, for the histograms by class; None: none are recorded.
        float_model: folder of the float model for shadow requests.
        plan: a TensorRT plan of the model, with its ONNX file beside it: what a server with TensorRT loads.

    Returns:
        the version and the log's entry.

    Raises:
        UserError: the model is missing or does not pass, the plan is of another model, or the repository's state does
            not allow it.
    """
    model = InferenceModel.load(model_path)
    verdict = verdict_of(model)
    if not verdict.passed and not force:
        raise UserError(f"{model.directory} is not promoted: {verdict.reason}; compress it again, or give --force")
    if float_model is not None:
        InferenceModel.load(float_model)
    built = None if plan is None else PlanModel.load(plan)
    with repository.changing() as state:
        known = _known(repository, model, built)
        number = known.number if known else max(repository.numbers(), default=0) + 1
        after = made_spare(state, number) if spare else promoted(state, number, share)
        version = known or write_version(repository.folder_of(number), model, verdict, category_ids, float_model, built)
        figures = {
            "version": number,
            "model_hash": version.model_hash,
            "source": version.source,
            "passed": verdict.passed,
            "verdict": verdict.reason,
            "forced": force and not verdict.passed,
        }
        entry = repository.change(after, "spare" if spare else "promote", **figures)
    return version, entry


def roll_back(repository: Repository) -> dict[str, Any]:
    """Take the candidate back; without a candidate, make the version live that was live before.

    Args:
        repository: the repository.

    Returns:
        the log's entry.

    Raises:
        UserError: there is nothing to roll back to.
    """
    with repository.changing() as state:
        after = rolled_back(state)
        version = state.live if state.candidate is None else state.candidate
        return repository.change(after, "roll_back", version=version, by="command")


def _known(repository: Repository, model: InferenceModel, plan: Optional[PlanModel]) -> Optional[Version]:
    """Return the version that has a model's files, records and plan, or None."""
    content = model.content_hash()
    for number in repository.numbers():
        version = repository.version(number)
        if version.model_hash == content and _side_files(version.model) == _side_files(model):
            kept = version.folder / PLAN_FILENAME
            # A version of the repository, given by its folder, brings its own plan.
            if model.directory == version.folder or _hash(kept) == (None if plan is None else plan.content_hash()):
                return version
    return None


def _hash(plan: Path) -> Optional[str]:
    return PlanModel(plan).content_hash() if plan.is_file() else None


def _side_files(model: InferenceModel) -> list[bytes]:
    """Return what besides the weights decides what a model detects, and how it passed."""
    paths = (model.infer_cfg_path, model.directory / ACT_FILENAME)
    return [path.read_bytes() if path.is_file() else b"" for path in paths]
