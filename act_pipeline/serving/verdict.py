"""Whether the record of a model's compression says that it may be served."""

from __future__ import annotations

from dataclasses import dataclass

from act_pipeline.core.artifacts import InferenceModel
from act_pipeline.core.errors import UserError
from act_pipeline.core.records import ACT_FILENAME, ACT_SCHEMA, read_record
from act_pipeline.evaluation.act_json import ActRecord


@dataclass(frozen=True)
class Verdict:
    """The verdict on a model.

    Attributes:
        passed: whether the model was evaluated and is within the limits of its compression.
        reason: the figures, or what is missing, in words.
    """

    passed: bool
    reason: str


def verdict_of(model: InferenceModel) -> Verdict:
    """Return the verdict that a model's ``act.json`` has on it; nothing is evaluated again.

    Args:
        model: the INT8 model, in the folder that ``compress`` wrote.
    """
    path = model.directory / ACT_FILENAME
    if not path.is_file():
        return Verdict(False, f"{path} is missing: no compression evaluated this model")
    try:
        record = ActRecord.from_json(read_record(path, ACT_SCHEMA))
    except UserError as error:
        return Verdict(False, str(error))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        return Verdict(False, f"{path} is damaged ({type(error).__name__}: {error})")
    if record.model_hash != model.content_hash():
        return Verdict(False, f"{path} is the record of another model: the files were changed since")
    limits = {"max_drop": record.max_drop, "min_agreement": record.min_agreement}
    named = " and ".join(f"{name} {value}" for name, value in limits.items() if value is not None)
    if not named:
        return Verdict(False, f"{path}: max_drop and min_agreement are empty, so nothing was required of the model")
    if not record.evaluation.images:
        return Verdict(False, f"{path}: the model was evaluated on no images")
    saved = next((step for step in record.steps if step.chosen), None)
    measured = _measured(record)
    if saved is None or saved.meets_max_drop is not True:
        return Verdict(False, f"{path}: the model is not within {named} ({measured})")
    return Verdict(True, f"within {named} ({measured})")


def _measured(record: ActRecord) -> str:
    found = []
    if record.map_drop is not None:
        found.append(f"mAP drop {record.map_drop:.4f}")
    if record.comparison.agreement_interval is not None:
        found.append(f"agreement {record.comparison.agreement_interval.value:.4f}")
    return ", ".join([*found, f"{record.evaluation.images} images"])
